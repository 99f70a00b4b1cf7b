from tests.support.appliance import served as served

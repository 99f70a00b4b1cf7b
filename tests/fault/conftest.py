from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.appliance import Appliance, appliance


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """One appliance for all tests of a module: each uses prompts of its own."""
    with appliance(tmp_path_factory.mktemp("home")) as running:
        yield running

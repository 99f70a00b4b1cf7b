"""`kvctl` that takes computing for dear, whatever it measures: what is stored is loaded, all of it. Run it as DEAR.

For tests of what is there. Whether to load it is the planner's choice, and beside enough other work on the box it may well
compute the front of a prompt while the back comes.
"""

from __future__ import annotations

import sys

from appliance.plan.cost import CostModel
from kvctl.cli import main

DEAR = (sys.executable, "-m", "tests.support.dear")
TOKEN_S = 1.0


def _prefill_s(cost: CostModel, start: int, stop: int) -> float:
    return max(stop - start, 0) * TOKEN_S


if __name__ == "__main__":
    CostModel.prefill_s = _prefill_s  # type: ignore[method-assign]
    main()

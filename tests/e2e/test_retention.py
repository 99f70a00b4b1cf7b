"""A client says how long its prompt is kept: over, it is computed again, whatever happened meanwhile."""

from __future__ import annotations

from tests.support.appliance import BLOCK, Appliance, prompt, until


def test_a_retention_ends_in_every_tier_and_over_a_restart(served: Appliance) -> None:
    short, long = prompt(1, BLOCK * 3 + 5), prompt(2, BLOCK * 3 + 5)
    served.complete(short, prompt_cache_retention="2s")
    served.complete(long, prompt_cache_retention="24h")
    served.settle()
    until(lambda: served.tier("nvme").blocks == 4, "the shorter one erased")
    served.forget("hbm")
    assert served.complete(short, prompt_cache_retention="2s").cached_tokens == 0
    assert served.complete(long).cached_tokens == len(long) - 1
    served.settle()
    served.kill()
    served.start()
    until(lambda: served.tier("nvme").blocks == 4, "the shorter one erased")
    assert served.complete(short).cached_tokens == 0
    assert served.complete(long).cached_tokens == len(long) - 1

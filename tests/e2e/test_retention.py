"""A client says how long its prompt is kept: over, it is computed again, whatever happened meanwhile."""

from __future__ import annotations

from pathlib import Path

from tests.support.appliance import BLOCK, Appliance, kvctl, prompt, text, until


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


def test_a_pin_holds_over_a_crash(served: Appliance, tmp_path: Path) -> None:
    tokens = prompt(5, BLOCK * 2 + 9)
    served.complete(tokens)
    file = tmp_path / "prompt.txt"
    file.write_text(text(tokens), encoding="utf-8")
    pinned = kvctl(served.home, "pin", "--prompt-file", str(file), "--json").json
    assert pinned["tokens"] == len(tokens)
    served.kill()
    served.start()
    assert served.tier("nvme").pinned_blocks == 3
    assert "pinned" in kvctl(served.home, "status").out
    assert served.complete(tokens).cached_tokens == len(tokens) - 1
    assert kvctl(served.home, "unpin", "--prompt-file", str(file), "--json").json["pinned_bytes"] == 0

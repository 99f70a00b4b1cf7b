"""Models whose KV is not plain rows of one cache: what they computed survives a restart of the appliance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import odd_models
from tests.support.appliance import BLOCK, Appliance, appliance, prompt

FAMILIES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "gemma3": ("rows", lambda path: odd_models.sliding(path, 48)),
    "gpt-oss": ("rows", lambda path: odd_models.sinks(path, 48)),
    "deepseek2": ("rows", odd_models.latent),
    "qwen3next": ("checkpoint", odd_models.hybrid),
    "qwen35": ("checkpoint", lambda path: odd_models.hybrid(path, "qwen35")),
    "mamba": ("checkpoint", odd_models.recurrent),
}


def restart(served: Appliance) -> None:
    assert served.stop() == 0
    served.start()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_goes_on_after_a_restart_where_it_was_kept(tmp_path: Path, family: str) -> None:
    kv_mode, make = FAMILIES[family]
    first = prompt(1, BLOCK * 5 + 37)
    longer = [*first, *prompt(2, 30)]
    branch = [*first[: BLOCK * 3 + 9], *prompt(3, 30)]
    with appliance(tmp_path, model=make(tmp_path / f"{family}.gguf")) as served:
        engine = served.status().engine
        assert engine.kv_mode == kv_mode
        assert any("a prompt goes on" in note for note in engine.notes) == (family != "deepseek2")
        cold = served.complete(first)
        assert cold.cached_tokens == 0
        hot = served.complete(first)
        assert (hot.text, hot.sources["hbm"]) == (cold.text, len(first) - 1)
        restart(served)
        kept = len(first) if kv_mode == "rows" else len(first) - 1
        again = served.complete(longer)
        assert again.sources["nvme"] == again.cached_tokens == kept
        assert again.text == served.complete(longer, cache_salt="0" * 32).text
        warm = served.complete(first)
        assert (warm.text, warm.cached_tokens) == (cold.text, len(first) - 1)
        parted = served.complete(branch)
        assert parted.cached_tokens == (BLOCK * 3 + 9 if kv_mode == "rows" else BLOCK * 3)
        assert parted.text == served.complete(branch, cache_salt="0" * 32).text


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_quantised_kv_survives_a_restart(tmp_path: Path, kv_type: str) -> None:
    settings = {"engine.kv_type_k": kv_type, "engine.kv_type_v": kv_type}
    tokens = prompt(1, BLOCK * 3 + 9)
    with appliance(tmp_path, settings) as served:
        cold = served.complete(tokens)
        restart(served)
        warm = served.complete(tokens)
    assert (warm.text, warm.sources["nvme"]) == (cold.text, len(tokens) - 1)

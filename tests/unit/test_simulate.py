"""The simulator: what it finds, what it gives up, and what it refuses to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from appliance.api.trace import Replayed, TraceEvent, TraceHeader
from appliance.errors import UsageError
from appliance.ops import simulate

HEADER = TraceHeader(
    started="2026-01-01T00:00:00Z",
    block_tokens=4,
    block_bytes=10,
    prefill_token_s=1.0,
    prefill_depth_s=0.5,
    bytes_per_s={"nvme": 5.0},
)


def event(path: Sequence[tuple[int, int]], prompt_blocks: int) -> TraceEvent:
    return TraceEvent(
        t=0.0, tenant=0, path=list(path), prompt_blocks=prompt_blocks, prompt_tokens=4 * prompt_blocks + 1
    )


def replay(events: Sequence[TraceEvent], *, dram: int, nvme: int, policy: str = "lru") -> Replayed:
    """Sizes in blocks."""
    simulation = simulate.Simulation(HEADER, policy, dram_bytes=10 * dram, nvme_bytes=10 * nvme)
    for each in events:
        simulation.replay(each)
    return simulation.result()


@pytest.mark.parametrize("policy", sorted(simulate.POLICIES))
def test_what_fits_is_found_again_in_dram_to_the_block(policy: str) -> None:
    found = replay([event([(0, 4)], 4), event([(0, 4), (5, 6)], 7)], dram=100, nvme=100, policy=policy)
    assert (found.dram_blocks, found.nvme_blocks, found.prompt_blocks) == (5, 0, 11)
    assert found.reusable_share == 1.0


@pytest.mark.parametrize("policy", sorted(simulate.POLICIES))
def test_what_dram_gave_up_is_found_in_nvme_and_comes_up_again(policy: str) -> None:
    talks = [event([(0, 3)], 4), event([(4, 7)], 4), event([(0, 3)], 4), event([(0, 3)], 4)]
    found = replay(talks, dram=4, nvme=8, policy=policy)
    assert (found.nvme_blocks, found.dram_blocks) == (4, 4)
    assert found.evicted_dram >= 8


@pytest.mark.parametrize("policy", sorted(simulate.POLICIES))
def test_tiers_are_never_fuller_than_their_size(policy: str) -> None:
    simulation = simulate.Simulation(HEADER, policy, dram_bytes=30, nvme_bytes=70)
    for n in range(50):
        simulation.replay(event([(0, 1), (2 + 5 * n, 6 + 5 * n)], 7))
        assert len(simulation._dram.policy) <= 3
        assert len(simulation._nvme.policy) <= 7


def test_without_tiers_all_is_computed_and_nothing_is_saved() -> None:
    found = replay([event([(0, 3)], 4), event([(0, 3)], 4)], dram=0, nvme=0)
    assert found.dram_blocks + found.nvme_blocks == 0
    assert found.saved_s == 0
    assert found.compute_s == pytest.approx(2 * (17 + 0.5 * 17 * 17 / 2))


def test_seconds_are_those_of_the_header() -> None:
    found = replay([event([(0, 3)], 4), event([(4, 7)], 4), event([(0, 3)], 4)], dram=4, nvme=8)
    whole, rest = 17 + 0.5 * 17 * 17 / 2, 1 + 0.5 * (17 * 17 - 16 * 16) / 2
    assert found.compute_s == pytest.approx(2 * whole + rest)
    assert found.saved_s == pytest.approx(whole - rest)
    assert found.load_s == pytest.approx(4 * 10 / 5.0)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["{}"],
        ["not json"],
        [HEADER.model_dump_json(), "[]"],
        [HEADER.model_dump_json(), '{"t": 1, "tenant": 0, "path": [[3, 1]], "prompt_blocks": 1, "prompt_tokens": 5}'],
        [HEADER.model_dump_json(), event([(0, 1)], 1).model_dump_json()[:-5]],
    ],
)
def test_what_is_not_a_trace_is_refused_with_its_line(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "trace"
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"line 2|not a trace"):
        list(simulate.read(path)[1])


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    events = [event([(0, 3)], 2), event([(0, 1), (4, 4)], 3)]
    path = tmp_path / "trace"
    path.write_text("\n".join(item.model_dump_json() for item in (HEADER, *events)))
    header, found = simulate.read(path)
    assert (header, list(found)) == (HEADER, events)

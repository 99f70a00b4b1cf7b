"""What is measured before the first request, and how it is kept between starts."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance import calibration
from appliance.calibration import learned
from appliance.plan.cost import CostModel
from appliance.plan.hardware import CHUNKS, Medium, chunk_tokens, depths
from appliance.types import Fingerprint, Tier

INFO: Any = SimpleNamespace(
    fingerprint=Fingerprint(bytes(32), bytes(32)), batch_threads=2, prefill_tokens_per_s=100.0, decode_step_s=0.01
)


def test_depths_are_whole_blocks_and_leave_room_for_a_chunk() -> None:
    for context in (512, 2048, 16_384, 131_072):
        found = depths(context, 256)
        assert found == sorted(set(found))
        assert all(depth % 256 == 0 and depth + CHUNKS[-1] <= context for depth in found)
    assert len(depths(16_384, 256)) == 4


def test_a_chunk_takes_about_a_second_on_a_slow_box_too() -> None:
    assert [chunk_tokens(rate) for rate in (1, 130, 300, 1e6)] == [64, 128, 256, 512]


def test_reading_and_opening_overlap() -> None:
    assert Medium(0.001, 1e9, 5e8).load_s(10**9) == pytest.approx(2.001)


async def test_what_was_learned_is_kept_for_the_same_model_and_box(tmp_path: Path) -> None:
    async with learned(tmp_path, INFO) as (cost, keep):
        assert keep is not None
        cost.saw_load({Tier.NVME: 10**7}, 0.5)
        keep()
        kept = json.loads((tmp_path / "calibration.json").read_text())
    assert [CostModel.from_json(each).load_s(Tier.NVME, 10**7) for each in kept.values()] == [pytest.approx(0.5)]
    async with learned(tmp_path, INFO) as (again, keep):
        assert keep is None
        assert again.load_s(Tier.NVME, 10**7) == pytest.approx(0.5)
    other = SimpleNamespace(**{**vars(INFO), "fingerprint": Fingerprint(b"x" * 32, bytes(32))})
    async with learned(tmp_path, other) as (_, keep):  # type: ignore[arg-type]
        assert keep is not None
    assert len(json.loads((tmp_path / "calibration.json").read_text())) == 2, "one model's outlives another's"


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"a": 1}', "\x00"])
async def test_a_damaged_file_is_measured_again_and_replaced(tmp_path: Path, damage: str) -> None:
    (tmp_path / "calibration.json").write_text(damage)
    async with learned(tmp_path, INFO) as (_, keep):
        assert keep is not None
    async with learned(tmp_path, INFO) as (_, keep):
        assert keep is None


async def test_a_damaged_entry_is_measured_again(tmp_path: Path) -> None:
    async with learned(tmp_path, INFO):
        pass
    path = tmp_path / "calibration.json"
    saved = json.loads(path.read_text())
    for entry in saved.values():
        entry["prefill"]["slope0"] = -1
    path.write_text(json.dumps(saved))
    async with learned(tmp_path, INFO) as (_, keep):
        assert keep is not None


def test_the_medium_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    medium = calibration._medium(tmp_path)
    assert min(medium.latency_s, medium.read_bytes_per_s, medium.open_bytes_per_s) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_meanwhile_leaves_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, buffer: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(calibration, "write_all", failing)
    with pytest.raises(OSError, match="space"):
        calibration._medium(tmp_path)
    assert list(tmp_path.iterdir()) == []

"""The null engine: the conformance suites, with one frame in a block, with several, and with checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.engine.base import Engine
from appliance.engine.null import END, NullEngine
from appliance.errors import RestoreError
from tests.contracts.checkpoint import CheckpointConformance
from tests.contracts.engine import BATCH, CELLS, Conformance
from tests.support.engines import export, null_config, null_engine, prefill, prompt, restore

BLOCK = 16


class TestNull(Conformance):
    block, end_token = BLOCK, END

    @classmethod
    def open(cls) -> Engine:
        return null_engine(context_tokens=CELLS, batch_tokens=BATCH)


class TestNullInFrames(Conformance):
    block, end_token = BLOCK, END

    @classmethod
    def open(cls) -> Engine:
        return NullEngine(null_config(context_tokens=CELLS, batch_tokens=BATCH), frames=4)


class TestNullWithCheckpoints(CheckpointConformance):
    @classmethod
    def open(cls, folder: Path) -> Engine:
        return NullEngine(null_config(), checkpoints=True)


def test_a_block_of_another_place_or_length_is_refused() -> None:
    engine = null_engine()
    prefill(engine, 0, prompt(2 * BLOCK))
    payloads = export(engine, 0, 0, [BLOCK, BLOCK])
    with pytest.raises(RestoreError):
        restore(engine, 1, 0, [BLOCK], payloads[1:])
    payloads[0][0] -= 1  # the token count the block itself names
    with pytest.raises(RestoreError):
        restore(engine, 1, 0, [BLOCK], payloads[:1])
    assert engine.free_cells == engine.info.context_tokens - 2 * BLOCK


@pytest.mark.parametrize("byte", [8, 100, -1])
def test_one_changed_byte_of_a_row_changes_the_logits(byte: int) -> None:
    engine = null_engine()
    prefill(engine, 0, prompt(BLOCK))
    good = export(engine, 0, 0, [BLOCK])
    bad = [bytearray(good[0])]
    bad[0][byte] ^= 1
    restore(engine, 1, 0, [BLOCK], good)
    restore(engine, 2, 0, [BLOCK], bad)
    assert (prefill(engine, 1, prompt(1), BLOCK) != prefill(engine, 2, prompt(1), BLOCK)).any()

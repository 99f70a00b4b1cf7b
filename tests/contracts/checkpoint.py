"""What every Engine must do whose model has a state that cannot be sliced: blocks end where a state was kept, and are whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from appliance.engine.base import Engine, KVMode
from appliance.errors import EngineError, RestoreError
from appliance.types import Tokens
from tests.support.engines import complete, export, prefill, prompt, restore


class CheckpointConformance(ABC):
    @classmethod
    @abstractmethod
    def open(cls, folder: Path) -> Engine:
        """At least 6 sequences, and cells for eight blocks."""

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
        engine = cls.open(tmp_path_factory.mktemp("model"))
        yield engine
        engine.close()

    @pytest.fixture
    def engine(self, loaded: Engine) -> Iterator[Engine]:
        yield loaded
        for seq in range(loaded.info.max_sequences):
            loaded.drop(seq)

    def stored(self, engine: Engine, tokens: Tokens) -> tuple[list[int], list[bytearray]]:
        """Sizes and payloads of all blocks and the tail, each exported when sequence 0 ended there; it still does."""
        block = engine.info.layout.block_tokens
        sizes = [min(block, len(tokens) - start) for start in range(0, len(tokens), block)]
        payloads = []
        for i, size in enumerate(sizes):
            prefill(engine, 0, tokens[i * block : i * block + size], i * block)
            payloads += export(engine, 0, i * block, [size])
        return sizes, payloads

    def next_logits(self, engine: Engine, seq: int, at: int) -> NDArray[np.float32]:
        return prefill(engine, seq, prompt(1, seed=77), at)

    def test_the_layout_says_that_blocks_are_whole(self, engine: Engine) -> None:
        layout = engine.info.layout
        assert engine.info.kv_mode is KVMode.CHECKPOINT
        assert not layout.divisible
        assert sum(layout.fixed_bytes) > 0
        assert layout.payload_bytes(layout.block_tokens) <= layout.slot_bytes

    @pytest.mark.parametrize("blocks", [0, 1, 2])
    @pytest.mark.parametrize("tail", [1, 7])
    @pytest.mark.parametrize("together", [True, False])
    def test_a_restored_sequence_goes_on_bit_equal_to_one_that_never_left(
        self, engine: Engine, blocks: int, tail: int, together: bool
    ) -> None:
        tokens = prompt(blocks * engine.info.layout.block_tokens + tail, seed=blocks)
        sizes, payloads = self.stored(engine, tokens)
        expected = self.next_logits(engine, 0, len(tokens))
        chosen = complete(engine, 0, len(tokens) + 1)
        engine.drop(0)
        prefill(engine, 1, prompt(50, seed=99))  # others took the cells meanwhile
        if together:
            restore(engine, 2, 0, sizes, payloads)
        else:
            for i, (size, payload) in enumerate(zip(sizes, payloads, strict=True)):
                restore(engine, 2, i * sizes[0], [size], [payload])
                assert export(engine, 2, i * sizes[0], [size]) == [payload]
        assert np.array_equal(self.next_logits(engine, 2, len(tokens)), expected)
        assert complete(engine, 2, len(tokens) + 1) == chosen

    def test_another_prompts_last_block_changes_what_comes_next(self, engine: Engine) -> None:
        """Positive control: without it, equal logits would prove nothing."""
        n = engine.info.layout.block_tokens + 9
        sizes, good = self.stored(engine, prompt(n, seed=1))
        engine.drop(0)
        _, bad = self.stored(engine, prompt(n, seed=2))
        found = []
        for seq, last in ((1, good[1]), (2, bad[1])):
            restore(engine, seq, 0, sizes, [good[0], last])
            found.append(self.next_logits(engine, seq, n))
        assert not np.array_equal(*found)

    def test_a_sequence_that_took_over_another_goes_on_whatever_becomes_of_that(self, engine: Engine) -> None:
        tokens, other = prompt(40), prompt(5, seed=4)
        prefill(engine, 0, tokens)
        engine.link(0, 1, 0, len(tokens))
        engine.link(0, 2, 0, len(tokens))
        prefill(engine, 0, other, len(tokens))
        expected = complete(engine, 0, len(tokens) + len(other))
        engine.drop(0)
        prefill(engine, 1, prompt(9, seed=5), len(tokens))
        prefill(engine, 2, other, len(tokens))
        assert complete(engine, 2, len(tokens) + len(other)) == expected

    def test_a_block_is_exported_only_where_its_sequence_ends(self, engine: Engine) -> None:
        prefill(engine, 0, prompt(20))
        (payload,) = export(engine, 0, 0, [20])
        for start, sizes in ((0, [19]), (0, [21]), (0, [10, 10])):
            with pytest.raises(EngineError):
                export(engine, 0, start, sizes)
        assert export(engine, 0, 0, [20]) == [payload]

    @pytest.mark.parametrize("bad", ["in part", "shorter", "longer", "nothing"])
    def test_a_block_that_is_not_whole_is_refused_and_leaves_no_trace(self, engine: Engine, bad: str) -> None:
        sizes, payloads = self.stored(engine, prompt(engine.info.layout.block_tokens + 9))
        restore(engine, 1, 0, sizes[:1], payloads[:1])
        last = {"in part": payloads[1], "shorter": payloads[1][:-1], "longer": payloads[1] + b"\0"}.get(
            bad, bytearray()
        )
        with pytest.raises(RestoreError):
            restore(engine, 1, sizes[0], [9], [last], use=8 if bad == "in part" else None)
        assert export(engine, 1, 0, sizes[:1]) == payloads[:1]
        restore(engine, 1, sizes[0], [9], payloads[1:])
        assert export(engine, 1, sizes[0], [9]) == payloads[1:]

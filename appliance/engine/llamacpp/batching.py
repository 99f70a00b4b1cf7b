"""Into how many decode calls rows go, and when a small batch is filled up, so that all of it takes least time.

llama.cpp's attention on the CPU has three ways. A lone token is computed by all threads, each with a part of the cells. A
tile of 64 rows passes over the cells once for all. Anything between goes row by row, by one thread each, at several times the
price of either: with qwen2.5-0.5b beside 8,192 cells two tokens take 170 ms in one call and 100 ms in two, and beside
4,096 cells 28 tokens take 2.3 s, 64 tokens 0.9 s. So few deep streams are computed one by one, and a follow-up question is
filled up to a tile. What each way costs here is measured at start; on a GPU all goes into one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from appliance.engine.base import Row

TILE_ROWS = 64
"""GGML_FA_TILE_Q of ggml's CPU backend."""
TRIES = 2
"""Of each measurement; the quicker counts: a disturbance can only slow one down."""


@dataclass(frozen=True)
class Costs:
    """Seconds: of a batch at depth 0, and for each cell it looks at."""

    lone: float
    lone_cell: float
    few: float
    """Of each row among fewer than a tile, more than one."""
    few_cell: float
    tile: float
    """Of a whole tile."""
    tile_cell: float

    @classmethod
    def measured(cls, timed: Callable[[int, int], float], depth: int, deep: Callable[[], None]) -> Costs:
        """`timed(rows, start)`: seconds of a batch of so many tokens from there on; `deep` fills cells up to `depth`."""

        def best(n_rows: int, start: int) -> float:
            return min(timed(n_rows, start) for _ in range(TRIES))

        lone, two, tile = (best(n_rows, 0) for n_rows in (1, 2, TILE_ROWS))
        deep()
        seconds = (best(1, depth) - lone, best(2, depth) - two, best(TILE_ROWS, depth) - tile)
        lone_cell, two_cell, tile_cell = (max(0.0, each) / depth for each in seconds)
        return cls(lone, lone_cell, two / 2, two_cell / 2, tile, tile_cell)

    def alone(self, row: Row) -> float:
        return self.lone + self.lone_cell * _depth(row)

    def together(self, rows: Sequence[Row], n_tokens: int) -> float:
        return self.few * n_tokens + self.few_cell * sum(len(row.tokens) * _depth(row) for row in rows)

    def filled(self, rows: Sequence[Row]) -> float:
        return self.tile + self.tile_cell * max(map(_depth, rows))


def groups(costs: Costs | None, rows: Sequence[Row]) -> list[list[int]]:
    """Indices of the rows that go into a call each. Without costs all go into one."""
    everything = list(range(len(rows)))
    if costs is None or len(rows) == 1 or _tokens(rows) >= TILE_ROWS:
        return [everything]
    alone = [i for i in everything if len(rows[i].tokens) == 1]
    others = [i for i in everything if len(rows[i].tokens) > 1]
    apart = sum(costs.alone(rows[i]) for i in alone) + (_cost(costs, [rows[i] for i in others]) if others else 0.0)
    if apart >= _cost(costs, rows):
        return [everything]
    return [[i] for i in alone] + ([others] if others else [])


def filling(costs: Costs | None, rows: Sequence[Row]) -> int:
    """Tokens to add to a batch; 0: none."""
    n_tokens = _tokens(rows)
    if costs is None or not 1 < n_tokens < TILE_ROWS or costs.filled(rows) >= costs.together(rows, n_tokens):
        return 0
    return TILE_ROWS - n_tokens


def _cost(costs: Costs, rows: Sequence[Row]) -> float:
    n_tokens = _tokens(rows)
    return costs.alone(rows[0]) if n_tokens == 1 else min(costs.filled(rows), costs.together(rows, n_tokens))


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.tokens) for row in rows)


def _depth(row: Row) -> int:
    return row.start + len(row.tokens)

"""When a small batch is computed faster together with tokens nobody asked for.

llama.cpp's attention on the CPU takes 64 rows through all cells at once; fewer, it takes one by one, at eight times the
price for each. Measured with qwen2.5-0.5b (2 cores, AVX-512) beside 4,096 cells: 28 tokens 2.3 s, 63 tokens 5.1 s, 64
tokens 0.9 s. So a follow-up question, or a dozen streams, are worth filling up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama_cpp import llama_cpp as ll

from appliance.engine.base import EngineConfig

TILE_ROWS = 64
"""GGML_FA_TILE_Q of ggml's CPU backend, which takes this way for f16 and f32 only, K and V alike."""
ROW_COST = 92.0
"""What a multiply-add costs in attention row by row, in those of the weights: 18 us a cell against 4.5 ms a token there."""
TILE_COST = 0.13
"""What it costs 64 rows at once, as a share of that."""


@dataclass(frozen=True)
class Padding:
    cell_cost: float
    """A row's attention to one cell, row by row, over the cost of a token's weights. 0: never fill up."""

    @classmethod
    def of(cls, model: Any, config: EngineConfig) -> Padding:
        tiled = config.kv_type_k == config.kv_type_v and config.kv_type_k in ("f16", "f32") and not config.gpu_layers
        tiled = tiled and config.batch_tokens >= TILE_ROWS
        width = ll.llama_model_n_embd(model) * ll.llama_model_n_layer(model)
        return cls(ROW_COST * width / max(1, ll.llama_model_n_params(model)) if tiled else 0.0)

    def tokens(self, n_tokens: int, depth: int) -> int:
        """Tokens to add to a batch of `n_tokens` whose rows look at up to `depth` cells; 0: none."""
        missing = TILE_ROWS - n_tokens
        saved = n_tokens * depth * self.cell_cost * (1 - TILE_COST)
        added = missing * (1 + TILE_COST * depth * self.cell_cost)
        return missing if missing > 0 and saved > added else 0

"""Log-probabilities in both API shapes, from token ids and a memory of what each token spells.

Invariant: at most one entry per vocabulary token is remembered. Event loop only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from appliance.api.answers import Alternative, ScoredToken, TextLogprobs
from appliance.runtime import Chunk, Runtime
from appliance.types import TokenLogprob, Tokens

LOWEST_LOGPROB = -9999.0
"""What the OpenAI API sends for an impossible token: JSON has no -Infinity."""


@dataclass(frozen=True)
class Piece:
    text: str
    utf8: list[int] | None
    """None for a token that is only a part of a character."""


class Pieces:
    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._known: dict[int, Piece] = {}

    async def scored(self, chunk: Chunk) -> list[ScoredToken]:
        return [await self._scored(entry) for entry in chunk.logprobs]

    async def _scored(self, entry: TokenLogprob) -> ScoredToken:
        piece = await self._piece(entry.token)
        top = [(await self._piece(token), logprob) for token, logprob in entry.top]
        return ScoredToken(
            token=piece.text,
            logprob=max(entry.logprob, LOWEST_LOGPROB),
            bytes=piece.utf8,
            top_logprobs=[
                Alternative(token=p.text, logprob=max(value, LOWEST_LOGPROB), bytes=p.utf8) for p, value in top
            ],
        )

    async def _piece(self, token: int) -> Piece:
        if token not in self._known:
            text = await self._runtime.detokenize(Tokens.of((token,)))
            self._known[token] = Piece(text, None if "\ufffd" in text else list(text.encode()))
        return self._known[token]


def text_logprobs(scored: Sequence[ScoredToken], offset: int) -> TextLogprobs:
    """The shape of /v1/completions; `offset` is the position in the completion of the first token's text."""
    offsets = []
    for token in scored:
        offsets.append(offset)
        offset += len(token.token)
    return TextLogprobs(
        tokens=[token.token for token in scored],
        token_logprobs=[token.logprob for token in scored],
        top_logprobs=[{top.token: top.logprob for top in token.top_logprobs} for token in scored],
        text_offset=offsets,
    )

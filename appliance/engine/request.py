"""One request inside the engine process: what the scheduler knows of it between begin and release.

Invariant: a request is known (begin), then admitted (it has a sequence and a claim on cells), then run, then ended; it
never goes back. Threading: changed by the compute thread; `begin` creates it on the connection's thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from appliance.engine.base import Sampler
from appliance.engine.detok import TextStream
from appliance.engine.residency import Pin, Sequence
from appliance.types import SamplingParams, Tokens


@dataclass(frozen=True)
class Failed:
    """The request cannot go on; the engine can."""

    message: str


@dataclass(eq=False)
class Request:
    id: str
    ns: bytes
    prompt: Tokens
    reserve_tokens: int
    pin: Pin | None
    """Until admission."""
    sequence: Sequence | None = None
    """From admission on."""
    sampling: SamplingParams | None = None
    """From run on."""
    sampler: Sampler | None = None
    text: TextStream = field(default_factory=TextStream)
    ended: bool = False
    """Done, failed or cancelled: it computes no more, but may still be exported."""
    next_token: int | None = None
    """Sampled, not yet decoded. None while the prompt is being computed."""
    completion_tokens: int = 0
    prefilled_s: float = 0.0
    """When the prompt's KV was complete."""
    prefill_s: float = 0.0
    prefill_tokens: int = 0

    @property
    def cells(self) -> int:
        """Most positions the request can reach."""
        return len(self.prompt) + self.reserve_tokens

    @property
    def outstanding(self) -> int:
        """Cells claimed and not yet in use."""
        return 0 if self.ended or self.sequence is None else self.cells - self.sequence.length

    @property
    def running(self) -> bool:
        return self.sampling is not None and self.sequence is not None and not self.ended

    @property
    def decoding(self) -> bool:
        return self.running and self.next_token is not None

    @property
    def limit_tokens(self) -> int:
        """Most tokens of the completion. The last one needs no cell."""
        assert self.sampling is not None
        return min(self.sampling.max_tokens, self.reserve_tokens + 1)

    def end(self) -> None:
        self.ended = True
        if self.sampler:
            self.sampler.close()
            self.sampler = None

"""One request inside the engine process: what the scheduler knows of it between begin and release.

Invariant: a request is known (begin), then admitted (it has a sequence and a claim on cells), then run, then ended. A
preempted one is no longer run, a parked one no longer admitted, and both go the same way again. Threading: changed by the compute thread; `begin` creates it on the connection's thread.
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
    """With what it had generated, once it was preempted: that is computed like a prompt when it goes on."""
    reserve_tokens: int
    pin: Pin | None
    """Until admission."""
    sequence: Sequence | None = None
    """From admission on."""
    sampling: SamplingParams | None = None
    """From run on."""
    sampler: Sampler | None = None
    text: TextStream = field(default_factory=TextStream)
    preempted: bool = False
    """It was run and stopped; it is run again."""
    resumed_tokens: int = 0
    """The last of `prompt` that it had generated itself."""
    ended: bool = False
    """Done, failed or cancelled: it computes no more, but may still be exported."""
    next_token: int | None = None
    """Sampled, not yet decoded. None while the prompt is being computed."""
    completion_tokens: int = 0
    prefilled_s: float = 0.0
    """When the prompt's KV was complete."""
    prefill_s: float = 0.0
    prefill_tokens: int = 0
    computed: int = 0
    """Tokens of the prompt that the control process knows to be in cells."""

    @property
    def cells(self) -> int:
        """Most positions the request can reach."""
        return len(self.prompt) - self.resumed_tokens + self.reserve_tokens

    @property
    def outstanding(self) -> int:
        """Cells claimed and not yet in use."""
        return 0 if self.ended or self.sequence is None else self.cells - self.sequence.length

    @property
    def was_run(self) -> bool:
        """And was not stopped since."""
        return self.sampling is not None and not self.preempted

    @property
    def running(self) -> bool:
        return self.was_run and self.sequence is not None and not self.ended

    @property
    def decoding(self) -> bool:
        return self.running and self.next_token is not None

    @property
    def limit_tokens(self) -> int:
        """Most tokens of the completion. The last one needs no cell."""
        assert self.sampling is not None
        return min(self.sampling.max_tokens, self.reserve_tokens + 1)

    def preempt(self) -> None:
        """Stop, so that run() goes on with the token after the last that was sampled."""
        if self.next_token is not None:
            assert self.sequence
            generated = Tokens(bytes(self.sequence.generated)) + Tokens.of((self.next_token,))
            self.prompt += generated
            self.resumed_tokens += len(generated)
            self.next_token = None
        self.preempted = True

    def end(self) -> None:
        self.ended = True
        if self.sampler:
            self.sampler.close()
            self.sampler = None

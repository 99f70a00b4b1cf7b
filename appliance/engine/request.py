"""One request inside the engine process: what the scheduler knows of it between begin and release.

Invariant: a request is known (begin), then admitted (it has a sequence and a claim on cells), then run, then ended. A
preempted one is no longer run, a parked one no longer admitted, and both go the same way again. Threading: changed by the
compute thread; `begin` creates it on the connection's thread.
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
    refused: bool = False
    """What it asked for is to blame."""


@dataclass(eq=False)
class Request:
    id: str
    number: int
    """In the order in which requests came: the lowest is the oldest."""
    ns: bytes
    owner: bytes
    """Whose cells these are, for fair eviction."""
    prompt: Tokens
    """With what it had generated, once it was preempted: that is computed like a prompt when it goes on."""
    reserve_tokens: int
    pin: Pin | None
    """Until admission."""
    sequence: Sequence | None = None
    """From admission on."""
    claim: int = 0
    """Cells it may use: at least what it has."""
    aside: Aside | None = None
    marks: list[Sequence] = field(default_factory=list)
    """With checkpoints: where its sequence was marked, oldest first. Some may be gone."""
    sampling: SamplingParams | None = None
    """From run on."""
    sampler: Sampler | None = None
    text: TextStream = field(default_factory=TextStream)
    ended: bool = False
    """Done, failed or cancelled: it computes no more, but may still be exported."""
    preempted: bool = False
    """It was run and stopped to make room; it is run again."""
    resumed_tokens: int = 0
    """The last of `prompt` that it had generated itself."""
    next_token: int | None = None
    """Sampled, not yet decoded. None while the prompt is being computed."""
    stalled: bool = False
    """In the last step there was no cell for it."""
    completion_tokens: int = 0
    resumed_at: int = 0
    """completion_tokens when it was last parked."""
    computed: int = 0
    """Tokens of the prompt that the control process knows to be in cells."""
    prefill_to: int = 0
    """Compute the prompt up to here before it is run."""
    prefilled_s: float = 0.0
    """When the prompt's KV was complete."""
    prefill_s: float = 0.0
    prefill_tokens: int = 0

    def __post_init__(self) -> None:
        self.most_cells = len(self.prompt) + self.reserve_tokens
        """Most positions it can reach."""

    @property
    def present(self) -> int:
        return self.sequence.length if self.sequence else 0

    @property
    def outstanding(self) -> int:
        """Cells claimed and not yet in use."""
        if self.ended or self.sequence is None:
            return 0
        return self.claim - self.sequence.length - (self.aside.cells if self.aside else 0)

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
    def advancing(self) -> bool:
        """It has a token in each step: what else a step does, it waits for."""
        return self.decoding and not self.stalled

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
        self.claim = self.present
        self.preempted = True

    def end(self) -> None:
        self.ended = True
        if self.sampler:
            self.sampler.close()
            self.sampler = None


@dataclass(eq=False)
class Aside:
    """Blocks [start, stop) of a prompt that are in cells before those in front of them."""

    sequence_id: int
    start: int
    stop: int

    @property
    def cells(self) -> int:
        return self.stop - self.start

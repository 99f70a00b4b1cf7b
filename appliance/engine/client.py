"""The engine as the control process sees it: the calls of protocol.py, awaited. `proxy.py` implements it.

Threading: event loop only. Any call raises EngineDied when the engine process is gone; the proxy starts a new one by
itself, and calls made meanwhile wait for it (up to its start deadline).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from appliance.engine.base import EngineInfo
from appliance.engine.protocol import EngineStats
from appliance.types import FinishReason, SamplingParams, TokenLogprob, Tokens


@dataclass(frozen=True)
class Prefilled:
    """The prompt's KV is complete and may be exported."""

    prefill_tokens: int
    prefill_s: float


@dataclass(frozen=True)
class NewTokens:
    tokens: Tokens
    text: str
    """Whole characters only. May be empty while tokens are held back, and hold text of earlier tokens."""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Done:
    reason: FinishReason
    completion_tokens: int
    decode_s: float
    kv_tokens: int
    """Leading tokens of prompt + completion whose KV is in cells and can be exported. The last sampled token has none."""
    stop: str | None = None
    """The stop string that ended it."""


@dataclass(frozen=True)
class Computed:
    """The prompt is being computed: so many leading tokens are in cells and may be exported now."""

    tokens: int


@dataclass(frozen=True)
class Preempted:
    """The last event of a run that stopped to make room. What is in cells stays until park()."""

    kv_tokens: int
    """Leading tokens of prompt + completion whose KV is in cells and can be exported."""


Event = Computed | Prefilled | NewTokens | Preempted | Done


class EngineClient(ABC):
    info: EngineInfo
    """Valid after start()."""

    generation: int
    """Counts engine processes; a request begun in an earlier generation no longer exists."""

    pid: int | None
    """Of the running engine process."""

    @abstractmethod
    async def start(self) -> EngineInfo: ...

    @abstractmethod
    async def attach_pool(self, slot_bytes: int, slots: int) -> None:
        """Tell this and every later engine process how the inherited memfd is divided."""

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Tokens: ...

    @abstractmethod
    async def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tokens:
        """As Engine.render."""

    @abstractmethod
    async def detokenize(self, tokens: Tokens) -> str: ...

    @abstractmethod
    async def resident(self, ns: bytes, tokens: Tokens) -> int:
        """Tokens of the longest resident prefix inside `ns`. Changes nothing, not even which one goes first."""

    @abstractmethod
    async def begin(self, request: str, ns: bytes, tokens: Tokens, reserve_tokens: int, owner: bytes) -> int:
        """Tokens of the longest resident prefix inside `ns`, now pinned. Owes a release().

        `owner` names whose cells they are, opaquely: when cells are short, who holds most of them loses some first.
        """

    @abstractmethod
    async def restore(self, request: str, start: int, blocks: Sequence[tuple[int, int, int]]) -> int:
        """Put slots (slot, n_tokens, use_tokens) at [start, ...); returns tokens now present.

        start may lie below what is present (a resident prefix can end inside a block): the overlap is replaced.
        RestoreError leaves the request valid with what it had before.
        """

    @abstractmethod
    async def prefill(self, request: str, stop: int) -> int:
        """Compute the prompt up to `stop` before it is run; returns tokens now present, what was restored ahead included.

        Meanwhile restore() takes blocks whose start is `stop` or later. EngineError leaves the request valid.
        """

    @abstractmethod
    def run(self, request: str, sampling: SamplingParams) -> AsyncIterator[Event]:
        """Prefill what is missing and decode. Ends after Done or Preempted. EngineError if the request failed.

        After Preempted and park() a request is restored and run again: it goes on where it stopped.
        """

    @abstractmethod
    async def preempt(self, request: str) -> None:
        """Stop a run at the next step: Preempted follows, or Done if it ended first."""

    @abstractmethod
    async def park(self, request: str) -> None:
        """After Preempted: its sequence becomes evictable residency. The request is still known."""

    @abstractmethod
    async def export(self, request: str, blocks: Sequence[tuple[int, int, int]]) -> None:
        """Fill slots: (start, n_tokens, slot) each. Returns when all hold their blocks."""

    @abstractmethod
    async def embed(self, request: str) -> bytes:
        """The unit vector of the whole prompt, f32le. The request has cells (a restore was answered) and is not run."""

    @abstractmethod
    async def release(self, request: str) -> None: ...

    @abstractmethod
    async def cancel(self, request: str) -> None: ...

    @abstractmethod
    async def evict(self) -> int:
        """Drop every resident sequence that no request holds; returns the cells freed."""

    @abstractmethod
    async def stats(self) -> EngineStats: ...

"""What the server is built on: the runtime, the one model it serves, who may call, and the admin operations.

Invariant: everything the routes need arrives here at construction; there is no module state. Event loop only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from appliance.api.control import (
    EvictRequest,
    EvictResult,
    PinResult,
    PrefetchProgress,
    PrefetchRequest,
    PromptInspection,
    PromptRef,
    RequestList,
    SessionList,
    Status,
    StoreOverview,
    TenantAdd,
    TenantAdded,
    TenantInfo,
    TenantList,
    TenantQuota,
    VerifyProgress,
    VerifyRequest,
)
from appliance.api.trace import TraceEvent, TraceHeader
from appliance.chat.tools import ToolFormat
from appliance.prefetch import Prefetches
from appliance.runtime import Runtime
from appliance.server.metrics import Metrics


@dataclass(frozen=True)
class ServedModel:
    """The model as clients see it."""

    id: str
    created: int
    """Unix seconds."""
    vocab_tokens: int
    context_tokens: int
    default_max_tokens: int
    system_fingerprint: str
    """Changes when weights, layout or engine build change."""
    description: str
    build: str
    """Engine name and build."""
    slots: int
    """Requests that run at once."""
    tool_format: ToolFormat
    """How it writes tool calls."""
    grammars: bool
    """Whether an answer can be held to a grammar."""
    embedding_width: int
    """Numbers in an embedding; 0: it makes none."""


@dataclass(frozen=True)
class Service:
    runtime: Runtime
    prefetches: Prefetches
    model: ServedModel
    authenticate: Callable[[str], str | None]
    """API key -> tenant; None for an unknown key. Compares in constant time."""
    operator: str
    """The tenant that may see numbers of all tenants: another could tell from them what others send."""
    metrics: Metrics
    state: Callable[[], str]
    """ready | draining | engine-restarting"""
    max_body_bytes: int


class Admin(ABC):
    """The operations of the admin socket. Errors of the tree in errors.py become HTTP errors with their message."""

    @abstractmethod
    async def status(self) -> Status: ...

    @abstractmethod
    async def store(self) -> StoreOverview: ...

    @abstractmethod
    async def requests(self, call_id: str | None) -> RequestList:
        """The last ones, or those of one API call. RequestError for one that is not known any more."""

    @abstractmethod
    async def sessions(self) -> SessionList: ...

    @abstractmethod
    async def inspect(self, prompt: PromptRef) -> PromptInspection: ...

    @abstractmethod
    def prefetch(self, request: PrefetchRequest) -> AsyncGenerator[PrefetchProgress, None]:
        """The last progress has done=True. Closed early when the caller goes away."""

    @abstractmethod
    def verify(self, request: VerifyRequest) -> AsyncGenerator[VerifyProgress, None]:
        """The last progress carries the report. Closed early when the caller goes away."""

    @abstractmethod
    async def evict(self, request: EvictRequest) -> EvictResult: ...

    @abstractmethod
    def trace(self) -> AsyncGenerator[TraceHeader | TraceEvent | None, None]:
        """A header, then each request that ends; None while none does. Closed when the caller goes away."""

    @abstractmethod
    async def erase(self, prompt: PromptRef) -> EvictResult: ...

    @abstractmethod
    async def pin(self, prompt: PromptRef) -> PinResult: ...

    @abstractmethod
    async def unpin(self, prompt: PromptRef) -> PinResult: ...

    @abstractmethod
    async def tenants(self) -> TenantList: ...

    @abstractmethod
    async def add_tenant(self, request: TenantAdd) -> TenantAdded: ...

    @abstractmethod
    async def set_quota(self, asked: TenantQuota) -> TenantInfo:
        """It holds when this returns, but for what is in use."""

"""Request and response models of the admin API: a unix socket, HTTP, JSON; streams are one JSON object a line.

  GET  /v1/admin/status                     Status, or Loading until there is more to tell
  GET  /v1/admin/store                      StoreOverview
  GET  /v1/admin/requests                   RequestList, the last ones, the newest first
  GET  /v1/admin/requests/ID                RequestList, one per choice of the call
  GET  /v1/admin/sessions                   SessionList
  POST /v1/admin/inspect    PromptRef       PromptInspection
  POST /v1/admin/prefetch   PrefetchRequest lines of PrefetchProgress, the last with done=true
  POST /v1/admin/verify     VerifyRequest   lines of VerifyProgress, the last with report
  POST /v1/admin/evict      EvictRequest    EvictResult
  GET  /v1/admin/trace                      lines of api/trace.py, a header first; an empty line is a sign of life
  POST /v1/admin/erase      PromptRef       EvictResult
  POST /v1/admin/pin        PromptRef       PinResult
  POST /v1/admin/unpin      PromptRef       PinResult
  GET  /v1/admin/tenants                    TenantList
  POST /v1/admin/tenants    TenantAdd       TenantAdded
  POST /v1/admin/quota      TenantQuota     TenantInfo

These models are also what `--json` prints, so a field is never renamed lightly. Errors have the OpenAI shape.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PromptRef(Model):
    """A prompt, one way or the other, as a tenant would send it."""

    tenant: str = "default"
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    """With messages."""
    prompt: str | None = None
    cache_salt: str | None = None


class TierStatus(Model):
    tier: Literal["hbm", "dram", "nvme", "remote"]
    state: Literal["ok", "degraded", "off"]
    capacity_bytes: int
    used_bytes: int
    blocks: int
    tokens: int
    pending_blocks: int = 0
    """On their way to this tier: of nvme, the write-behind queue."""
    pending_bytes: int = 0
    pinned_blocks: int = 0
    pinned_bytes: int = 0
    pin_budget_bytes: int = 0
    """Of the lowest tier; 0 for others."""
    notes: list[str] = Field(default_factory=list)


class EngineStatus(Model):
    engine: str
    pid: int | None
    restarts: int
    model: str
    description: str
    kv_mode: Literal["rows", "opaque", "checkpoint", "none"]
    context_tokens: int
    threads: int
    """Decode, while something else wants a core."""
    quiet_threads: int
    """Decode, while nothing else does."""
    batch_threads: int
    decode_step_ms: float
    """Calibrated at start: one token at depth 0."""
    prefill_tokens_per_s: float
    """Calibrated at start, shallow depth."""
    kv_bytes_per_token: int
    weight_bytes: int
    cell_bytes: int
    sequences_resident: int
    notes: list[str]


class PrefetchTotals(Model):
    """Blocks brought into DRAM ahead of need, since start."""

    moved: int = 0
    hit: int = 0
    """In DRAM when a request came for them."""
    late: int = 0
    """Still moving then."""
    wasted: int = 0
    """Evicted or expired before any came."""


class Totals(Model):
    """Since start."""

    requests: int
    prompt_tokens: int
    cached_tokens: dict[str, int]
    """Prompt tokens that were hits, by tier."""
    computed_tokens: int
    """Prompt tokens that were misses in every tier."""
    completion_tokens: int
    staged_ahead_tokens: int = 0
    """Prompt tokens brought into DRAM while their request waited."""
    preemptions: int = 0
    """Times a request made room for others and went on later."""
    requeued_requests: int = 0
    """Times a request was asked again because the engine died."""
    prefetched: PrefetchTotals = PrefetchTotals()
    loaded_bytes: dict[str, int]
    """KV bytes restored, by tier."""
    load_bytes_per_s: dict[str, float]
    """Of the time spent loading, by tier; 0 where that takes none."""
    stored_bytes: dict[str, int]
    evicted_blocks: dict[str, int]
    quarantined_blocks: int
    integrity_failures: int
    """Records that did not verify."""
    tier_failures: int
    """Calls to a medium that failed."""


class Accuracy(Model):
    """Estimates against what happened, since start."""

    requests: int
    close: int
    """Off by no more than 25 %, or 20 ms."""
    error_s: float
    """Sum of what they were off by."""
    actual_s: float


class Estimates(Model):
    service: Accuracy
    """Load and compute of a prompt."""
    first_token: Accuracy
    """From its cells to its first token, others' work included."""


class RequestWay(Model):
    """One way to a first token, as it was estimated when the request had its cells."""

    load_to_tokens: int
    compute_first_tokens: int
    """Computed from the front while the blocks behind load; 0: nothing is."""
    load_s: float
    compute_s: float
    service_s: float
    """Load and compute, at once where they are."""
    total_s: float
    """With what other requests take meanwhile."""


class RequestRecord(Model):
    """What a request was decided to do, what that was expected to take, and what it took."""

    request: str
    tenant: str
    ended_s: float
    """Unix time."""
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    tokens: dict[str, int]
    """Of the prompt, by tier; "computed" is what no tier had, or was not loaded."""
    loaded_bytes: int
    decision: str
    """resident | nothing-stored | load | load-part | both | recompute-is-faster"""
    alternatives: dict[str, RequestWay]
    """The best of each way that was open; `decision` is one of them."""
    recompute_s: float
    """Estimated, for all that was not in hbm."""
    queue_s: float
    staged_ahead_s: float
    load_s: float
    compute_s: float
    service_s: float
    prompt_s: float
    """From its cells to its first token."""
    ttft_s: float
    generate_s: float
    paused_s: float


class RequestList(Model):
    requests: list[RequestRecord]


class Process(Model):
    """The control process."""

    state: str
    version: str
    pid: int
    uptime_s: float
    home: str
    base_url: str


class Loading(Process):
    """Status before the model is loaded."""

    state: Literal["loading"] = "loading"
    doing: str
    """The step of the start, e.g. "loading tiny"."""
    fraction: float | None
    """Of this step, 0 to 1; None when it cannot be known."""

    @property
    def progress(self) -> str:
        return self.doing if self.fraction is None else f"{self.doing} ({self.fraction:.0%})"


class Status(Process):
    state: Literal["ready", "draining", "engine-restarting"]
    running: int
    waiting: int
    waiting_tenants: int = 0
    """Whose requests they are."""
    rss_bytes: int
    """Resident memory of control and engine process, less weights, cells and pool where they can be told apart."""
    engine: EngineStatus
    tiers: list[TierStatus]
    totals: Totals
    estimates: Estimates | None = None


class TierStore(Model):
    tier: Literal["hbm", "dram", "nvme", "remote"]
    state: str
    blocks: int
    tokens: int
    used_bytes: int
    capacity_bytes: int
    oldest_s: float | None = None
    """Seconds since the least recently used block was used."""
    newest_s: float | None = None
    pinned_blocks: int = 0
    pinned_bytes: int = 0


class StoreOverview(Model):
    model: str
    kv_mode: str
    block_tokens: int
    kv_bytes_per_token: int
    tiers: list[TierStore]
    notes: list[str]


class Span(Model):
    """Prompt tokens [start, stop) and the fastest tier that holds them; "none" is what must be computed."""

    start: int
    stop: int
    tier: Literal["hbm", "dram", "nvme", "remote", "none"]


class PromptInspection(Model):
    prompt_tokens: int
    cached_tokens: int
    spans: list[Span]
    estimated_ttft_warm_s: float
    estimated_ttft_cold_s: float


class SessionInfo(Model):
    """Of the sessions that automatic prefetch looks at."""

    tenant: str
    name: str | None
    """Its prompt_cache_key; None if it was recognised by its prompts."""
    turns: int
    tokens: int
    """What its next prompt begins with."""
    idle_s: float
    """Since its last request came or ended."""
    think_s: float
    """Typical time from an answer to the next prompt."""
    chance: float
    """That the next turn comes within half a minute, as far as can be told; 0 while one runs."""
    running: int


class SessionList(Model):
    sessions: list[SessionInfo]
    """The last used first."""


class PrefetchRequest(PromptRef):
    """`messages`, `prompt` or `session`: what its next turn begins with."""

    session: str | None = None
    """A prompt_cache_key."""
    to: Literal["dram", "hbm"] = "dram"
    compute: bool = False
    """Prefill what no tier has."""


class PrefetchProgress(Model):
    prompt_tokens: int
    found: dict[str, int]
    """Tokens by tier before anything moved; "none" for what no tier had."""
    moved_tokens: int
    computed_tokens: int
    moved_bytes: int
    seconds: float
    done: bool


class VerifyRequest(Model):
    repair: bool = False


class VerifyReport(Model):
    segments: int
    records: int
    bytes_read: int
    ok: int
    bad: dict[str, int]
    """Records that do not open, by reason (torn, tag, identity, length, version); what an opening of the store found
    besides: "segment" for each one that does not verify, "unread" for each page that could not be read in a rebuild."""
    index_missing: int
    """Good records the index does not know."""
    index_dangling: int
    """Index entries without a good record."""
    repaired: int
    seconds: float

    @property
    def clean(self) -> bool:
        return not self.bad and not self.index_missing and not self.index_dangling


class VerifyProgress(Model):
    records_done: int
    records_total: int
    report: VerifyReport | None = None


class EvictRequest(Model):
    tier: Literal["hbm", "dram"]


class EvictResult(Model):
    freed: int
    """Cells (hbm), or blocks (dram, and of an erased prompt)."""


class PinResult(Model):
    prompt_tokens: int
    tokens: int
    """Of the prompt, pinned now; 0 after unpin."""
    blocks: int
    """Pinned or, by unpin, released; those that other pinned prompts share stay."""
    pinned_bytes: int
    """Of all prompts."""
    budget_bytes: int


class TenantAdd(Model):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")


class TenantAdded(Model):
    tenant: str
    api_key: str


class TenantInfo(Model):
    tenant: str
    api_keys: int
    created: str
    dram_quota_bytes: int | None = None
    nvme_quota_bytes: int | None = None


class TenantQuota(Model):
    tenant: str
    dram_bytes: int | None = Field(None, ge=0)
    """None: as it is; 0: no quota."""
    nvme_bytes: int | None = Field(None, ge=0)


class TenantList(Model):
    tenants: list[TenantInfo]

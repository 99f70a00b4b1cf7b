"""What `kvctl serve` reports: progress until it is ready, once what it serves and how to call it, and that it stops.

These are the lines of `kvctl serve --json`, one JSON object each. `build.serve` makes them, the command renders them.
"""

from __future__ import annotations

from typing import Literal

from appliance.api.control import Model, TierStatus


class StartProgress(Model):
    kind: Literal["progress"] = "progress"
    text: str
    """What is being done, e.g. "loading qwen2.5-0.5b-q8_0"."""
    fraction: float | None = None
    """Of this step, 0 to 1; None when it cannot be known."""


class StartReady(Model):
    kind: Literal["ready"] = "ready"
    pid: int
    model: str
    """API id."""
    description: str
    context_tokens: int
    base_url: str
    """With /v1, as the OpenAI client takes it."""
    client_file: str
    """Where base_url and api_key of the first tenant are."""
    tiers: list[TierStatus]
    notes: list[str]
    """What the user should know or can mend, a sentence each."""
    seconds: float


class Draining(Model):
    kind: Literal["draining"] = "draining"
    requests: int
    """Running and waiting ones."""


ServeEvent = StartProgress | StartReady | Draining

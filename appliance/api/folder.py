"""What `kvctl prefetch` says of many files with `--json`: a line for each file, then one for all of them."""

from __future__ import annotations

from typing import Literal

from appliance.api.control import Model


class FilePrefetched(Model):
    kind: Literal["file"] = "file"
    file: str
    state: Literal["done", "there", "absent", "skipped"]
    """there: it was where it should be already; absent: no tier has it, and nothing was to be computed."""
    reason: str | None = None
    """Why it was skipped."""
    prompt_tokens: int = 0
    moved_tokens: int = 0
    computed_tokens: int = 0
    seconds: float = 0.0


class FilesPrefetched(Model):
    kind: Literal["summary"] = "summary"
    files: int
    done: int
    there: int
    absent: int
    skipped: int
    prompt_tokens: int
    moved_tokens: int
    computed_tokens: int
    seconds: float
    complete: bool
    """False: it was interrupted; the same command goes on where it stopped."""

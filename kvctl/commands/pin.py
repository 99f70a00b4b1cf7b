"""kvctl pin, kvctl unpin: keep a prompt, whoever needs room."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from appliance.errors import UsageError
from kvctl import output
from kvctl.options import Home, Json, MessagesFile, PromptFile, Tenant, locate
from kvctl.prompts import prompt_of

if TYPE_CHECKING:
    from appliance.api.control import PinResult, PromptRef


def pin(
    ctx: typer.Context,
    prompt_file: PromptFile = None,
    messages: MessagesFile = None,
    tenant: Tenant = "default",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Keep a prompt, whoever needs room.

    What is stored of it stays until it is unpinned, over restarts too. Pins hold in the lowest tier, within kv.pin_budget; `kvctl prefetch --compute` reads what no tier has.
    """
    from kvctl.client import AdminClient

    with AdminClient(locate(ctx, home)) as admin:
        done = admin.pin(_prompt(prompt_file, messages, tenant))
    _print(done, f"{output.count(done.tokens)} of {output.count(done.prompt_tokens)} tokens pinned", as_json)


def unpin(
    ctx: typer.Context,
    prompt_file: PromptFile = None,
    messages: MessagesFile = None,
    tenant: Tenant = "default",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let a pinned prompt go like any other.

    What another pinned prompt shares with it stays pinned.
    """
    from kvctl.client import AdminClient

    with AdminClient(locate(ctx, home)) as admin:
        done = admin.unpin(_prompt(prompt_file, messages, tenant))
    _print(done, f"{output.count(done.blocks)} blocks unpinned", as_json)


def _prompt(prompt_file: Path | None, messages: Path | None, tenant: str) -> PromptRef:
    from appliance.api.control import PromptRef

    if prompt_file is None and messages is None:
        raise UsageError("name a prompt, with --prompt-file or --messages")
    return PromptRef(tenant=tenant, **prompt_of(prompt_file, messages))


def _print(done: PinResult, said: str, as_json: bool) -> None:
    if as_json:
        output.print_json(done)
    else:
        used = f"{output.size(done.pinned_bytes)} of {output.size(done.budget_bytes)}"
        output.stdout().print(f"{said}; all pins take {used}")

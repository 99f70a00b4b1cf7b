"""kvctl evict: forget a prompt, or empty a tier."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from appliance.errors import UsageError
from kvctl import output
from kvctl.options import Home, Json, MessagesFile, PromptFile, Tenant, locate
from kvctl.prompts import prompt_of


class Emptied(str, Enum):
    HBM = "hbm"
    DRAM = "dram"


def evict(
    ctx: typer.Context,
    prompt_file: PromptFile = None,
    messages: MessagesFile = None,
    tier: Annotated[
        Emptied | None, typer.Option("--tier", help="Empty it of all that is not in use.", show_default=False)
    ] = None,
    tenant: Tenant = "default",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Forget a prompt in every tier, or empty a tier.

    What the prompt shares with others goes too, and the engine forgets all that does not run. `kvctl inspect` with the
    same prompt shows first what would go.
    """
    from appliance.api.control import PromptRef
    from kvctl.client import AdminClient

    asked = prompt_file is not None or messages is not None
    if asked == (tier is not None):
        raise UsageError("name either a prompt, with --prompt-file or --messages, or a --tier")
    prompt = PromptRef(tenant=tenant, **prompt_of(prompt_file, messages)) if asked else None
    with AdminClient(locate(ctx, home)) as admin:
        done = admin.erase(prompt) if prompt is not None else admin.evict("hbm" if tier is Emptied.HBM else "dram")
    if as_json:
        output.print_json(done)
    else:
        unit = "cells" if tier is Emptied.HBM else "blocks"
        output.stdout().print(f"{output.count(done.freed)} {unit} forgotten")

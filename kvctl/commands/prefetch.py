"""kvctl prefetch: bring a prompt's cache up before anybody asks for it."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from kvctl import output
from kvctl.diagnostics import ApiError
from kvctl.options import Home, Json, MessagesFile, PromptFile, Tenant, locate
from kvctl.prompts import prompt_of

if TYPE_CHECKING:
    from appliance.api.control import PrefetchProgress


class Target(str, Enum):
    DRAM = "dram"
    HBM = "hbm"


def prefetch(
    ctx: typer.Context,
    prompt_file: PromptFile = None,
    messages: MessagesFile = None,
    to: Annotated[Target, typer.Option("--to", help="How far up: memory, or the engine itself.")] = Target.DRAM,
    compute: Annotated[bool, typer.Option("--compute", help="Also compute what no tier has.")] = False,
    tenant: Tenant = "default",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Bring a prompt's blocks up ahead of need."""
    from appliance.api.control import PrefetchRequest
    from kvctl.client import AdminClient

    request = PrefetchRequest(tenant=tenant, to=to.value, compute=compute, **prompt_of(prompt_file, messages))
    last: PrefetchProgress | None = None
    with AdminClient(locate(ctx, home)) as admin, output.progress(f"to {to.value}") as advance:
        for last in admin.prefetch(request):
            advance(last.moved_tokens + last.computed_tokens, _work_tokens(last, to, compute))
    if last is None or not last.done:
        raise ApiError("prefetch did not finish: the appliance stopped it")
    if as_json:
        output.print_json(last)
    else:
        _print(last)
        if last.found.get("none") and not compute:
            output.stderr().print("What no tier has is computed with --compute.", style="dim")


def _work_tokens(step: PrefetchProgress, to: Target, compute: bool) -> int:
    """Tokens that have to be moved or computed."""
    there = step.found.get("hbm", 0) + (step.found.get("dram", 0) if to is Target.DRAM else 0)
    return step.prompt_tokens - there - (0 if compute else step.found.get("none", 0))


def _print(done: PrefetchProgress) -> None:
    found = ", ".join(
        f"[{output.TIER_STYLE[tier]}]{'no tier' if tier == 'none' else tier} {output.count(n)}[/]"
        for tier, n in done.found.items()
        if n
    )
    rate = f", {output.size(done.moved_bytes / done.seconds)}/s" if done.seconds > 0 and done.moved_bytes else ""
    output.stdout().print(
        output.fields(
            [
                ("prompt", f"{output.count(done.prompt_tokens)} tokens"),
                ("was in", found),
                ("moved", f"{output.count(done.moved_tokens)} tokens, {output.size(done.moved_bytes)}{rate}"),
                ("computed", f"{output.count(done.computed_tokens)} tokens"),
                ("took", output.duration(done.seconds)),
            ]
        )
    )

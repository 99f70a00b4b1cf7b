"""kvctl inspect: what the store holds, and where the tokens of one prompt are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from appliance.errors import UsageError
from kvctl import output
from kvctl.options import Home, Json, MessagesFile, PromptFile, Tenant, locate
from kvctl.prompts import prompt_of

if TYPE_CHECKING:
    from rich.text import Text

    from appliance.api.control import PromptInspection, SessionList, StoreOverview


def inspect(
    ctx: typer.Context,
    prompt_file: PromptFile = None,
    messages: MessagesFile = None,
    sessions: Annotated[
        bool, typer.Option("--sessions", help="The sessions, and when their next turn is due.")
    ] = False,
    tenant: Tenant = "default",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show what the tiers hold, where a prompt is, or the sessions.

    With --prompt-file or --messages also the estimated TTFT, warm and cold.
    """
    from appliance.api.control import PromptRef
    from kvctl.client import AdminClient

    asked = prompt_file is not None or messages is not None
    if sessions and asked:
        raise UsageError("--sessions shows all of them; ask about a prompt without it")
    prompt = PromptRef(tenant=tenant, **prompt_of(prompt_file, messages)) if asked else None
    with AdminClient(locate(ctx, home)) as admin:
        if sessions:
            found: StoreOverview | PromptInspection | SessionList = admin.sessions()
        else:
            found = admin.store() if prompt is None else admin.inspect(prompt)
    if as_json:
        output.print_json(found)
    else:
        _print(found)


def _print(found: StoreOverview | PromptInspection | SessionList) -> None:
    from appliance.api.control import SessionList, StoreOverview

    if isinstance(found, StoreOverview):
        _print_store(found)
    elif isinstance(found, SessionList):
        _print_sessions(found)
    else:
        _print_prompt(found)


def _print_sessions(found: SessionList) -> None:
    output.stdout().print(
        output.table(
            ["session", "tenant", ">turns", ">tokens", ">idle", ">thinks", ">next soon"],
            (
                (
                    "[dim]unnamed[/]" if session.name is None else output.plain(session.name),
                    output.plain(session.tenant),
                    output.count(session.turns),
                    output.count(session.tokens),
                    output.duration(session.idle_s),
                    output.duration(session.think_s),
                    "running" if session.running else f"{session.chance:.0%}",
                )
                for session in found.sessions
            ),
        )
    )


def _print_store(store: StoreOverview) -> None:
    console = output.stdout()
    console.print(
        output.fields(
            [
                ("model", f"{output.plain(store.model)}, KV {store.kv_mode}"),
                (
                    "block",
                    f"{output.count(store.block_tokens)} tokens, {output.size(store.block_tokens * store.kv_bytes_per_token)}",
                ),
            ]
        )
    )
    console.print()
    console.print(
        output.table(
            ["tier", "state", ">blocks", ">tokens", ">used", ">of", ">newest", ">oldest"],
            (
                (
                    f"[{output.TIER_STYLE[tier.tier]}]{tier.tier}[/]",
                    tier.state,
                    output.count(tier.blocks),
                    output.count(tier.tokens),
                    output.size(tier.used_bytes),
                    output.size(tier.capacity_bytes),
                    "-" if tier.newest_s is None else output.duration(tier.newest_s),
                    "-" if tier.oldest_s is None else output.duration(tier.oldest_s),
                )
                for tier in store.tiers
            ),
        )
    )
    for tier in store.tiers:
        if tier.pinned_blocks:
            pinned = f"{output.count(tier.pinned_blocks)} blocks, {output.size(tier.pinned_bytes)}"
            console.print(f"\npinned in {tier.tier}: {pinned}")
    for note in output.notes(store.notes):
        console.print(note)


def _print_prompt(found: PromptInspection) -> None:
    console = output.stdout()
    cached = f"{output.count(found.cached_tokens)} cached ({output.share(found.cached_tokens, found.prompt_tokens)})"
    console.print(f"{output.count(found.prompt_tokens)} tokens, {cached}")
    console.print(_bar(found, min(console.width, 80) - 2))
    console.print()
    console.print(
        output.table(
            ["where", ">from", ">to", ">tokens"],
            (
                (
                    f"[{output.TIER_STYLE[span.tier]}]{'to compute' if span.tier == 'none' else span.tier}[/]",
                    output.count(span.start),
                    output.count(span.stop),
                    output.count(span.stop - span.start),
                )
                for span in found.spans
            ),
        )
    )
    console.print()
    warm, cold = found.estimated_ttft_warm_s, found.estimated_ttft_cold_s
    faster = f"  [green]{cold / warm:,.0f}x[/]" if warm > 0 and cold / warm >= 2 else ""
    console.print(f"estimated TTFT {output.duration(warm)}, cold {output.duration(cold)}{faster}")


def _bar(found: PromptInspection, width: int) -> Text:
    """The prompt from left to right, each tier in its colour; every span gets at least one cell."""
    from rich.text import Text

    bar = Text()
    for span in found.spans:
        cells = max(1, round(span.stop * width / found.prompt_tokens) - len(bar))
        bar.append(("░" if span.tier == "none" else "█") * cells, style=output.TIER_STYLE[span.tier])
    bar.truncate(width)
    return bar

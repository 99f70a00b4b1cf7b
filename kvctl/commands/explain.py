"""kvctl explain: why a request loaded or computed its prompt, what that was expected to take, and what it took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvctl import output
from kvctl.options import Home, Json, locate

if TYPE_CHECKING:
    from appliance.api.control import RequestList, RequestRecord

WIDE = 104
"""Columns of a terminal that has room for estimates beside whole ids."""
REASONS = {
    "resident": "the prompt was in the engine's cells already",
    "nothing-stored": "no tier had more of the prompt",
    "load": "to load all that was stored was cheapest",
    "load-part": "to load a part and compute the rest was cheapest",
    "both": "to compute the front while the back was loaded was cheapest",
    "recompute-is-faster": "to compute was cheaper than to load",
}
WAYS = {
    "resident": "compute the last token",
    "nothing-stored": "compute",
    "load": "load all",
    "load-part": "load a part",
    "both": "from both ends",
    "recompute-is-faster": "compute",
}


def explain(
    ctx: typer.Context,
    request: Annotated[
        str | None,
        typer.Argument(help="The id of an answer: chatcmpl-..., msg_..., resp_...; without it, the last requests."),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show why a request loaded or computed, and how long it took."""
    from kvctl.client import AdminClient

    with AdminClient(locate(ctx, home)) as admin:
        found = admin.requests(request)
    if as_json:
        output.print_json(found)
    elif request is None:
        _print_list(found)
    else:
        for record in found.requests:
            _print(record)


def _print_list(found: RequestList) -> None:
    if not found.requests:
        output.stderr().print("No request has ended yet.", style="dim")
        return
    console = output.stdout()
    columns = ["request", "decision", ">prompt", ">cached", ">TTFT", ">took", ">estimated"]
    shown = len(columns) if console.width >= WIDE else columns.index(">TTFT") + 1
    grid = output.table(
        columns[:shown],
        (
            (
                output.plain(record.request),
                record.decision,
                output.count(record.prompt_tokens),
                output.count(record.prompt_tokens - record.tokens["computed"]),
                output.duration(record.ttft_s),
                output.duration(record.prompt_s),
                output.duration(record.alternatives[record.decision].total_s),
            )[:shown]
            for record in found.requests
        ),
    )
    grid.columns[0].no_wrap = True  # to be copied
    console.print(grid)


def _print(record: RequestRecord) -> None:
    console = output.stdout()
    console.print(f"{output.plain(record.request)}: {REASONS[record.decision]}", soft_wrap=True)
    for sentence in sentences(record):
        console.print(sentence, soft_wrap=True)
    console.print()
    console.print(
        output.table(
            ["way", ">load to", ">load", ">compute", ">with others"],
            (
                (
                    f"[green]{WAYS[reason]}[/]" if reason == record.decision else WAYS[reason],
                    output.count(way.load_to_tokens),
                    output.duration(way.load_s),
                    output.duration(way.compute_s),
                    output.duration(way.total_s),
                )
                for reason, way in record.alternatives.items()
            ),
        )
    )


def sentences(record: RequestRecord) -> list[str]:
    """In words: where the prompt came from, what it took, and what the client waited for."""
    way = record.alternatives[record.decision]
    duration, count = output.duration, output.count
    total = count(record.prompt_tokens)
    loaded = [f"{count(n)} from {tier}" for tier, n in record.tokens.items() if n and tier not in ("hbm", "computed")]
    lines = []
    if record.tokens["hbm"]:
        lines.append(f"{count(record.tokens['hbm'])} of {total} tokens were in hbm.")
    if loaded:
        seconds = f"{duration(record.load_s)} (est. {duration(way.load_s)})"
        lines.append(f"{', '.join(loaded)} of {total} tokens came in {seconds}, {output.size(record.loaded_bytes)}.")
    computed = f"{duration(record.compute_s)} (est. {duration(way.compute_s)})"
    n_computed = record.tokens["computed"]
    lines.append(f"{count(n_computed)} {'token was' if n_computed == 1 else 'tokens were'} computed in {computed}.")
    if loaded:
        lines.append(f"Recomputing would have cost {duration(record.recompute_s)}.")
    waits = [
        f"{duration(seconds)} {what}"
        for seconds, what in ((record.queue_s, "in the queue"), (record.paused_s, "preempted"))
        if seconds >= 0.001
    ]
    waited = f", of it {', '.join(waits)}" if waits else ""
    lines.append(f"First token after {duration(record.ttft_s)}{waited}.")
    return lines

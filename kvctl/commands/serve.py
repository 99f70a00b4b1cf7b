"""kvctl serve: the appliance in the foreground, from its profile to its last flushed block.

Invariant: without --json stdout stays empty; with it, each event of the start is one line there.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.errors import UsageError
from kvctl import output
from kvctl.diagnostics import say
from kvctl.options import Home, Json, ModelName, ProfileName, locate

if TYPE_CHECKING:
    from rich.console import RenderableType

    from appliance.api.serve import ServeEvent, StartReady

NO_MODEL = """no model yet. With a file you have: kvctl serve --model FILE.gguf
       or download one:               kvctl model pull REPO FILE
       or try it with random weights: kvctl serve --synth"""


def serve(
    ctx: typer.Context,
    model: ModelName = None,
    synth: Annotated[bool, typer.Option("--synth", help="Serve random weights: no model needed.")] = False,
    profile: ProfileName = "default",
    host: Annotated[
        str | None,
        typer.Option("--host", metavar="ADDRESS", help="Where to listen; 127.0.0.1 if not said.", show_default=False),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, metavar="N", help="Port; 0 picks a free one.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Change one key of the profile; may be repeated.",
            show_default=False,
        ),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Serve a model over the OpenAI API until Ctrl-C or SIGTERM."""
    from appliance.config import load_profile

    overrides = list(set_ or ())
    if host is not None:
        overrides.append(f"server.host={host}")
    if port is not None:
        overrides.append(f"server.port={port}")
    settings = load_profile(profile, overrides)
    if synth and model:
        raise UsageError("--model and --synth exclude each other")
    chosen = None if synth else model or settings.model.path or None
    if chosen is None and not synth and settings.engine.kind != "null":
        raise UsageError(NO_MODEL)

    from appliance.build import ServeOptions
    from appliance.build import serve as run

    with ServeReport(as_json) as report:
        code = run(ServeOptions(home=locate(ctx, home), profile=settings, model=chosen, synth=synth, report=report))
    raise typer.Exit(code)


class ServeReport:
    """Renders what `serve` reports: lines of JSON, or steps and then the start panel on stderr."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._showing = ExitStack()
        self._say: output.Steps | None = None

    def __enter__(self) -> ServeReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._showing.close()

    def __call__(self, event: ServeEvent) -> None:
        if event.kind == "draining":
            noun = "request" if event.requests == 1 else "requests"
            say(f"draining: {event.requests} {noun} running; again to stop at once" if event.requests else "stopping")
        elif self._as_json:
            output.print_json(event, line=True)
        elif event.kind == "ready":
            self._showing.close()
            output.stderr().print(_panel(event))
        else:
            self._say = self._say or self._showing.enter_context(output.steps())
            self._say(event.text, event.fraction)


def _panel(ready: StartReady) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel

    call = [
        ("address", f"[bold]{output.plain(ready.base_url)}[/]"),
        ("API key", f"in {output.plain(ready.client_file)}"),
        ("model", f"[bold]{output.plain(ready.model)}[/]  [dim]{output.plain(ready.description)}[/]"),
        ("context", f"{output.count(ready.context_tokens)} tokens"),
    ]
    tiers = output.table(
        ["tier", ">size", ">used", ">blocks", "state"],
        (
            (
                f"[{output.TIER_STYLE[tier.tier]}]{tier.tier}[/]",
                output.size(tier.capacity_bytes),
                output.size(tier.used_bytes),
                output.count(tier.blocks),
                tier.state if tier.state == "ok" else f"[yellow]{tier.state}[/]",
            )
            for tier in ready.tiers
        ),
    )
    try_it = output.fields([("talk", 'kvctl chat "Hello"'), ("watch", "kvctl status"), ("stop", "Ctrl-C")])
    parts: list[RenderableType] = [output.fields(call), "", tiers, *output.notes(ready.notes), "", try_it]
    title = f"[green]ready[/] in {output.duration(ready.seconds)}, pid {ready.pid}"
    return Panel(
        Group(*parts), title=title, title_align="left", border_style="dim", width=min(80, output.stderr().width)
    )

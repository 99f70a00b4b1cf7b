"""kvctl serve: the appliance in the foreground, from its profile to its last flushed block.

Invariant: without --json stdout stays empty; with it, each start event is one line there.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.errors import UsageError
from kvctl import output
from kvctl.options import Home, Json, ProfileName, locate

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.status import Status

    from appliance.api.start import StartEvent, StartReady

NO_MODEL = """no model yet. Three ways to get one:
  kvctl serve --model FILE.gguf               a model file you have
  kvctl model pull REPO FILE                  download one, then: kvctl serve --model NAME
  kvctl serve --synth                         random weights, to try the machinery"""


def serve(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="NAME|PATH", help="A GGUF file or a name from `kvctl model list`.", show_default=False
        ),
    ] = None,
    synth: Annotated[bool, typer.Option("--synth", help="Serve random weights: no model needed.")] = False,
    profile: ProfileName = "default",
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on.", show_default=False)] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, metavar="N", help="Port; 0 picks a free one.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key of the profile.", show_default=False),
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

    with StartReport(as_json) as report:
        code = run(ServeOptions(home=locate(ctx, home), profile=settings, model=chosen, synth=synth, report=report))
    raise typer.Exit(code)


class StartReport:
    """Renders start events as they come: lines of JSON, or a spinner and then the start panel on stderr."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._console = output.stderr()
        self._spinner: Status | None = None
        self._said = ""

    def __enter__(self) -> StartReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_spinner()

    def __call__(self, event: StartEvent) -> None:
        if self._as_json:
            output.print_json(event, line=True)
        elif event.kind == "ready":
            self._stop_spinner()
            self._console.print(_panel(event))
        else:
            self._progress(output.plain(event.text), event.fraction)

    def _progress(self, text: str, fraction: float | None) -> None:
        if not self._console.is_terminal:
            if text != self._said:  # a log wants each step once, not each percent
                self._console.print(text)
                self._said = text
            return
        line = text if fraction is None else f"{text} {fraction:.0%}"
        if self._spinner is None:
            self._spinner = self._console.status(line)
            self._spinner.start()
        else:
            self._spinner.update(line)

    def _stop_spinner(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None


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

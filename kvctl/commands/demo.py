"""kvctl demo: the main promise, shown in a minute."""

from __future__ import annotations

import sys
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING

import typer

from kvctl import output
from kvctl.options import Home, Json, locate

if TYPE_CHECKING:
    from kvctl.bench.demo import DemoReport


def demo(ctx: typer.Context, home: Home = None, as_json: Json = False) -> None:
    """Read a document, kill the appliance, and ask about it again.

    Makes a throw-away home and random weights in the shape of qwen2.5-0.5b, so it needs no model and no network.
    """
    from appliance.ops import synth
    from kvctl.bench import demo as bench

    where = locate(ctx, home)
    with output.steps() as say:
        path = synth.default_model(where, lambda done: say("writing random weights in the shape of qwen2.5-0.5b", done))
        report = bench.run(where, path, say)
    report.plot = _draw(report, where / "demo.png")
    if as_json:
        output.print_json(report)
    else:
        _print(report, path)


def _draw(report: DemoReport, path: Path) -> str | None:
    from appliance.errors import KvctlError
    from kvctl.bench.plot import save

    bars = [(step.tier, step.ttft_s) for step in report.steps]
    try:
        save(path, f"Time to first token, {report.model}", [(f"{report.steps[0].prompt_tokens:,} tokens", bars)])
    except KvctlError as error:
        output.stderr().print(output.plain(error), style="yellow")
        return None
    return str(path)


def _print(report: DemoReport, model: Path) -> None:
    console = output.stdout()
    rows = [
        (
            f"[{output.TIER_STYLE.get(step.tier, 'dim')}]{step.tier}[/]",
            step.what,
            output.duration(step.ttft_s),
            f"{output.count(step.cached_tokens)} / {output.count(step.prompt_tokens)}",
            output.ratio(step.speedup),
        )
        for step in report.steps
    ]
    console.print(output.table(["from", "request", ">TTFT", ">known tokens", ">speed-up"], rows))
    same = len({step.text for step in report.steps[1:]}) == 1
    talk = output.stderr()
    talk.print(
        "\nThe second question got the same answer from every tier." if same else "\n[red]The answers differ.[/]",
        "The weights are random, so it is noise: what counts here is the time.",
    )
    if report.plot:
        talk.print(f"Drawn in {output.plain(report.plot)}")
    activate = "" if which("kvctl") else f"  . {output.plain(Path(sys.prefix) / 'bin' / 'activate')}\n"
    talk.print(
        f"\nWith your own model:\n{activate}"
        "  kvctl init\n"
        "  kvctl serve --model FILE.gguf        and in another terminal: kvctl chat\n"
        "  kvctl bench ttft --model FILE.gguf   these times, measured with it"
    )
    talk.print(f"The random weights stay in {output.plain(model)}, for kvctl serve --synth", style="dim")

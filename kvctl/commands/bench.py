"""kvctl bench: measure this box, in throw-away homes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.errors import UsageError
from kvctl import output
from kvctl.options import Home, Json, ProfileName, locate

if TYPE_CHECKING:
    from kvctl.bench.ttft import TtftReport

app = typer.Typer(help="Measure this box, in throw-away homes.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Without this a single command would take the group's place."""


@app.command()
def ttft(
    ctx: typer.Context,
    contexts: Annotated[
        str, typer.Option("--contexts", metavar="N,N,...", help="Prompt lengths in tokens.")
    ] = "2048,8192",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME|PATH",
            help="Default: random weights in the shape of qwen2.5-0.5b.",
            show_default=False,
        ),
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Warm requests per tier; medians are shown.")] = 3,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw it.", show_default=False)
    ] = None,
    profile: ProfileName = "default",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key of the profile.", show_default=False),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Time to first token: cold, then warm from hbm, dram and, after a SIGKILL, nvme.

    The throw-away home is made inside the home, so that its disk is the one that is measured.
    """
    from appliance.ops import models, synth
    from kvctl.bench import ttft as bench

    where = locate(ctx, home)
    lengths = _lengths(contexts)
    with output.steps() as say:
        path = (
            models.resolve(where, model)
            if model
            else synth.default_model(where, lambda done: say("writing random weights", done))
        )
        options = bench.Options(
            model=path,
            contexts=lengths,
            repeat=repeat,
            folder=where,
            profile=profile,
            overrides=tuple(set_ or ()),
            say=say,
        )
        report = bench.run(options)
    if plot:
        from kvctl.bench.plot import save

        groups = [
            (f"{context.prompt_tokens:,} tokens", [(each.tier, each.ttft_s) for each in context.measured])
            for context in report.contexts
        ]
        save(plot, f"Time to first token, {report.model}", groups)
    if as_json:
        output.print_json(report)
    else:
        _print(report)
        if plot:
            output.stderr().print(f"drawn in {plot}")


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        lengths = ()
    if not lengths or lengths[0] < 16:
        raise UsageError(f'--contexts "{text}": write token counts of at least 16, e.g. --contexts 2048,8192')
    return lengths


def _print(report: TtftReport) -> None:
    console = output.stdout()
    for context in report.contexts:
        rows = [
            (
                f"[{output.TIER_STYLE.get(each.tier, 'dim')}]{each.tier}[/]",
                output.duration(each.ttft_s),
                output.ratio(each.speedup),
                output.count(each.cached_tokens),
                output.size(each.restored_bytes) if each.restored_bytes else "-",
                f"{each.restored_bytes_per_s / 1e9:.2f}" if each.restored_bytes_per_s else "-",
                f"{each.over_floor:.2f}" if each.tier != "cold" else "-",
                "same" if each.same_completion else "[red]other[/]",
            )
            for each in context.measured
        ]
        console.print(f"\n{report.model}, {output.count(context.prompt_tokens)} tokens")
        columns = ["tier", ">TTFT", ">speed-up", ">cached", ">restored", ">GB/s", ">over floor", "tokens"]
        console.print(output.table(columns, rows))
        device, step = context.device_read_bytes_per_s / 1e9, output.duration(context.decode_step_s)
        nvme = next(each for each in context.measured if each.tier == "nvme")
        share = output.share(nvme.restored_bytes_per_s, context.device_read_bytes_per_s)
        console.print(
            f"device reads {device:.2f} GB/s past the page cache, restore reached {share}; a decode step takes {step}",
            style="dim",
        )

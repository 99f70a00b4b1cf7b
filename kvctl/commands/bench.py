"""kvctl bench: measure this box, in throw-away homes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.errors import UsageError
from kvctl import output
from kvctl.options import Home, Json, ProfileName, locate

if TYPE_CHECKING:
    from kvctl.bench.sessions import SessionsReport
    from kvctl.bench.ttft import TtftReport

SYSTEM_TOKENS = 512
"""Of the prompt that all sessions of a bench share."""

app = typer.Typer(help="Measure this box, in throw-away homes.", no_args_is_help=True)


ModelName = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME|PATH", help="Default: random weights in the shape of qwen2.5-0.5b.", show_default=False
    ),
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw it.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key of the profile.", show_default=False),
]


@app.command()
def ttft(
    ctx: typer.Context,
    contexts: Annotated[
        str, typer.Option("--contexts", metavar="N,N,...", help="Prompt lengths in tokens.")
    ] = "2048,8192",
    model: ModelName = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Warm requests per tier; medians are shown.")] = 3,
    plot: Plot = None,
    profile: ProfileName = "default",
    set_: Set = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Time to first token: cold, then warm from hbm, dram and, after a SIGKILL, nvme.

    The throw-away home is made inside the home, so that its disk is the one that is measured.
    """
    from kvctl.bench import ttft as bench

    where = locate(ctx, home)
    lengths = _lengths(contexts)
    _check_plot(plot)
    with output.steps() as say:
        path = _model(where, model, say)
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


@app.command()
def sessions(
    ctx: typer.Context,
    count: Annotated[int, typer.Option("--sessions", min=1, help="Conversations, each about its own document.")] = 12,
    turns: Annotated[int, typer.Option("--turns", min=2, help="Questions of each.")] = 5,
    documents: Annotated[
        str, typer.Option("--documents", metavar="MIN,MAX", help="Tokens of the shortest and the longest document.")
    ] = "2048,6144",
    answer: Annotated[int, typer.Option("--answer", min=2, help="Tokens of an answer.")] = 24,
    think: Annotated[
        str, typer.Option("--think", metavar="TIME", help="Mean pause between an answer and the next question.")
    ] = "2s",
    seed: Annotated[int, typer.Option("--seed", help="Another seed, other documents, questions and pauses.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="With the tiny model: minutes instead of an hour.")] = False,
    model: ModelName = None,
    plot: Plot = None,
    profile: ProfileName = "laptop-cpu",
    set_: Set = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Many users, long contexts: requests per hour and TTFT with the tiers, without, and without any reuse.

    The conversations together are four times as large as the engine's cells and twice as large as the DRAM pool.
    """
    from appliance.config import parse_time
    from kvctl.bench import sessions as bench
    from kvctl.bench.workload import Workload

    where = locate(ctx, home)
    bounds = _lengths(documents, "--documents", "2048,6144", most=2)
    _check_plot(plot)
    try:
        think_s = parse_time(think)
    except ValueError as error:
        raise UsageError(f"--think: {error}") from None
    workload = Workload(count, turns, (bounds[0], bounds[-1]), SYSTEM_TOKENS, answer, think_s, seed)
    with output.steps() as say:
        path = _model(where, model, say, "tiny" if quick else None)
        report = bench.run(bench.Options(path, workload, where, profile, tuple(set_ or ()), say))
    if plot:
        from kvctl.bench.plot import save_sessions

        title = f"{report.sessions} sessions of {report.turns} turns, {report.model}"
        curves = [(run.name, [asked.ttft_s for asked in run.requests if asked.turn]) for run in report.runs]
        save_sessions(plot, title, curves, [(run.name, run.requests_per_hour) for run in report.runs])
    if as_json:
        output.print_json(report)
    else:
        _print_sessions(report)
        if plot:
            output.stderr().print(f"drawn in {plot}")


def _model(where: Path, model: str | None, say: output.Steps, preset: str | None = None) -> Path:
    from appliance.ops import models, synth

    def progress(done: float) -> None:
        say("writing random weights", done)

    if model:
        return models.resolve(where, model)
    if preset:
        path = where / "models" / f"{preset}.gguf"
        return path if path.exists() else synth.synth(preset, path, on_progress=progress)
    return synth.default_model(where, progress)


def _print_sessions(report: SessionsReport) -> None:
    console = output.stdout()
    baseline = report.runs[1]
    console.print(
        f"{report.model}: {report.sessions} sessions of {report.turns} turns, {output.count(report.total_tokens)} tokens together;"
        f" {output.count(report.cells)} cells, pool for {output.count(report.pool_tokens)} tokens"
    )
    rows = [
        (
            run.name,
            f"{run.requests_per_hour:,.0f}",
            output.ratio(run.requests_per_hour / baseline.requests_per_hour),
            output.duration(run.first_ttft_p50_s),
            output.duration(run.later_ttft_p50_s),
            output.duration(run.later_ttft_p95_s),
            output.duration(run.tpot_p50_s),
            f"{run.tpot_p95_s / run.tpot_p50_s:.2f}" if run.tpot_p50_s else "-",
            f"{run.cached_share:.3f}",
        )
        for run in report.runs
    ]
    columns = ["", ">req/h", ">", ">TTFT 1st", ">p50 later", ">p95", ">TPOT p50", ">p95/p50", ">of infinite"]
    console.print(output.table(columns, rows))
    console.print(
        f"{report.differing} answers differ from those without reuse, {report.differing_beyond_rounding} of them beyond the"
        " rounding of another batch",
        style="dim",
    )


def _check_plot(plot: Path | None) -> None:
    from kvctl.bench.plot import check

    if plot:
        check(plot)


def _lengths(
    text: str, option: str = "--contexts", example: str = "2048,8192", most: int | None = None
) -> tuple[int, ...]:
    try:
        lengths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        lengths = ()
    if not lengths or lengths[0] < 16 or (most is not None and len(lengths) > most):
        counts = "token counts" if most is None else f"{most} token counts"
        raise UsageError(f'{option} "{text}": write {counts} of at least 16, e.g. {option} {example}')
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

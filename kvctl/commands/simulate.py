"""kvctl simulate: replay a recorded trace against other sizes and policies."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.errors import UsageError
from kvctl import output
from kvctl.options import Json

if TYPE_CHECKING:
    from appliance.api.trace import Replayed


def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="Made by `kvctl trace record`.")],
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", help="Of eviction; again for one more. Default: all.", show_default=False),
    ] = None,
    dram: Annotated[
        list[str] | None,
        typer.Option(
            "--dram", metavar="SIZE", help="Of the pool; again to compare.  [default: 1GiB]", show_default=False
        ),
    ] = None,
    nvme: Annotated[
        list[str] | None,
        typer.Option(
            "--nvme", metavar="SIZE", help="Of the disk; again to compare.  [default: 16GiB]", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay a trace against other sizes and eviction policies.

    Every combination of the sizes and policies given is replayed in one pass over the trace.
    """
    from appliance.ops import simulate as ops

    names = policy or sorted(ops.POLICIES)
    if unknown := [name for name in names if name not in ops.POLICIES]:
        raise UsageError(f'no policy "{unknown[0]}"; there are: {", ".join(sorted(ops.POLICIES))}')
    sizes = [(_size("--dram", d), _size("--nvme", n)) for d, n in product(dram or ["1GiB"], nvme or ["16GiB"])]
    header, events = ops.read(trace)
    runs = [ops.Simulation(header, name, dram_bytes=d, nvme_bytes=n) for (d, n), name in product(sizes, names)]
    with output.steps() as say:
        for number, event in enumerate(events):
            if number % 1000 == 0:
                say(f"replaying, request {number:,}")
            for run in runs:
                run.replay(event)
    results = [run.result() for run in runs]
    if as_json:
        output.print_json({"runs": [result.model_dump(mode="json") for result in results]})
    else:
        _print(results)


def _size(option: str, text: str) -> int:
    from appliance.config import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None


def _print(results: list[Replayed]) -> None:
    console = output.stdout()
    rows = [
        (
            result.policy,
            output.size(result.dram_bytes),
            output.size(result.nvme_bytes),
            output.share(result.dram_blocks, result.prompt_blocks),
            output.share(result.nvme_blocks, result.prompt_blocks),
            f"{result.reusable_share:.3f}",
            output.duration(result.compute_s),
            output.duration(result.load_s),
            output.duration(result.saved_s),
        )
        for result in results
    ]
    columns = ["policy", ">dram", ">nvme", ">in dram", ">in nvme", ">of unbounded", ">computing", ">loading", ">saved"]
    console.print(output.table(columns, rows))
    first = results[0]
    console.print(
        f"{output.count(first.requests)} requests, {output.count(first.prompt_blocks)} blocks of prompts", style="dim"
    )

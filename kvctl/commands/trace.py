"""kvctl trace: what requests ask of the cache, recorded without content."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from appliance.errors import UsageError
from kvctl import output
from kvctl.options import Home, Json, locate

app = typer.Typer(help="Record what requests ask of the cache, for kvctl simulate.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Without this a single command would take the group's place."""


@app.command()
def record(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Written anew; JSON lines.")],
    how_long: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="Else until Ctrl-C.", show_default=False)
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Record until Ctrl-C, or for so long. A trace holds times, sizes and equality of prefixes, and no content.

    Requests appear when they end. The file is complete at every moment.
    """
    from kvctl.client import AdminClient

    until_s = time.monotonic() + _seconds(how_long) if how_long else None
    written = 0
    with output.steps() as say, AdminClient(locate(ctx, home)) as admin, file.open("w", encoding="utf-8") as out:
        try:
            for line in admin.trace():
                if line is not None:
                    out.write(line.model_dump_json() + "\n")
                    out.flush()
                    written += 1
                    say(f"{max(0, written - 1):,} requests recorded; Ctrl-C ends it")
                if until_s is not None and time.monotonic() >= until_s:
                    break
        except KeyboardInterrupt:
            pass
    if as_json:
        output.print_json({"file": str(file), "requests": max(0, written - 1)})
    else:
        output.stderr().print(f"{max(0, written - 1):,} requests in {output.plain(file)}")


def _seconds(text: str) -> float:
    from appliance.config import parse_time

    try:
        return parse_time(text)
    except ValueError as error:
        raise UsageError(f"--for: {error}") from None

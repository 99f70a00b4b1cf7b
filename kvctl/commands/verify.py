"""kvctl verify: open every record at rest and cross-check index and segments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.errors import NotRunning
from kvctl import output
from kvctl.diagnostics import ApiError, ExitCode
from kvctl.options import Home, Json, ProfileName, locate

if TYPE_CHECKING:
    from appliance.api.control import VerifyProgress, VerifyReport


def verify(
    ctx: typer.Context,
    repair: Annotated[bool, typer.Option("--repair", help="Drop what is bad and index what was lost.")] = False,
    profile: ProfileName = "default",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Open every record and cross-check the index.

    Works whether the appliance runs or not; of a stopped one it reads the store that was served last, and without
    --repair changes nothing in it. Exit code 9 tells of damage that is still there.
    """
    report = _follow(_start(locate(ctx, home), profile, repair))
    if as_json:
        output.print_json(report)
    else:
        _print(report, repair)
    if not report.clean and not repair:
        raise typer.Exit(ExitCode.DAMAGE)


def _start(home: Path, profile: str, repair: bool) -> Iterator[VerifyProgress]:
    from appliance.api.control import VerifyRequest
    from kvctl.client import AdminClient

    try:
        with AdminClient(home) as admin:
            yield from admin.verify(VerifyRequest(repair=repair))
    except NotRunning:
        from appliance.config import load_profile
        from appliance.ops.verify import verify as offline

        yield from offline(home, load_profile(profile), repair=repair)


def _follow(steps: Iterator[VerifyProgress]) -> VerifyReport:
    with output.progress("verifying") as advance:
        for step in steps:
            advance(step.records_done, step.records_total)
            if step.report is not None:
                return step.report
    raise ApiError("verify ended without a report; look at the log of the appliance")


def _index(report: VerifyReport) -> str:
    if not (report.index_missing or report.index_dangling):
        return "complete"
    missing, dangling = output.count(report.index_missing), output.count(report.index_dangling)
    return f"{missing} records it did not name, {dangling} names without a record"


def _print(report: VerifyReport, repair: bool) -> None:
    from rich.text import Text

    rate = report.bytes_read / report.seconds if report.seconds > 0 else 0.0
    bad = ", ".join(f"{output.count(n)} {reason}" for reason, n in sorted(report.bad.items()))
    if report.clean:
        verdict = Text("clean", style="green")
    else:
        verdict = Text(
            "repaired" if repair else "damaged: kvctl verify --repair drops what is bad",
            style="yellow" if repair else "red",
        )
    console = output.stdout()
    console.print(
        output.fields(
            [
                ("records", f"{output.count(report.ok)}/{output.count(report.records)} open and verify"),
                (
                    "read",
                    f"{output.size(report.bytes_read)} in {output.count(report.segments)} segments, {output.size(rate)}/s",
                ),
                ("bad", bad or "none"),
                ("index", _index(report)),
                *([("repaired", output.count(report.repaired))] if repair else []),
            ]
        )
    )
    console.print(verdict)

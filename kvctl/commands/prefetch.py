"""kvctl prefetch: bring prompts up before anybody asks for them: a session, single files, folders of documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appliance.errors import UsageError
from kvctl import output
from kvctl.diagnostics import ApiError, SomeSkipped
from kvctl.options import Home, Json, Tenant, locate
from kvctl.prompts import read_chat, read_text

if TYPE_CHECKING:
    from appliance.api.control import PrefetchProgress, PrefetchRequest
    from appliance.api.folder import FilePrefetched, FilesPrefetched
    from kvctl.bulk import Item
    from kvctl.client import AdminClient


class Target(str, Enum):
    DRAM = "dram"
    HBM = "hbm"


def prefetch(
    ctx: typer.Context,
    session: Annotated[
        str | None,
        typer.Option("--session", metavar="ID", help="The next turn of this prompt_cache_key.", show_default=False),
    ] = None,
    messages: Annotated[
        list[Path] | None,
        typer.Option("--messages", metavar="FILE", help="Chat messages as JSON; may be repeated.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option("--prompt-file", metavar="FILE", help="A plain prompt; may be repeated.", show_default=False),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Every document below DIR, as a user message.", show_default=False),
    ] = None,
    glob: Annotated[str, typer.Option("--glob", metavar="PATTERN", help="With --dir: only files like this.")] = "*",
    system: Annotated[
        Path | None,
        typer.Option(
            "--system", metavar="FILE", help="With --dir: the system message before each.", show_default=False
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="With --dir: plain prompts, without a chat's framing.")] = False,
    to: Annotated[Target, typer.Option("--to", help="How far up: memory, or the engine itself.")] = Target.DRAM,
    compute: Annotated[bool, typer.Option("--compute", help="Also compute what no tier has.")] = False,
    tenant: Tenant = "default",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Bring prompts up ahead of need: a session, files, a folder.

    Stop it whenever you like: the same command goes on where it stopped. Files that are no text, or too long, are named
    and skipped; the exit code is 11 then.
    """
    from appliance.api.control import PrefetchRequest
    from kvctl.client import AdminClient

    files, chats = prompt_file or [], messages or []
    if [session is not None, bool(files or chats), folder is not None].count(True) != 1:
        raise UsageError("name one thing to bring up: --session ID, --messages FILE, --prompt-file FILE or --dir DIR")
    if folder is None and (system is not None or raw or glob != "*"):
        raise UsageError("--glob, --system and --raw go with --dir")
    if raw and system is not None:
        raise UsageError("--raw prompts have no system message; leave --system or --raw out")

    def request(**prompt: Any) -> PrefetchRequest:
        return PrefetchRequest(tenant=tenant, to=to.value, compute=compute, **prompt)

    place = locate(ctx, home)
    if folder is not None:
        items = _documents(folder, glob, None if system is None else read_text(system), raw, request)
    else:
        items = _files(files, chats, request)
    with AdminClient(place) as admin:
        if folder is not None or len(items) > 1:
            _many(admin, items, as_json)
        else:
            asked = request(session=session) if session is not None else items[0].request()
            _one(admin.prefetch(asked), to, compute, as_json)


def _documents(
    folder: Path, glob: str, system: str | None, raw: bool, request: Callable[..., PrefetchRequest]
) -> list[Item]:
    from kvctl.bulk import Item
    from kvctl.documents import Document, documents

    first = [] if system is None else [{"role": "system", "content": system}]

    def made(document: Document) -> PrefetchRequest:
        text = document.text()
        return request(prompt=text) if raw else request(messages=[*first, {"role": "user", "content": text}])

    return [Item(each.path, each.nbytes, lambda each=each: made(each)) for each in documents(folder, glob)]  # type: ignore[misc]


def _files(files: list[Path], chats: list[Path], request: Callable[..., PrefetchRequest]) -> list[Item]:
    """All of them are read before anything is done: what was typed must be right."""
    from kvctl.bulk import Item

    asked = [(path, request(prompt=read_text(path))) for path in files]
    asked += [(path, request(**read_chat(path))) for path in chats]
    return [Item(path, path.stat().st_size, lambda each=each: each) for path, each in asked]  # type: ignore[misc]


def _many(admin: AdminClient, items: list[Item], as_json: bool) -> None:
    from kvctl.bulk import Bulk

    def report(file: FilePrefetched) -> None:
        if as_json:
            output.print_json(file, line=True)

    bulk = Bulk(items, report)
    try:
        bulk.run(admin)
    finally:
        summary = bulk.summary()
        if as_json:
            output.print_json(summary, line=True)
        elif summary.complete:
            _print_summary(summary)
    if summary.skipped:
        raise SomeSkipped(f"{summary.skipped} of {summary.files} files were skipped")


def _print_summary(summary: FilesPrefetched) -> None:
    parts = [f"{output.count(summary.done)} brought up", f"{output.count(summary.there)} were there already"]
    if summary.absent:
        parts.append(f"{output.count(summary.absent)} in no tier: they are computed with --compute")
    if summary.skipped:
        parts.append(f"{output.count(summary.skipped)} skipped")
    worked = summary.moved_tokens + summary.computed_tokens
    rate = f", {worked / summary.seconds:,.0f} tok/s" if worked and summary.seconds > 0 else ""
    output.stdout().print(
        output.fields(
            [
                ("files", f"{output.count(summary.files)}: {', '.join(parts)}"),
                ("prompts", f"{output.count(summary.prompt_tokens)} tokens"),
                ("moved", f"{output.count(summary.moved_tokens)} tokens"),
                ("computed", f"{output.count(summary.computed_tokens)} tokens"),
                ("took", output.duration(summary.seconds) + rate),
            ]
        )
    )


def _one(steps: Iterator[PrefetchProgress], to: Target, compute: bool, as_json: bool) -> None:
    last: PrefetchProgress | None = None
    with output.progress(f"to {to.value}") as advance:
        for last in steps:
            advance(last.moved_tokens + last.computed_tokens, _work_tokens(last, to, compute))
    if last is None or not last.done:
        raise ApiError("prefetch did not finish: the appliance stopped it")
    if as_json:
        output.print_json(last)
    else:
        _print(last)
        if last.found.get("none") and not compute:
            output.stderr().print("What no tier has is computed with --compute.", style="dim")


def _work_tokens(step: PrefetchProgress, to: Target, compute: bool) -> int:
    """Tokens that have to be moved or computed."""
    there = step.found.get("hbm", 0) + (step.found.get("dram", 0) if to is Target.DRAM else 0)
    return step.prompt_tokens - there - (0 if compute else step.found.get("none", 0))


def _print(done: PrefetchProgress) -> None:
    found = ", ".join(
        f"[{output.TIER_STYLE[tier]}]{'no tier' if tier == 'none' else tier} {output.count(n)}[/]"
        for tier, n in done.found.items()
        if n
    )
    rate = f", {output.size(done.moved_bytes / done.seconds)}/s" if done.seconds > 0 and done.moved_bytes else ""
    output.stdout().print(
        output.fields(
            [
                ("prompt", f"{output.count(done.prompt_tokens)} tokens"),
                ("was in", found),
                ("moved", f"{output.count(done.moved_tokens)} tokens, {output.size(done.moved_bytes)}{rate}"),
                ("computed", f"{output.count(done.computed_tokens)} tokens"),
                ("took", output.duration(done.seconds)),
            ]
        )
    )

"""How answers look: JSON for programs, aligned text for people, units people read.

Invariant: data goes to stdout, talk to stderr. Main thread only. rich is loaded when something is drawn, not before.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, RenderableType
    from rich.status import Status as RichStatus
    from rich.table import Table

TIER_STYLE = {"hbm": "green", "dram": "cyan", "nvme": "blue", "remote": "magenta", "none": "yellow"}


def print_json(value: BaseModel | dict[str, Any], *, line: bool = False) -> None:
    """`line` writes it on one line, for streams of objects."""
    tree = value if isinstance(value, dict) else value.model_dump(mode="json")
    sys.stdout.write(json.dumps(tree, indent=None if line else 2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def stdout() -> Console:
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            """As any other write: the reader has left, and the exit code says so."""
            raise BrokenPipeError(errno.EPIPE, "nobody reads any more")

    return Output(highlight=False)


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def plain(text: object) -> str:
    """A value from outside, shown as it is: its brackets are no markup."""
    from rich.markup import escape

    return escape(str(text))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Columns named with a leading ">" are right-aligned."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for column in columns:
        grid.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def fields(pairs: Iterable[tuple[str, str]]) -> Table:
    """Name and value, one pair a line."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, value)
    return grid


def notes(lines: Sequence[str]) -> Iterator[RenderableType]:
    """What the user should know, below everything else."""
    from rich.text import Text

    for line in lines:
        yield Text(f"note: {line}", style="yellow")


def size(n_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while abs(n_bytes) >= 1024 and unit != "TiB":
        n_bytes /= 1024
        unit = next(units)
    digits = 0 if unit == "B" or n_bytes >= 100 else 1
    return f"{n_bytes:.{digits}f} {unit}".replace(".0 ", " ")


def count(n: int) -> str:
    return f"{n:,}"


def duration(seconds: float) -> str:
    """Two significant steps: "3.2 ms", "840 ms", "12.3 s", "4m 10s", "3h 5m", "2d 4h"."""
    if seconds < 0.01:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes}m {int(seconds % 60)}s"
    hours = minutes // 60
    return f"{hours}h {minutes % 60}m" if hours < 48 else f"{hours // 24}d {hours % 24}h"


def ratio(times: float) -> str:
    """ "0.4x", "7.2x", "312x"."""
    return f"{times:,.0f}x" if times >= 10 else f"{times:.1f}x".replace(".0x", "x")


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"


@contextmanager
def progress(text: str) -> Iterator[Callable[[float, float], None]]:
    """A bar on stderr while the block runs; call it with (done, total). Nothing is drawn where nobody watches."""
    console = stderr()
    if not console.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(text, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=max(total, 1))


class ChangingLine:
    """A line on stderr that is written over and over, and lines above it that stay. Where nobody watches, only those."""

    def __init__(self, console: Console, status: RichStatus | None) -> None:
        self._console = console
        self._status = status

    def __call__(self, text: str) -> None:
        if self._status is not None:
            self._status.update(plain(text))

    def keep(self, text: str) -> None:
        self._console.print(plain(text), soft_wrap=True)

    def clear(self) -> None:
        if self._status is not None:
            self._status.stop()


@contextmanager
def changing_line() -> Iterator[ChangingLine]:
    console = stderr()
    if not console.is_terminal:
        yield ChangingLine(console, None)
        return
    with console.status("") as status:
        yield ChangingLine(console, status)


class Steps(Protocol):
    def __call__(self, text: str, fraction: float | None = None) -> None:
        """What is being done now."""

    def keep(self, text: str) -> None:
        """What was done, to stay on the screen."""


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = ""

    def __call__(self, text: str, fraction: float | None = None) -> None:
        if text != self._said:
            self._said = text
            self._console.print(plain(text))

    keep = __call__


class _Spinner:
    def __init__(self, console: Console, status: RichStatus) -> None:
        self._console = console
        self._status = status

    def __call__(self, text: str, fraction: float | None = None) -> None:
        self._status.update(plain(text if fraction is None else f"{text} {fraction:.0%}"))

    def keep(self, text: str) -> None:
        self._console.print(plain(text))


@contextmanager
def steps() -> Iterator[Steps]:
    """Progress on stderr: one changing line on a terminal, each new step once elsewhere."""
    console = stderr()
    if not console.is_terminal:
        yield _Lines(console)
        return
    with console.status("") as status:
        yield _Spinner(console, status)

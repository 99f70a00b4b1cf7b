"""The options that every command shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass
class Globals:
    """What was typed before the command."""

    home: Path | None = None
    debug: bool = False


Home = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help="Home of the appliance; else $KVCTL_HOME.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
ProfileName = Annotated[str, typer.Option("--profile", metavar="NAME|FILE", help="Built-in profile or a TOML file.")]
Tenant = Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose prompt it is.")]
PromptFile = Annotated[
    Path | None, typer.Option("--prompt-file", metavar="FILE", help="A prompt as plain text.", show_default=False)
]
MessagesFile = Annotated[
    Path | None, typer.Option("--messages", metavar="FILE", help="Chat messages as JSON.", show_default=False)
]


def locate(ctx: typer.Context, home: Path | None) -> Path:
    """The home this command works on: its own --home, the one before the command, KVCTL_HOME, or the default."""
    from appliance import config

    before: Globals = ctx.obj
    chosen = home or before.home
    return config.home(str(chosen) if chosen else None)

"""The options that commands share."""

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


def _profiles(incomplete: str) -> list[str]:
    from appliance import config

    return [name for name in config.profiles() if name.startswith(incomplete)]


def _models(incomplete: str) -> list[str]:
    from appliance import config
    from appliance.ops import models

    return [name for name in models.names(config.home()) if name.startswith(incomplete)]


Home = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help="Home of the appliance; else $KVCTL_HOME.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
ProfileName = Annotated[
    str,
    typer.Option(
        "--profile",
        metavar="NAME|FILE",
        help="Built-in profile or a TOML file.",
        autocompletion=_profiles,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME|PATH",
        help="A GGUF file or a name from `kvctl model list`.",
        show_default=False,
        autocompletion=_models,
    ),
]
Tenant = Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose prompt it is.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompt-file", metavar="FILE", help="A prompt as plain text, without a chat's framing.", show_default=False
    ),
]
MessagesFile = Annotated[
    Path | None,
    typer.Option("--messages", metavar="FILE", help="Chat messages as JSON, framed as a chat is.", show_default=False),
]


def locate(ctx: typer.Context, home: Path | None) -> Path:
    """The home this command works on: its own --home, the one before the command, KVCTL_HOME, or the default."""
    from appliance import config

    before: Globals = ctx.obj
    chosen = home or before.home
    return config.home(str(chosen) if chosen else None)

"""kvctl model: the GGUF files this home knows by name."""

from __future__ import annotations

import typer

app = typer.Typer(help="Model files: make, add, download, list.", no_args_is_help=True)


@app.callback()
def model() -> None: ...

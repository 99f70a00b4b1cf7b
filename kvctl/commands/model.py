"""kvctl model: the GGUF files this home knows by name.

Invariant: `synth`, `add` and `pull` print the path of the file alone on stdout.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvctl import output
from kvctl.options import Home, Json, locate

if TYPE_CHECKING:
    from appliance.ops.models import Model

app = typer.Typer(help="Model files: make, add, download, list.", no_args_is_help=True)


@app.command()
def synth(
    ctx: typer.Context,
    preset: Annotated[
        str,
        typer.Argument(metavar="PRESET", help="tiny, qwen2.5-0.5b, qwen2.5-7b or llama-3.1-8b.", show_default=False),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="Where to; else among the models.", show_default=False)
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write a model of random weights, with the speed and size of the real one."""
    from appliance.ops import models
    from appliance.ops.synth import synth as write

    target = out or models.folder(locate(ctx, home)) / f"{preset}.gguf"
    with output.progress(f"writing {preset}") as advance:
        path = write(preset, target, on_progress=lambda fraction: advance(fraction, 1))
    _print_path(path, as_json)


@app.command()
def add(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A GGUF file.", show_default=False)],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a GGUF file known by its name."""
    from appliance.ops import models

    _print_model(models.add(locate(ctx, home), path), as_json)


@app.command()
def pull(
    ctx: typer.Context,
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="On the Hugging Face hub: owner/name.", show_default=False)
    ],
    file: Annotated[str, typer.Argument(metavar="FILE", help="A GGUF file in it.", show_default=False)],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Download a GGUF file: the one command that reaches out."""
    from appliance.ops import models

    _print_model(models.pull(locate(ctx, home), repo, file), as_json)


@app.command("list")
def list_(ctx: typer.Context, home: Home = None, as_json: Json = False) -> None:
    """List the models."""
    from appliance.ops import models

    found = models.list_models(locate(ctx, home))
    if as_json:
        output.print_json({"models": [_tree(model) for model in found]})
        return
    if not found:
        output.stderr().print("none yet: kvctl model add FILE.gguf, or kvctl model synth tiny")
        return
    rows = (
        (
            output.plain(model.name),
            output.size(model.size_bytes),
            _billions(model.summary.parameters),
            output.plain(model.summary.architecture),
        )
        for model in found
    )
    output.stdout().print(output.table(["name", ">size", ">parameters", "architecture"], rows))


def _billions(parameters: int) -> str:
    """As models are named: "7.62B", "494.0M"."""
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _tree(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "path": str(model.path),
        "size_bytes": model.size_bytes,
        "parameters": model.summary.parameters,
        "architecture": model.summary.architecture,
    }


def _print_model(model: Model, as_json: bool) -> None:
    if as_json:
        output.print_json(_tree(model))
    else:
        typer.echo(model.path)
        output.stderr().print(f"serve it with: kvctl serve --model {output.plain(model.name)}")


def _print_path(path: Path, as_json: bool) -> None:
    if as_json:
        output.print_json({"name": path.stem, "path": str(path)})
    else:
        typer.echo(path)

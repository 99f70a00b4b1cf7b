"""kvctl init: make the home ready, or find that it is."""

from __future__ import annotations

import typer

from kvctl import output
from kvctl.options import Home, Json, ProfileName, locate


def init(ctx: typer.Context, profile: ProfileName = "default", home: Home = None, as_json: Json = False) -> None:
    """Make keyring, first tenant and API key.

    Safe to run again: what is there stays.
    """
    from appliance.ops import init as ops

    result = ops.init(locate(ctx, home), profile)
    if as_json:
        output.print_json(
            {
                "home": str(result.home),
                "tenant": result.tenant,
                "key_file": str(result.key_file),
                "client_file": str(result.client_file),
                "created": list(result.created),
            }
        )
        return
    pairs = [
        ("home", output.plain(result.home)),
        ("made now", ", ".join(result.created) or "nothing: all was there"),
        ("tenant", result.tenant),
        ("unlock key", f"{output.plain(result.key_file)}  (keep a copy elsewhere: without it the store is noise)"),
        ("API key", f"in {output.plain(result.client_file)}"),
    ]
    output.stdout().print(output.fields(pairs))
    output.stderr().print(
        "\nNext: [bold]kvctl serve --model FILE.gguf[/], or [bold]kvctl serve --synth[/] to try it without a model."
    )

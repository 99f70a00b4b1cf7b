"""The `kvctl` command: global options, the commands mounted, and how every failure ends.

Invariant: importing this loads nothing heavy; a command imports what it needs when it runs. Main thread only.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from appliance import __version__
from appliance.errors import KvctlError
from kvctl.commands import (
    bench,
    chat,
    demo,
    evict,
    explain,
    init,
    inspect,
    model,
    pin,
    prefetch,
    serve,
    simulate,
    status,
    tenant,
    trace,
    verify,
)
from kvctl.diagnostics import ExitCode, exit_code, mute, say
from kvctl.options import Globals, Home, Json

app = typer.Typer(
    name="kvctl",
    help="A confidential inference appliance: what it read once, it never reads again.",
    epilog="Exit codes: kvctl exit-codes. Shell completion: kvctl --install-completion.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvctl {__version__}")
        raise typer.Exit


@app.callback()
def _globals(
    ctx: typer.Context,
    home: Home = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    settings: Globals = ctx.obj
    settings.home = home
    settings.debug = debug


app.command()(init.init)
app.add_typer(tenant.app, name="tenant")
app.add_typer(model.app, name="model")
app.command()(serve.serve)
app.command()(status.status)
app.command()(chat.chat)
app.command()(inspect.inspect)
app.command()(explain.explain)
app.command()(prefetch.prefetch)
app.command()(evict.evict)
app.command()(pin.pin)
app.command()(pin.unpin)
app.command()(verify.verify)
app.add_typer(trace.app, name="trace")
app.command()(simulate.simulate)
app.add_typer(bench.app, name="bench")
app.command()(demo.demo)


@app.command("exit-codes", hidden=True)
def exit_codes(as_json: Json = False) -> None:
    """List the exit codes."""
    from kvctl import output

    if as_json:
        output.print_json({code.name.lower(): code.value for code in ExitCode})
    else:
        rows = ((str(code.value), code.name.lower(), code.meaning) for code in ExitCode)
        output.stdout().print(output.table([">code", "name", "meaning"], rows))


def _command() -> Any:
    """The whole command line. Help fits 24 lines: what its last line names is not listed above."""
    command = typer.main.get_command(app)
    for option in command.params:
        option.hidden = option.name in ("install_completion", "show_completion")  # type: ignore[attr-defined]
    return command


def run(arguments: Sequence[str]) -> int:
    """One invocation; returns the exit code."""
    settings = Globals()
    try:
        command = _command()
        with command.make_context("kvctl", list(arguments), obj=settings) as context:
            command.invoke(context)
        sys.stdout.flush()
        return ExitCode.OK
    except typer.Exit as end:
        return end.exit_code
    except typer.TyperException as error:
        return _usage(error)
    except KvctlError as error:
        if settings.debug:
            raise
        say(str(error))
        return exit_code(error)
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except OSError as error:
        if error.errno == errno.EPIPE:
            mute(sys.stdout.fileno())
            return ExitCode.BROKEN_PIPE
        if settings.debug:
            raise
        say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return ExitCode.FAILURE


def _usage(error: typer.TyperException) -> int:
    message = error.format_message().replace("Value error, ", "").replace("Input should", "should")
    context = getattr(error, "ctx", None)
    if message.startswith("Usage: "):  # nothing was typed after a group: this is its help
        typer.echo(message, err=True)
        return ExitCode.USAGE
    path = context.command_path if context else "kvctl"
    say(f"{message.rstrip('.')} (see {path} --help)")
    return ExitCode.USAGE


def _terminated(number: int, _frame: object) -> None:
    """SIGTERM ends a command as Ctrl-C does, so that what it started ends with it. `serve` handles its own."""
    raise SystemExit(128 + number)


def main() -> None:
    if "_KVCTL_COMPLETE" in os.environ:  # a shell asks for completions; this answers and exits
        _command()(prog_name="kvctl")
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

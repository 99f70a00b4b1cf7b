"""What holds for every command: help, hints, exit codes, one line for a failure, silence when told to stop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from appliance import errors
from kvctl import cli, diagnostics
from kvctl.diagnostics import ApiError, ExitCode, exit_code
from tests.cli.conftest import Kvctl


def _commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []

    def walk(command: object, path: tuple[str, ...]) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found.append(path)
            return
        for name, child in children.items():
            walk(child, (*path, name))

    walk(typer.main.get_command(cli.app), ())
    return found


COMMANDS = _commands()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_helps_and_speaks_json(kvctl: Kvctl, path: tuple[str, ...]) -> None:
    result = kvctl(*path, "--help")
    assert result.code == ExitCode.OK
    assert "--json" in result.out


def test_help_fits_the_width_of_a_small_terminal_and_goes_to_stdout(kvctl: Kvctl) -> None:
    result = kvctl("--help")
    assert result.code == ExitCode.OK
    assert result.err == ""
    assert all(len(line) <= 80 for line in result.out.splitlines())
    assert not any(line.startswith("  ") and line.endswith("...") for line in result.out.splitlines()), (
        "a summary was cut"
    )


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (["stauts"], "Did you mean 'status'? (see kvctl --help)"),
        (["tenant", "ad"], "Did you mean 'add'? (see kvctl tenant --help)"),
        (["status", "--jsn"], "--json"),
        (["serve", "--profil", "x"], "--profile"),
    ],
)
def test_a_typo_gets_the_nearest_word(kvctl: Kvctl, typed: list[str], hint: str) -> None:
    result = kvctl(*typed)
    assert result.code == ExitCode.USAGE
    assert hint in result.complaint


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        (["tenant", "add"], "Missing argument 'NAME' (see kvctl tenant add --help)"),
        (["serve", "--port", "http"], "Invalid value for '--port': "),
        (["prefetch", "--to", "nvme"], "Invalid value for '--to': 'nvme' is not one of 'dram', 'hbm'"),
        (["prefetch", "--session", "s", "--dir", "d"], "name one thing to bring up: "),
        (["bench", "sessions", "--turns", "1"], "Invalid value for '--turns': should be greater"),
        (["bench", "sessions", "--documents", "64,128,256"], '--documents "64,128,256": write 2 token counts'),
        (["bench", "ttft", "--plot", "/nowhere/x.png"], "/nowhere: no such folder for the plot"),
        (["bench", "sessions", "--plot", "x.word"], "x.word: a plot cannot be written in this format"),
        (["init", "--profile", "laptop"], 'no profile or file "laptop"; did you mean "laptop-cpu"?'),
    ],
)
def test_wrong_usage_is_one_line(kvctl: Kvctl, typed: list[str], complaint: str) -> None:
    result = kvctl(*typed)
    assert result.code == ExitCode.USAGE
    assert result.complaint.startswith(complaint)


@pytest.mark.parametrize("typed", [[], ["tenant"], ["model"], ["bench"]], ids=" ".join)
def test_a_group_alone_shows_its_help(kvctl: Kvctl, typed: list[str]) -> None:
    result = kvctl(*typed)
    assert (result.code, result.out) == (ExitCode.USAGE, "")
    assert result.err == kvctl(*typed, "--help").out


def _completed(typed: str) -> list[str]:
    """What bash offers after this."""
    words = typed.split(" ")
    shell = {"_KVCTL_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    asked = subprocess.run(
        [sys.executable, "-m", "kvctl.cli"], env={**os.environ, **shell}, capture_output=True, text=True
    )
    assert asked.returncode == 0
    return asked.stdout.split()


def test_the_shell_completes_commands_profiles_and_models(kvctl: Kvctl) -> None:
    assert _completed("kvctl sta") == ["status"]
    assert _completed("kvctl serve --profile lap") == ["laptop-cpu"]
    assert kvctl("model", "synth", "tiny").code == ExitCode.OK
    assert _completed("kvctl serve --model t") == ["tiny"]


def test_version(kvctl: Kvctl) -> None:
    assert kvctl("--version").out == "kvctl 0.1.0\n"


def test_exit_codes_are_listed(kvctl: Kvctl) -> None:
    assert kvctl("exit-codes", "--json").json == {code.name.lower(): code.value for code in ExitCode}
    listed = kvctl("exit-codes").out
    assert all(code.meaning in listed for code in ExitCode)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.KvctlError("x"), 1),
        (errors.TierFull("x"), 1),
        (errors.StateError("x"), 1),
        (errors.UsageError("x"), 2),
        (errors.ConfigError("x"), 2),
        (errors.RequestError("x"), 2),
        (errors.NotInitialised("x"), 3),
        (errors.NotRunning("x"), 4),
        (errors.AlreadyRunning("x", pid=1), 5),
        (errors.ModelError("x"), 6),
        (errors.ModelDownloadError("x"), 7),
        (errors.KeyringError("x"), 8),
        (errors.IntegrityError("x", reason="tag"), 9),
        (errors.EngineDied("x"), 10),
        (errors.Overloaded("x", retry_after_s=1), 10),
        (ApiError("x"), 10),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_code_of(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_a_failure_shows_its_traceback_only_when_asked(kvctl: Kvctl, home: Path) -> None:
    assert kvctl("status").complaint == f"{home} is not initialised; run: kvctl init"
    with pytest.raises(errors.NotInitialised):
        kvctl("--debug", "status")


def test_home_before_or_after_the_command(kvctl: Kvctl, tmp_path: Path) -> None:
    for typed in (["--home", str(tmp_path / "x"), "status"], ["status", "--home", str(tmp_path / "x")]):
        result = kvctl(*typed)
        assert result.code == ExitCode.NOT_INITIALISED
        assert result.complaint == f"{tmp_path / 'x'} is not initialised; run: kvctl init"
    assert (
        str(tmp_path / "y") in kvctl("--home", str(tmp_path / "x"), "status", "--home", str(tmp_path / "y")).complaint
    )


def test_ctrl_c_is_quiet(kvctl: Kvctl, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(line: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.typer, "echo", interrupted)
    result = kvctl("--version")
    assert (result.code, result.out, result.err) == (ExitCode.INTERRUPTED, "", "")


def test_a_reader_that_goes_away_is_no_failure_to_talk_about() -> None:
    code = (
        "import sys\nfrom kvctl.cli import run\n"
        "sys.stdin.readline()\n"  # until the reader is gone
        "sys.exit(run(['exit-codes', '--json']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write("go\n")
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == ExitCode.BROKEN_PIPE


def test_every_code_has_a_meaning() -> None:
    assert set(diagnostics._MEANING) == set(ExitCode)

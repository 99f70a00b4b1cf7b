"""Exit codes, and the one line that a failure becomes on stderr.

Invariant: stdout carries data only; every failure is one line on stderr that says what to do. Main thread only.
"""

from __future__ import annotations

import os
import sys
from enum import IntEnum

from appliance.errors import (
    AlreadyRunning,
    ConfigError,
    EngineError,
    IntegrityError,
    KeyringError,
    KvctlError,
    ModelDownloadError,
    ModelError,
    NotInitialised,
    NotRunning,
    Overloaded,
    UsageError,
)


class ExitCode(IntEnum):
    """What scripts may rely on; `kvctl exit-codes` prints it."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_INITIALISED = 3
    NOT_RUNNING = 4
    ALREADY_RUNNING = 5
    MODEL = 6
    DOWNLOAD = 7
    KEYRING = 8
    DAMAGE = 9
    API = 10
    SKIPPED = 11
    INTERRUPTED = 130
    BROKEN_PIPE = 141

    @property
    def meaning(self) -> str:
        return _MEANING[self]


_MEANING = {
    ExitCode.OK: "done",
    ExitCode.FAILURE: "failed for a reason without a code of its own",
    ExitCode.USAGE: "wrong command, flag, profile or request",
    ExitCode.NOT_INITIALISED: "no keyring in this home yet: kvctl init",
    ExitCode.NOT_RUNNING: "no appliance answers on this home: kvctl serve",
    ExitCode.ALREADY_RUNNING: "another appliance owns this home",
    ExitCode.MODEL: "the model file is missing, damaged or unsupported",
    ExitCode.DOWNLOAD: "the model could not be downloaded",
    ExitCode.KEYRING: "the keyring cannot be opened",
    ExitCode.DAMAGE: "kvctl verify found damaged or lost records",
    ExitCode.API: "the engine or the API refused or failed",
    ExitCode.SKIPPED: "done, but for files that could not be used",
    ExitCode.INTERRUPTED: "cut short: Ctrl-C, or a second signal to kvctl serve",
    ExitCode.BROKEN_PIPE: "the reader of stdout went away",
}


class ApiError(KvctlError):
    """The appliance answered with an error."""


class SomeSkipped(KvctlError):
    """Not everything that was asked for could be done; the rest was."""


_CODES: tuple[tuple[type[BaseException], ExitCode], ...] = (  # the first class that fits decides
    (ModelDownloadError, ExitCode.DOWNLOAD),
    (ModelError, ExitCode.MODEL),
    (ConfigError, ExitCode.USAGE),
    (UsageError, ExitCode.USAGE),
    (NotInitialised, ExitCode.NOT_INITIALISED),
    (NotRunning, ExitCode.NOT_RUNNING),
    (AlreadyRunning, ExitCode.ALREADY_RUNNING),
    (KeyringError, ExitCode.KEYRING),
    (IntegrityError, ExitCode.DAMAGE),
    (EngineError, ExitCode.API),
    (Overloaded, ExitCode.API),
    (ApiError, ExitCode.API),
    (SomeSkipped, ExitCode.SKIPPED),
)


def exit_code(error: BaseException) -> ExitCode:
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.FAILURE)


def say(line: str) -> None:
    """One line for the person on stderr; nobody reading it is no failure."""
    try:
        sys.stderr.write(f"kvctl: {line}\n")
        sys.stderr.flush()
    except OSError:  # a closed pipe, or a terminal that is gone
        mute(sys.stderr.fileno())


def mute(fd: int) -> None:
    """Nobody reads this stream any more: what is still buffered for it goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)

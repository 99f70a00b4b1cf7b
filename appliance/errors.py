"""The exception tree. Each class is one decision somebody upstream takes.

KvctlError
├── UsageError            the caller asked for something impossible: say what to change
│   ├── ConfigError       a profile or flag is wrong
│   ├── ModelError        a model file is missing, damaged or unsupported
│   │   └── ModelDownloadError  it cannot be had from the hub: no network, no such file, extra not installed
│   └── RequestError      an API request is wrong (4xx); carries param and code for the OpenAI error shape
├── StateError            the home is not in the state this needs
│   ├── NotInitialised    no keyring yet: run `kvctl init`
│   ├── AlreadyRunning    another appliance owns this home; carries its pid if known
│   ├── NotRunning        no appliance answers on this home
│   └── KeyringError      the keyring cannot be opened (wrong key, damaged, loose file mode)
├── Overloaded            queue or drain: 429/503 with retry_after_s
├── StoreBusy             write-behind is at its bound and does not move: what was computed is not stored
├── EngineError           the engine refused or died
│   ├── EngineDied        the engine process is gone; in-flight requests fail with 503
│   └── RestoreError      blocks could not be put into cells; the request recomputes
├── IntegrityError        bytes at rest are not what they claim to be: a miss, counted and quarantined
└── TierError             a tier's medium failed: a miss, counted
    ├── TierFull          no room after eviction
    └── TierIO            errno from the medium
"""

from __future__ import annotations

import traceback

_FRAMES = 8


class KvctlError(Exception):
    """Base of all errors this project raises on purpose. str(error) is one line a person can act on."""


class UsageError(KvctlError): ...


class ConfigError(UsageError): ...


class ModelError(UsageError): ...


class ModelDownloadError(ModelError): ...


class RequestError(UsageError):
    """An API request that must change before it can be answered."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class StateError(KvctlError): ...


class NotInitialised(StateError): ...


class AlreadyRunning(StateError):
    def __init__(self, message: str, *, pid: int | None) -> None:
        super().__init__(message)
        self.pid = pid


class NotRunning(StateError): ...


class KeyringError(StateError): ...


class Overloaded(KvctlError):
    def __init__(self, message: str, *, retry_after_s: float, status: int = 429) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.status = status


class StoreBusy(KvctlError): ...


class EngineError(KvctlError): ...


class EngineDied(EngineError):
    def __init__(self, message: str, *, retry_after_s: float = 2.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RestoreError(EngineError): ...


class IntegrityError(KvctlError):
    """reason: torn | tag | identity | length | version | index. Never carries content."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class TierError(KvctlError): ...


class TierFull(TierError): ...


class TierIO(TierError):
    def __init__(self, message: str, *, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


def frames_of(error: BaseException) -> str:
    """Type and innermost frames, for the log: the message of an error that is not ours may hold content."""
    frames = traceback.extract_tb(error.__traceback__)[: -_FRAMES - 1 : -1]
    return f"{type(error).__name__} at {' < '.join(f'{frame.filename}:{frame.lineno}' for frame in frames)}"

"""The keyring of a home: two copies on disk, one snapshot in memory.

Invariant: each copy is replaced as a whole, and a change that returns is durable in one of them at least; whoever opens
the keyring next makes both equal, so one damaged copy loses nothing. Keys in clear exist only in this process. Threading: readers see one immutable snapshot; changes hold a
lock file, so threads and processes take turns, and each change starts from what is on disk.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from appliance.errors import IntegrityError, KeyringError, NotInitialised, StateError
from appliance.security.files import exclusive, read_private, write_private
from appliance.security.keyring_file import State, WrongKey, decode, encode, new_state
from appliance.security.seal import KEY_BYTES
from appliance.security.tenants import API_KEY_PREFIX, NO_QUOTA, Body, Quota, Tenant

COPIES = ("keyring.a", "keyring.b")
UNLOCK_KEY_NAME = "unlock.key"

_LOCK = "keyring.lock"
_MAX_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TenantKeys:
    """What naming, sealing and locating one tenant's blocks takes; the data key is the newest generation."""

    name: str
    data_key_id: bytes
    data_key: bytes = field(repr=False)
    hash_key: bytes = field(repr=False)
    locate_key: bytes = field(repr=False)


class Keyring:
    def __init__(self, home: Path, key_file: Path, state: State) -> None:
        self._home = home
        self._key_file = key_file
        self._state = state

    @classmethod
    def exists(cls, home: Path) -> bool:
        return any(os.path.exists(home / name) for name in COPIES)

    @classmethod
    def create(cls, home: Path, key_file: Path) -> Keyring:
        """A new keyring without tenants. StateError if there is one."""
        unlock_key = _read_key(key_file)
        with _locked(home, "create"):
            if cls.exists(home):
                raise StateError(f"{home} has a keyring already")
            state = new_state(unlock_key)
            _write(home, state)
        return cls(home, key_file, state)

    @classmethod
    def open(cls, home: Path, key_file: Path) -> Keyring:
        """The newer good copy. KeyringError says what is wrong: key, file mode, damage."""
        if not cls.exists(home):
            raise NotInitialised(f"{home} has no keyring; run: kvctl init")
        with _locked(home, "open"):
            state = _load(home, key_file)
        return cls(home, key_file, state)

    @property
    def store_uuid(self) -> bytes:
        return self._state.store_uuid

    @property
    def epoch(self) -> int:
        return self._state.epoch

    @property
    def index_key(self) -> bytes:
        return self._state.body.index_key

    def tenants(self) -> tuple[Tenant, ...]:
        return self._state.body.tenants

    def tenant(self, name: str) -> TenantKeys:
        """StateError if there is none of that name."""
        tenant = self._state.body.find(name)
        if tenant is None:
            raise StateError(f'there is no tenant "{name}"')
        newest = tenant.data_keys[-1]
        return TenantKeys(name, newest.id, newest.key, tenant.hash_key, tenant.locate_key)

    def data_key(self, data_key_id: bytes) -> tuple[str, bytes] | None:
        """(tenant, key) of a data key of any generation."""
        for tenant in self._state.body.tenants:
            for known in tenant.data_keys:
                if known.id == data_key_id:
                    return tenant.name, known.key
        return None

    def authenticate(self, api_key: str) -> str | None:
        """Tenant of an API key."""
        state = self._state
        return state.body.owner(state.pepper, api_key)

    def add_tenant(self, name: str) -> str:
        """A new tenant; returns its first API key, which is kept nowhere."""
        return self._add_api_key(name, lambda body: body.with_tenant(name))

    def add_api_key(self, name: str) -> str:
        """One more API key for a tenant; it is kept nowhere."""
        return self._add_api_key(name, lambda body: body)

    def quota(self, name: str) -> Quota:
        tenant = self._state.body.find(name)
        return NO_QUOTA if tenant is None else tenant.quota

    def set_quota(self, name: str, dram: int | None, nvme: int | None) -> Quota:
        """Change what is not None; 0 lifts a quota. Durable when this returns. StateError if there is no such tenant."""

        def change(body: Body) -> Body:
            tenant = body.find(name)
            old = NO_QUOTA if tenant is None else tenant.quota
            return body.with_quota(
                name, Quota(old.dram if dram is None else dram or None, old.nvme if nvme is None else nvme or None)
            )

        self._change(lambda old: change(old.body))
        return self.quota(name)

    def _add_api_key(self, tenant: str, prepare: Callable[[Body], Body]) -> str:
        api_key = API_KEY_PREFIX + base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()
        self._change(lambda old: prepare(old.body).with_api_key(old.pepper, tenant, api_key))
        return api_key

    def _change(self, change: Callable[[State], Body]) -> None:
        with _locked(self._home, "change"):
            old = _load(self._home, self._key_file)
            new = replace(old, version=old.version + 1, body=change(old))
            _write(self._home, new)
            self._state = new


def create_key_file(path: Path) -> None:
    """A new random unlock key. Whoever holds it can open everything; without it nothing can be opened."""
    write_private(path, os.urandom(KEY_BYTES))


@contextmanager
def _locked(home: Path, action: str) -> Iterator[None]:
    """One process and thread at a time; what the file system refuses becomes one line."""
    try:
        with exclusive(home / _LOCK):
            yield
    except OSError as error:
        raise KeyringError(f"cannot {action} the keyring in {home}: {error.strerror}") from None


def _read_key(path: Path) -> bytes:
    try:
        key = read_private(path, KEY_BYTES + 1)
    except OSError as error:
        raise KeyringError(f"cannot read the key file {path}: {error.strerror}") from None
    if len(key) != KEY_BYTES:
        raise KeyringError(f"{path} is not a key file: it must hold exactly {KEY_BYTES} bytes")
    return key


def _write(home: Path, state: State) -> None:
    """Both copies; one is enough, since the next load makes the other equal. OSError if there is none."""
    data = encode(state)
    failed: list[OSError] = []
    for name in COPIES:
        try:
            write_private(home / name, data)
        except OSError as error:
            failed.append(error)
    if len(failed) == len(COPIES):
        raise failed[0]


def _load(home: Path, key_file: Path) -> State:
    """The newer good copy, after which both are equal again. The caller holds the lock."""
    unlock_key = _read_key(key_file)
    good: dict[str, State] = {}
    wrong_key = False
    unreadable: OSError | None = None
    for name in COPIES:
        try:
            good[name] = decode(read_private(home / name, _MAX_FILE_BYTES), unlock_key)
        except FileNotFoundError:
            continue
        except OSError as error:
            unreadable = error
        except WrongKey:
            wrong_key = True
        except IntegrityError as error:
            if error.reason == "version":  # a newer build's copy is not ours to replace
                raise KeyringError(f"{home / name}: {error}") from None
    if not good:
        if unreadable:
            raise unreadable
        if wrong_key:
            raise KeyringError(f"wrong key: {key_file} does not unlock the keyring in {home}")
        names = " and ".join(str(home / name) for name in COPIES)
        raise KeyringError(f"{names} are both damaged; restore one of them from a backup")
    newest = max(good.values(), key=lambda state: (state.epoch, state.version))
    if any(good.get(name) != newest for name in COPIES):
        with suppress(OSError):  # one good copy is enough to serve; the next start or change tries again
            _write(home, newest)
    return newest

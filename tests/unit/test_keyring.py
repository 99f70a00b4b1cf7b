"""The keyring: what it keeps, what it survives, and what it refuses."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import pytest

from appliance.errors import IntegrityError, KeyringError, NotInitialised, StateError, UsageError
from appliance.security import files, keyring, keyring_file
from appliance.security.keyring import COPIES, Keyring, create_key_file
from appliance.security.tenants import DataKey


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "unlock.key"
    create_key_file(path)
    return path


@pytest.fixture
def ring(tmp_path: Path, key_file: Path) -> Keyring:
    made = Keyring.create(tmp_path, key_file)
    made.add_tenant("default")
    return made


def copies(home: Path) -> list[bytes]:
    return [(home / name).read_bytes() for name in COPIES]


def with_crc(data: bytes) -> bytes:
    return data[:-4] + google_crc32c.value(data[:-4]).to_bytes(4, "little")


def test_what_was_made_is_what_is_opened(tmp_path: Path, key_file: Path, ring: Keyring) -> None:
    api_key = ring.add_tenant("acme")
    again = Keyring.open(tmp_path, key_file)
    assert again.store_uuid == ring.store_uuid
    assert again.index_key == ring.index_key
    assert again.epoch == 1
    assert [tenant.name for tenant in again.tenants()] == ["default", "acme"]
    assert again.tenant("acme") == ring.tenant("acme")
    assert again.authenticate(api_key) == "acme"
    keys = again.tenant("acme")
    assert again.data_key(keys.data_key_id) == ("acme", keys.data_key)
    assert again.data_key(b"?" * 16) is None


def test_all_keys_are_different_and_random(tmp_path: Path, ring: Keyring) -> None:
    ring.add_tenant("acme")
    secrets = [ring.index_key]
    for name in ("default", "acme"):
        keys = ring.tenant(name)
        secrets += [keys.data_key, keys.hash_key, keys.locate_key]
        assert len(keys.data_key_id) == 16
    assert len(set(secrets)) == 7
    assert {len(secret) for secret in secrets} == {32}


def test_no_secret_is_on_disk_or_in_a_repr(tmp_path: Path, key_file: Path, ring: Keyring) -> None:
    api_key = ring.add_api_key("default")
    keys = ring.tenant("default")
    stored = b"".join(copies(tmp_path))
    for secret in (api_key.encode(), keys.data_key, keys.hash_key, keys.locate_key, ring.index_key, b"default"):
        assert secret not in stored
        assert secret.hex().encode() not in stored
    shown = f"{ring!r} {keys!r} {ring.tenants()!r}"
    for secret in (keys.data_key, keys.hash_key, keys.locate_key):
        assert repr(secret) not in shown


def test_api_keys(ring: Keyring) -> None:
    api_key = ring.add_api_key("default")
    assert api_key.startswith("kvctl-")
    assert len(api_key) == len("kvctl-") + 43
    assert ring.authenticate(api_key) == "default"
    for wrong in ("", "kvctl-", api_key[:-1], api_key + "A", api_key.swapcase(), "\ud800", "ключ"):
        assert ring.authenticate(wrong) is None
    assert len(ring.tenants()[0].api_keys) == 2


def test_bad_tenant_names_and_unknown_tenants(tmp_path: Path, ring: Keyring) -> None:
    before = copies(tmp_path)
    for name in ("", "-x", "UPPER", "a b", "a/b", "x" * 64, "a\n"):
        with pytest.raises(UsageError):
            ring.add_tenant(name)
    with pytest.raises(StateError, match="exists already"):
        ring.add_tenant("default")
    for call in (ring.tenant, ring.add_api_key):
        with pytest.raises(StateError, match="no tenant"):
            call("nobody")
    assert copies(tmp_path) == before


def test_an_old_data_key_opens_and_the_newest_seals(tmp_path: Path, key_file: Path, ring: Keyring) -> None:
    old = ring.tenant("default")
    state = keyring_file.decode(copies(tmp_path)[0], key_file.read_bytes())
    (tenant,) = state.body.tenants
    tenant = replace(tenant, data_keys=(*tenant.data_keys, DataKey(b"2" * 16, b"n" * 32)))
    data = keyring_file.encode(replace(state, version=99, body=replace(state.body, tenants=(tenant,))))
    files.write_private(tmp_path / COPIES[1], data)
    again = Keyring.open(tmp_path, key_file)
    assert again.tenant("default").data_key == b"n" * 32
    assert again.data_key(old.data_key_id) == ("default", old.data_key)
    assert copies(tmp_path)[0] == copies(tmp_path)[1], "the older copy was brought up"


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: None,
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: bytes(len(data)),
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    ],
)
def test_one_damaged_copy_loses_nothing_and_is_replaced(
    tmp_path: Path, key_file: Path, ring: Keyring, name: str, damage: Callable[[bytes], bytes | None]
) -> None:
    damaged = damage((tmp_path / name).read_bytes())
    (tmp_path / name).unlink() if damaged is None else (tmp_path / name).write_bytes(damaged)
    assert Keyring.open(tmp_path, key_file).tenant("default") == ring.tenant("default")
    unlock_key = key_file.read_bytes()
    assert len({keyring_file.decode(data, unlock_key).version for data in copies(tmp_path)}) == 1


def test_both_copies_damaged_names_them(tmp_path: Path, key_file: Path, ring: Keyring) -> None:
    for name in COPIES:
        (tmp_path / name).write_bytes(b"KVKR")
    with pytest.raises(KeyringError, match=r"keyring\.a and .*keyring\.b are both damaged"):
        Keyring.open(tmp_path, key_file)


def test_copies_that_cannot_be_read_are_not_called_damaged(tmp_path: Path, key_file: Path, ring: Keyring) -> None:
    for name in COPIES:
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir(mode=0o700)
    with pytest.raises(KeyringError, match=r"cannot open the keyring in .*: Is a directory"):
        Keyring.open(tmp_path, key_file)


def test_every_flipped_bit_of_a_copy_is_refused(tmp_path: Path, key_file: Path, ring: Keyring) -> None:
    """Also with the checksum mended, as an attacker would."""
    data, unlock_key = bytearray(copies(tmp_path)[0]), key_file.read_bytes()
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            keyring_file.decode(bytes(data), unlock_key)
        if bit // 8 < len(data) - 4:
            with pytest.raises((IntegrityError, keyring_file.WrongKey)):
                keyring_file.decode(with_crc(bytes(data)), unlock_key)
        data[bit // 8] ^= 1 << bit % 8


def test_a_body_cannot_be_carried_to_another_version(tmp_path: Path, key_file: Path, ring: Keyring) -> None:
    """The old body under a new head is refused, so a revoked state cannot pass for the present one."""
    old = copies(tmp_path)[0]
    ring.add_api_key("default")
    new = copies(tmp_path)[0]
    head = len(new) - 4 - int.from_bytes(new[36:40], "little")
    old_head = len(old) - 4 - int.from_bytes(old[36:40], "little")
    forged = new[:36] + old[36:40] + new[40:head] + old[old_head:]
    with pytest.raises(IntegrityError):
        keyring_file.decode(with_crc(forged), key_file.read_bytes())


def test_wrong_key_file_is_said_in_one_line(tmp_path: Path, ring: Keyring) -> None:
    other = tmp_path / "other.key"
    create_key_file(other)
    before = copies(tmp_path)
    with pytest.raises(KeyringError, match=r"wrong key: .*other\.key does not unlock") as caught:
        Keyring.open(tmp_path, other)
    assert "\n" not in str(caught.value)
    assert copies(tmp_path) == before


def test_missing_short_and_long_key_files(tmp_path: Path, key_file: Path, ring: Keyring) -> None:
    for size in (0, 31, 33):
        key_file.write_bytes(b"k" * size)
        with pytest.raises(KeyringError, match="exactly 32 bytes"):
            Keyring.open(tmp_path, key_file)
    key_file.unlink()
    with pytest.raises(KeyringError, match="cannot read the key file"):
        Keyring.open(tmp_path, key_file)


@pytest.mark.parametrize("name", ["unlock.key", *COPIES])
def test_files_open_to_others_are_refused_with_the_cure(
    tmp_path: Path, key_file: Path, ring: Keyring, name: str
) -> None:
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    (tmp_path / name).chmod(0o640)
    with pytest.raises(KeyringError, match=f"chmod 600 {tmp_path / name}"):
        Keyring.open(tmp_path, key_file)


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path, key_file: Path, ring: Keyring) -> None:
    newer = bytearray(copies(tmp_path)[1])
    newer[4] = 2
    (tmp_path / COPIES[1]).write_bytes(with_crc(bytes(newer)))
    before = copies(tmp_path)
    with pytest.raises(KeyringError, match="format version 2"):
        Keyring.open(tmp_path, key_file)
    assert copies(tmp_path) == before


def test_no_keyring_and_a_second_keyring(tmp_path: Path, key_file: Path) -> None:
    with pytest.raises(NotInitialised, match="kvctl init"):
        Keyring.open(tmp_path, key_file)
    Keyring.create(tmp_path, key_file)
    with pytest.raises(StateError, match="already"):
        Keyring.create(tmp_path, key_file)


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("failing", [{1}, {2}, {3}, {1, 2}], ids=str)
def test_an_update_that_fails_anywhere_says_what_is_on_disk(
    tmp_path: Path, key_file: Path, ring: Keyring, monkeypatch: pytest.MonkeyPatch, step: str, failing: set[int]
) -> None:
    """One copy is enough for a change; it is refused only if neither can be written, as when the first two calls fail."""
    calls = 0

    def die() -> None:
        nonlocal calls
        calls += 1
        if calls in failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    real_fsync, real_replace, real_write = os.fsync, os.replace, keyring.write_private
    if step == "fsync":
        monkeypatch.setattr(files.os, "fsync", lambda fd: (die(), real_fsync(fd))[1])
    elif step == "replace":
        monkeypatch.setattr(files.os, "replace", lambda a, b: (die(), real_replace(a, b))[1])
    else:
        monkeypatch.setattr(keyring, "write_private", lambda path, data: (die(), real_write(path, data))[1])
    names, message = {"default"}, ""
    try:
        ring.add_tenant("acme")
        names.add("acme")
    except KeyringError as error:
        message = str(error)
    monkeypatch.undo()
    both = failing == {1, 2}
    assert message == (f"cannot change the keyring in {tmp_path}: No space left on device" if both else "")
    again = Keyring.open(tmp_path, key_file)
    assert {tenant.name for tenant in again.tenants()} == names
    unlock_key = key_file.read_bytes()
    assert len({keyring_file.decode(data, unlock_key).version for data in copies(tmp_path)}) == 1
    again.add_tenant("later")
    assert Keyring.open(tmp_path, key_file).tenant("later") == again.tenant("later")


def test_a_full_disk_does_not_stop_opening_with_one_good_copy(
    tmp_path: Path, key_file: Path, ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / COPIES[0]).write_bytes(b"")

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(keyring, "write_private", full)
    assert Keyring.open(tmp_path, key_file).tenant("default") == ring.tenant("default")


def test_changes_from_many_sides_all_stay(tmp_path: Path, key_file: Path, ring: Keyring) -> None:
    """Threads of one keyring and of another one on the same home: each change starts from what is on disk."""
    rings = [ring, Keyring.open(tmp_path, key_file)]
    threads = [threading.Thread(target=rings[i % 2].add_tenant, args=(f"t{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {t.name for t in Keyring.open(tmp_path, key_file).tenants()} == {"default"} | {f"t{i}" for i in range(8)}

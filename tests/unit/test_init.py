"""`kvctl init` and tenants of a stopped appliance: idempotent, and complete after any interruption."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tomli
import tomli_w

from appliance.errors import KeyringError, StateError
from appliance.ops.init import FIRST_TENANT, follow, init
from appliance.ops.tenants import add_tenant, list_tenants
from appliance.security import files
from appliance.security.keyring import Keyring


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.toml"
    path.write_text("[server]\nport = 8123\n")
    return str(path)


def state(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.iterdir() if path.suffix != ".lock"}


def works(home: Path) -> None:
    settings = tomli.loads((home / "client.toml").read_text())
    assert set(settings) == {"base_url", "api_key"}
    assert settings["base_url"] == "http://127.0.0.1:8123/v1"
    assert Keyring.open(home, home / "unlock.key").authenticate(settings["api_key"]) == FIRST_TENANT


def test_a_first_run_makes_everything_private(tmp_path: Path, profile: str) -> None:
    home = tmp_path / "deep" / "home"
    result = init(home, profile)
    works(home)
    assert (result.home, result.tenant, result.client_file) == (home, "default", home / "client.toml")
    assert len(result.created) == 4
    assert home.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in home.iterdir()} == {0o600}


def test_a_second_run_changes_nothing_and_says_so(tmp_path: Path, profile: str) -> None:
    home = tmp_path / "home"
    init(home, profile)
    before = state(home)
    assert init(home, profile).created == ()
    assert state(home) == before


def test_a_lost_client_file_gets_a_new_key(tmp_path: Path, profile: str) -> None:
    home = tmp_path / "home"
    init(home, profile)
    (home / "client.toml").unlink()
    assert init(home, profile).created == ("API key", "client settings")
    works(home)


class Killed(BaseException):
    """Nothing in the code under test catches it, as nothing survives SIGKILL."""


def test_killed_before_any_open_fsync_or_rename_it_completes_when_run_again(
    tmp_path: Path, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = False
    for nth in range(1, 100):
        home = tmp_path / f"home{nth}"
        calls = 0

        def count(nth: int = nth) -> None:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise Killed

        with monkeypatch.context() as patch:
            for name in ("open", "fsync", "replace"):
                real = getattr(os, name)
                patch.setattr(files.os, name, lambda *args, real=real: (count(), real(*args))[1])
            try:
                init(home, profile)
                finished = True
            except Killed:
                pass
        init(home, profile)
        works(home)
        assert init(home, profile).created == ()
        assert not list(home.glob("*.tmp"))
        if finished:
            break
    assert finished
    assert nth > 20, "every step was interrupted once"


def test_a_lost_key_file_is_an_error_not_a_new_key(tmp_path: Path, profile: str) -> None:
    home = tmp_path / "home"
    init(home, profile)
    (home / "unlock.key").unlink()
    before = state(home)
    with pytest.raises(KeyringError, match="cannot read the key file"):
        init(home, profile)
    assert state(home) == before


def test_a_home_that_cannot_be_made_is_said_in_one_line(tmp_path: Path, profile: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot prepare"):
        init(tmp_path / "file" / "home", profile)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:80/v1"),
        ("::", "http://[::1]:80/v1"),
        ("::1", "http://[::1]:80/v1"),
        ("10.0.0.7", "http://10.0.0.7:80/v1"),
        ("box.local", "http://box.local:80/v1"),
    ],
)
def test_the_client_is_told_a_reachable_address(tmp_path: Path, host: str, url: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(f'[server]\nhost = "{host}"\nport = 80\n')
    init(tmp_path / "home", str(path))
    assert tomli.loads((tmp_path / "home" / "client.toml").read_text())["base_url"] == url


def test_a_key_file_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(f'[security]\nkey_file = "{tmp_path / "stick.key"}"\n')
    result = init(tmp_path / "home", str(path))
    assert result.key_file == tmp_path / "stick.key"
    assert not (tmp_path / "home" / "unlock.key").exists()


@pytest.mark.parametrize(
    ("known", "follows"),
    [
        ("http://127.0.0.1:8080/v1", True),
        ("http://[::1]:8080/v1", True),
        ("https://127.0.0.1/v1", False),
        ("http://10.0.0.7:8080/v1", False),
        ("https://box.example/v1", False),
    ],
)
def test_the_clients_address_follows_what_is_served_here(tmp_path: Path, known: str, follows: bool) -> None:
    init(tmp_path)
    file = tmp_path / "client.toml"
    settings = tomli.loads(file.read_text())
    file.write_text(tomli_w.dumps({**settings, "base_url": known}))
    follow(tmp_path, "http://[::1]:9000/v1")
    assert tomli.loads(file.read_text()) == {**settings, "base_url": "http://[::1]:9000/v1" if follows else known}
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [None, "[", "base_url = 3", "api_key = 'x'"])
def test_a_client_file_that_is_not_ours_is_left_alone(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "client.toml"
    if content is not None:
        file.write_text(content)
    follow(tmp_path, "http://127.0.0.1:9000/v1")
    assert (file.read_text() if file.exists() else None) == content


def test_tenants_of_a_stopped_appliance(tmp_path: Path, profile: str) -> None:
    home = tmp_path / "home"
    key_file = init(home, profile).key_file
    added = add_tenant(home, key_file, "acme")
    assert Keyring.open(home, key_file).authenticate(added.api_key) == "acme"
    listed = list_tenants(home, key_file).tenants
    assert [(t.tenant, t.api_keys) for t in listed] == [("default", 1), ("acme", 1)]
    assert listed[1].created.endswith("+00:00")

"""`kvctl init`: a home with an unlock key, a keyring, a first tenant and the client's settings.

Invariant: running it again changes nothing that is complete and completes what is not, wherever it was interrupted.
It never replaces a key: if the keyring is there and its key file is not, that is an error. One init at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import tomli
import tomli_w

from appliance.config import Profile, client_file, load_profile, local_url
from appliance.errors import StateError
from appliance.security.files import exclusive, write_private
from appliance.security.keyring import UNLOCK_KEY_NAME, Keyring, create_key_file

FIRST_TENANT = "default"


@dataclass(frozen=True)
class InitResult:
    home: Path
    tenant: str
    key_file: Path
    client_file: Path
    created: tuple[str, ...]
    """What this run made, in words; empty when everything was there."""


def key_file(home: Path, profile: Profile) -> Path:
    """The file that unlocks this home's keyring."""
    return Path(profile.security.key_file).expanduser() if profile.security.key_file else home / UNLOCK_KEY_NAME


def init(home: Path, profile_name: str = "default") -> InitResult:
    """Create what is missing in `home`. StateError or KeyringError if something is in the way."""
    profile = load_profile(profile_name)
    try:
        return _complete(home, profile)
    except OSError as error:
        raise StateError(f"cannot prepare {home}: {error.filename or home}: {error.strerror}") from None


def _complete(home: Path, profile: Profile) -> InitResult:
    unlock, client = key_file(home, profile), client_file(home)
    created: list[str] = []
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(home / "init.lock"):
        if not Keyring.exists(home):
            if not unlock.exists():
                create_key_file(unlock)
                created.append("unlock key")
            keyring = Keyring.create(home, unlock)
            created.append("keyring")
        else:
            keyring = Keyring.open(home, unlock)
        first = not any(tenant.name == FIRST_TENANT for tenant in keyring.tenants())
        if first or not client.exists():
            api_key = keyring.add_tenant(FIRST_TENANT) if first else keyring.add_api_key(FIRST_TENANT)
            created.append(f'tenant "{FIRST_TENANT}"' if first else "API key")
            settings = {"base_url": local_url(profile.server.host, profile.server.port), "api_key": api_key}
            write_private(client, tomli_w.dumps(settings).encode())
            created.append("client settings")
    return InitResult(home, FIRST_TENANT, unlock, client, tuple(created))


def follow(home: Path, base_url: str) -> None:
    """Let the client's settings name the address that is served, unless they name another box or a TLS proxy."""
    path = client_file(home)
    with exclusive(home / "init.lock"):
        try:
            settings = tomli.loads(path.read_text(encoding="utf-8"))
            known, served = urlsplit(settings["base_url"]), urlsplit(base_url)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # not there, or not ours: whoever reads it says so
        if known != served and (known.scheme, known.hostname) in (("http", served.hostname), ("http", "127.0.0.1")):
            write_private(path, tomli_w.dumps({**settings, "base_url": base_url}).encode())

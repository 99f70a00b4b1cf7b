"""The profile: every setting of the appliance, strict and frozen.

Precedence: built-in profile < profile file given by path < flags really typed (`--set section.key=value`). An unknown
key is an error that names the file, the key and the nearest known key. Nothing else (no environment variable but
KVCTL_HOME) changes a setting.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from appliance.errors import ConfigError

PROFILE_DIR = Path(__file__).resolve().parent.parent / "profiles"

_SIZE = re.compile(r"(?i)^\s*(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)?\s*$")
_SIZE_UNITS = {
    "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_PERCENT = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*%\s*$")
_TIME = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*$")
_TIME_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(value: object) -> int:
    """Bytes of "64GiB", "512 MiB" or a plain number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.match(str(value))
    if not match:
        raise ValueError(f'"{value}" is not a size; write it like "64GiB"')
    return int(float(match[1]) * _SIZE_UNITS[(match[2] or "B").lower()])


def parse_time(value: object) -> float:
    """Seconds of "30s", "500ms", "5m"."""
    match = _TIME.match(str(value))
    if not match:
        raise ValueError(f'"{value}" is not a time; write it like "30s"')
    return float(match[1]) * _TIME_UNITS[match[2]]


@dataclass(frozen=True)
class Share:
    """A part of something: a fraction of it, or so many bytes."""

    fraction: float = 0.0
    nbytes: int = 0

    def of(self, total_bytes: int) -> int:
        return min(int(self.fraction * total_bytes) + self.nbytes, total_bytes)


def parse_share(value: object) -> Share:
    """ "25%" or a size."""
    if isinstance(value, Share):
        return value
    match = _PERCENT.match(str(value))
    if match and float(match[1]) <= 100:
        return Share(fraction=float(match[1]) / 100)
    try:
        return Share(nbytes=parse_size(value))
    except ValueError:
        raise ValueError(f'"{value}" is no share; write it like "25%" or "4GiB"') from None


def parse_retention(value: object) -> float | None:
    """Seconds of "24h"; None of "forever"."""
    return None if value is None or value == "forever" else parse_time(value)


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
PartOf = Annotated[Share, BeforeValidator(parse_share)]
Seconds = Annotated[float, BeforeValidator(parse_time), Field(ge=0)]
Kept = Annotated[float | None, BeforeValidator(parse_retention)]
KVType = Literal["f16", "bf16", "f32", "q8_0", "q4_0"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(Section):
    path: str = ""
    """A GGUF file, or a name from `kvctl model list`. Empty: `kvctl serve --model` decides."""


class EngineSection(Section):
    kind: Literal["llamacpp", "null"] = "llamacpp"
    context_tokens: int = Field(16384, ge=256, le=2**24)
    """KV cells, shared by all sequences: the capacity of the hbm tier."""
    max_sequences: int = Field(64, ge=4, le=256)
    batch_tokens: int = Field(512, ge=32, le=8192)
    shared_batch_tokens: int = Field(64, ge=1, le=8192)
    prefill_share: float = Field(0.3, gt=0, le=1)
    """Of the time, for reading prompts, while answers stream; 1: no bound."""
    gpu_layers: int = Field(0, ge=-1)
    """Layers on the GPU; -1 = all."""
    threads: int = Field(0, ge=0, le=512)
    batch_threads: int = Field(0, ge=0, le=512)
    kv_type_k: KVType = "f16"
    kv_type_v: KVType = "f16"
    start_timeout: Seconds = 600.0

    @model_validator(mode="after")
    def _a_batch_holds_a_token_of_each_sequence(self) -> EngineSection:
        if self.batch_tokens < self.max_sequences:
            raise ValueError(f"batch_tokens = {self.batch_tokens} is below max_sequences = {self.max_sequences}")
        return self


class KVSection(Section):
    enabled: bool = True
    """Off: nothing is kept below hbm."""
    block_tokens: int = Field(256, ge=16, le=4096)
    eviction: Literal["cost", "lru"] = "cost"
    """What goes first below hbm: what costs least to compute again, or what was not used for longest."""
    retention: Kept = None
    """After the last use, for requests that do not say; 0: in memory only; None: until room is needed."""
    pin_budget: PartOf = Share(fraction=0.5)
    """Of the lowest tier, for pinned prompts."""
    store_completions: bool = True
    """Also store what was generated, not only prompts."""
    write_behind: Size = 256 * 2**20
    """Most bytes of DRAM that wait for their record to be durable."""
    prefetch_budget: PartOf = Share(fraction=0.25)
    """Of the DRAM pool, for what the next turns of sessions need; at most half of it. 0: only what is asked for."""
    transfer_threads: int = Field(4, ge=1, le=64)
    read_size: Size = 8 * 2**20
    """Bytes of one coalesced read."""


class DramSection(Section):
    capacity: Size = 2**30
    lock: bool = True


class NvmeSection(Section):
    enabled: bool = True
    capacity: Size = 16 * 2**30
    path: str = ""
    """Folder of the segments and their index; empty: <home>/store. Another folder is another store."""
    segment: Size = 256 * 2**20
    direct: bool = True
    """O_DIRECT where the file system allows it."""


class TiersSection(Section):
    dram: DramSection = DramSection()
    nvme: NvmeSection = NvmeSection()


class SecuritySection(Section):
    key_file: str = ""
    """Unlocks the keyring; empty: <home>/unlock.key."""


class ServerSection(Section):
    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    """0 picks a free port."""
    max_body: Annotated[Size, Field(le=32 * 2**20)] = 16 * 2**20
    """Of a request, in bytes; less where the model's context is small."""
    max_running: int = Field(16, ge=1, le=255)
    max_queue: int = Field(64, ge=0)
    default_max_tokens: int = Field(512, ge=1)
    drain: Seconds = 30.0
    """How long a stop waits for running requests."""


class Profile(Section):
    model: ModelSection = ModelSection()
    engine: EngineSection = EngineSection()
    kv: KVSection = KVSection()
    tiers: TiersSection = TiersSection()
    security: SecuritySection = SecuritySection()
    server: ServerSection = ServerSection()


def keys(section: type[BaseModel] = Profile, prefix: str = "") -> list[str]:
    """Every dotted key, in schema order."""
    found: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += keys(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def home(option: str | None = None) -> Path:
    """The appliance's folder: --home, else KVCTL_HOME, else the XDG state directory."""
    chosen = option or os.environ.get("KVCTL_HOME")
    if chosen:
        return Path(chosen).expanduser().resolve()
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser().resolve() / "kvctl"


def admin_socket(home: Path) -> Path:
    """Where a running appliance answers `kvctl`."""
    return home / "admin.sock"


def client_file(home: Path) -> Path:
    """TOML with base_url and api_key, written by `kvctl init`, mode 0600."""
    return home / "client.toml"


def local_url(host: str, port: int) -> str:
    """How a client on this box reaches a server that listens on `host`."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}/v1"
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"http://[{address}]:{port}/v1" if address.version == 6 else f"http://{address}:{port}/v1"


def profiles() -> list[str]:
    """The built-in ones."""
    return sorted(path.stem for path in PROFILE_DIR.glob("*.toml"))


def load_profile(name_or_path: str = "default", overrides: Sequence[str] = ()) -> Profile:
    """Built-in profile by name or a TOML file by path, then `section.key=value` overrides. ConfigError names the culprit."""
    builtin = PROFILE_DIR / f"{name_or_path}.toml"
    if builtin.is_file() and os.sep not in name_or_path:
        tree = _read(builtin)
        source = f"profile {name_or_path}"
    else:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            hint = _nearest(name_or_path, profiles())
            raise ConfigError(f'no profile or file "{name_or_path}"{hint}; built-in: {", ".join(profiles())}')
        tree = _read(path)
        source = str(path)
    _validate(tree, source)
    for item in overrides:
        key, eq, text = item.partition("=")
        if not eq:
            raise ConfigError(f'--set {item}: write it as section.key=value, e.g. --set tiers.dram.capacity="4GiB"')
        _assign(tree, key.strip(), _literal(text.strip()), f"--set {item}")
    return _validate(tree, "--set" if overrides else source)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _literal(text: str) -> Any:
    """A TOML value if it is one, else the bare string."""
    try:
        return tomli.loads(f"v = {text}")["v"]
    except tomli.TOMLDecodeError:
        return text


def _assign(tree: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    inside = [key for key in keys() if key.startswith(f"{dotted}.")]
    if inside:
        raise ConfigError(f'{source}: "{dotted}" is a section; set one of its keys: {", ".join(inside)}')
    if dotted not in keys():
        raise ConfigError(f'{source}: unknown key "{dotted}"{_nearest(dotted, keys())}')
    *sections, leaf = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[leaf] = value


def _validate(tree: dict[str, Any], source: str) -> Profile:
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        dotted = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f'{source}: unknown key "{dotted}"{_nearest(dotted, keys())}') from None
        if first["type"] == "model_type":
            raise ConfigError(f'{source}: "{dotted}" is a section: write [{dotted}] and its keys below') from None
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to")[0]
        raise ConfigError(f"{source}: {dotted}: {message}") from None


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:
        leaf = {k.rsplit(".", 1)[-1]: k for k in known}
        close = [leaf[m] for m in difflib.get_close_matches(word.rsplit(".", 1)[-1], leaf, n=1, cutoff=0.6)]
    return f'; did you mean "{close[0]}"?' if close else ""

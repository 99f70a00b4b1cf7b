"""The models of a home: GGUF files in <home>/models, each known by its file stem.

Invariant: a file in that folder was checked and is complete; nothing is written when a check fails. Threading: any
thread or process.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import ModelDownloadError, ModelError
from appliance.ops.files import replaced
from appliance.ops.gguf_check import Summary, check

FOLDER = "models"
DIGESTS = ".sha256.json"
CHUNK_BYTES = 1 << 22

_OFFLINE = ("ConnectError", "ConnectTimeout", "ReadTimeout", "LocalEntryNotFoundError", "OfflineModeIsEnabled")
"""Errors of the hub client and its HTTP library that mean it could not be reached."""


@dataclass(frozen=True)
class Model:
    name: str
    path: Path
    size_bytes: int
    summary: Summary


def folder(home: Path) -> Path:
    return home / FOLDER


def names(home: Path) -> list[str]:
    """What `resolve` knows by name."""
    return sorted(path.stem for path in folder(home).glob("*.gguf"))


def add(home: Path, path: Path) -> Model:
    """Make a GGUF file known by its stem: linked into the home where possible, copied otherwise."""
    source = path.expanduser()
    check(source)
    target = folder(home) / f"{source.stem}.gguf"
    if target.exists():
        if target.samefile(source):
            return _model(target)
        raise ModelError(f"{target} exists already; remove it first, or rename {source.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replaced(target) as temporary:
            try:
                os.link(source.resolve(), temporary)
            except OSError:  # another file system, or one without links
                shutil.copyfile(source, temporary)
    except OSError as error:
        raise ModelError(f"{target}: {error.strerror}") from None
    return _model(target)


def list_models(home: Path) -> list[Model]:
    """Models by name. A file somebody damaged since is left out: `resolve` says what is wrong with it."""
    found = []
    for path in sorted(folder(home).glob("*.gguf")):
        try:
            found.append(_model(path))
        except ModelError:
            continue
    return found


def resolve(home: Path, name_or_path: str) -> Path:
    """The checked GGUF file of a model's name or of a path. ModelError names the nearest known model."""
    known = folder(home) / f"{name_or_path}.gguf"
    given = Path(name_or_path).expanduser()
    if os.sep not in name_or_path and known.is_file():
        path = known
    elif given.is_file() or os.sep in name_or_path:
        path = given
    else:
        close = difflib.get_close_matches(name_or_path, names(home), n=1, cutoff=0.5)
        hint = f'did you mean "{close[0]}"?' if close else "see `kvctl model list`, or give a path to a GGUF file"
        raise ModelError(f'no model "{name_or_path}"; {hint}')
    check(path)
    return path.resolve()  # others work in other folders


def sha256(path: Path, home: Path, on_progress: Callable[[float], None] | None = None) -> bytes:
    """SHA-256 of a model file, remembered in the home for as long as path, size, time and inode stay the same."""
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            identity = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            cache = folder(home) / DIGESTS
            known = _digests(cache)
            match known.get(str(path.resolve())):
                case [size, mtime_ns, inode, str(digest_hex)] if [size, mtime_ns, inode] == identity:
                    return bytes.fromhex(digest_hex)
            digest = hashlib.sha256()
            done = 0
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if on_progress:
                    on_progress(done / stat.st_size)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    _remember(cache, {**known, str(path.resolve()): [*identity, digest.hexdigest()]})
    return digest.digest()


def pull(home: Path, repo: str, file: str) -> Model:
    """Download one GGUF file from the Hugging Face hub: the only thing here that reaches the network.

    What came before a failure stays in the staging folder: the next try goes on from there.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ModelDownloadError('downloading needs an extra: pip install "kvctl[hub]"') from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry
    target = folder(home) / f"{Path(file).stem}.gguf"
    if target.exists():
        raise ModelDownloadError(f"{target} exists already; remove it first")
    staging = folder(home) / ".download"
    try:
        fetched = hf_hub_download(repo_id=repo, filename=file, local_dir=staging)
    except Exception as error:  # noqa: BLE001  the hub client raises errors of its HTTP library as they come
        raise ModelDownloadError(f"cannot download {file} from {repo}: {_cause(error)}") from None
    try:
        check(Path(fetched))
        os.replace(fetched, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return _model(target)


def _model(path: Path) -> Model:
    summary = check(path)
    return Model(path.stem, path, path.stat().st_size, summary)


def _digests(cache: Path) -> dict[str, Any]:
    """Resolved path -> [size, mtime_ns, inode, hex digest]; nothing if the file is missing or not ours."""
    try:
        found = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(cache: Path, digests: dict[str, Any]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replaced(cache) as temporary:
            temporary.write_text(json.dumps(digests), encoding="utf-8")
    except OSError:
        return  # a read-only home only costs hashing again next time


def _cause(error: BaseException) -> str:
    """The reason in one line, from the innermost error that says something about the network."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (ConnectionError, TimeoutError, socket.gaierror)) or type(seen).__name__ in _OFFLINE:
            return "no network, or the hub cannot be reached"
        seen = seen.__cause__ or seen.__context__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""The model registry and the check in front of it."""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import os
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.errors import ModelDownloadError, ModelError
from appliance.ops import models
from appliance.ops.gguf_check import check
from tests.support.models import tiny_model


def test_add_list_and_resolve(tmp_path: Path) -> None:
    added = models.add(tmp_path, tiny_model())
    assert added.path == tmp_path / "models" / "tiny.gguf"
    assert added.summary.architecture == "llama"
    assert added.summary.parameters > 1_000_000
    assert models.list_models(tmp_path) == [added]
    assert models.resolve(tmp_path, "tiny") == added.path
    assert models.resolve(tmp_path, str(tiny_model())) == tiny_model()
    assert models.add(tmp_path, tiny_model()) == added, "adding the same file again changes nothing"


def test_another_file_of_a_known_name_is_refused(tmp_path: Path) -> None:
    models.add(tmp_path, tiny_model())
    other = tmp_path / "tiny.gguf"
    other.write_bytes(tiny_model().read_bytes())
    with pytest.raises(ModelError, match="exists already"):
        models.add(tmp_path, other)


def test_a_file_is_copied_where_it_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    added = models.add(tmp_path, tiny_model())
    assert added.path.read_bytes() == tiny_model().read_bytes()
    assert not added.path.samefile(tiny_model())


def test_a_mistyped_name_gets_a_hint(tmp_path: Path) -> None:
    models.add(tmp_path, tiny_model())
    with pytest.raises(ModelError, match='did you mean "tiny"'):
        models.resolve(tmp_path, "tinny")
    with pytest.raises(ModelError, match="model list"):
        models.resolve(tmp_path, "xxxxxxxx")
    with pytest.raises(ModelError, match="No such file"):
        models.resolve(tmp_path, "./none.gguf")


def header(pairs: bytes = b"", n_pairs: int = 0, tensors: bytes = b"", n_tensors: int = 1, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs) + pairs + tensors


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


ARCH = text("general.architecture") + struct.pack("<I", 8) + text("llama")
TENSOR = text("w") + struct.pack("<IQQIQ", 2, 4, 4, 0, 0)

BAD = {
    "empty": b"",
    "text": b"hello, I am not a model",
    "only magic": b"GGUF",
    "future version": header(version=9),
    "no tensors": header(ARCH, 1, n_tensors=0),
    "many tensors": header(ARCH, 1, n_tensors=2**60),
    "many pairs": header(ARCH, 2**60),
    "endless key": header(struct.pack("<Q", 2**62), 1),
    "endless value": header(text("k") + struct.pack("<IQ", 8, 2**62), 1),
    "endless list": header(text("k") + struct.pack("<IIQ", 9, 4, 2**40), 1),
    "nested list": header(text("k") + struct.pack("<IIQ", 9, 9, 1), 1),
    "unknown type": header(text("k") + struct.pack("<I", 77), 1),
    "zero alignment": header(text("general.alignment") + struct.pack("<II", 4, 0), 1),
    "part of a split": header(ARCH + text("split.count") + struct.pack("<IH", 2, 3), 2),
    "no architecture": header(b"", 0, TENSOR),
    "unknown quantisation": header(ARCH, 1, text("w") + struct.pack("<IQIQ", 1, 4, 4242, 0)),
    "odd shape": header(ARCH, 1, text("w") + struct.pack("<IQIQ", 1, 31, 8, 0)),
    "many dimensions": header(ARCH, 1, text("w") + struct.pack("<I", 2**31)),
    "tensor beyond the end": header(ARCH, 1, TENSOR) + bytes(32),
    "tensor far away": header(ARCH, 1, text("w") + struct.pack("<IQQIQ", 2, 4, 4, 0, 2**62)) + bytes(200),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_clear_line_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[name])
    home = tmp_path / "home"
    for attempt in (lambda: models.add(home, path), lambda: models.resolve(home, str(path)), lambda: check(path)):
        with pytest.raises(ModelError) as caught:
            attempt()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not home.exists()


def test_a_minimal_good_file_passes(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(header(ARCH, 1, TENSOR) + bytes(32 + 64))
    assert check(path).parameters == 16


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = tiny_model().read_bytes()
    path = tmp_path / "cut.gguf"
    for keep in (len(whole) - 33, len(whole) // 2, 5000, 900, 100, 30):
        path.write_bytes(whole[:keep])
        with pytest.raises(ModelError, match=r"truncated|damaged"):
            check(path)


def test_a_folder_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="directory"):
        models.add(tmp_path, tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_mutated_header_passes_or_is_refused_but_never_crashes(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    data = bytearray(tiny_model().read_bytes()[:200_000])
    for at, value in flips:
        data[at] = value
    path = tmp_path / "mutated.gguf"
    path.write_bytes(data)
    with contextlib.suppress(ModelError):
        check(path)


def test_the_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    hashed = []
    real = hashlib.sha256
    monkeypatch.setattr(models.hashlib, "sha256", lambda: hashed.append(1) or real())
    home = tmp_path / "home"
    assert models.sha256(path, home) == real(b"one").digest()
    assert models.sha256(path, home) == real(b"one").digest()
    assert len(hashed) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert models.sha256(path, home) == real(b"two").digest()
    (home / "models" / models.DIGESTS).write_text('{"' + str(path) + '": "nonsense"}')
    assert models.sha256(path, home) == real(b"two").digest()
    (home / "models" / models.DIGESTS).write_text("not json")
    assert models.sha256(path, home) == real(b"two").digest()


def hub(monkeypatch: pytest.MonkeyPatch, download: Callable[..., str]) -> None:
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_pull_puts_a_checked_file_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, filename: str, local_dir: Path) -> str:
        assert (repo_id, filename) == ("some/repo", "sub/m.gguf")
        target = local_dir / filename
        target.parent.mkdir(parents=True)
        target.write_bytes(tiny_model().read_bytes())
        return str(target)

    hub(monkeypatch, download)
    assert models.pull(tmp_path, "some/repo", "sub/m.gguf").path == tmp_path / "models" / "m.gguf"
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["m.gguf"]


def test_pull_refuses_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, filename: str, local_dir: Path) -> str:
        local_dir.mkdir(parents=True)
        (local_dir / filename).write_bytes(b"<html>")
        return str(local_dir / filename)

    hub(monkeypatch, download)
    with pytest.raises(ModelError, match="not a GGUF"):
        models.pull(tmp_path, "some/repo", "m.gguf")
    assert list((tmp_path / "models").iterdir()) == []


def test_pull_without_network_or_extra_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(**_: Any) -> str:
        raise RuntimeError("a\nlong\nstory") from ConnectionRefusedError(111, "refused")

    hub(monkeypatch, download)
    with pytest.raises(ModelDownloadError, match="no network") as caught:
        models.pull(tmp_path, "some/repo", "m.gguf")
    assert "\n" not in str(caught.value)

    def full(**_: Any) -> str:
        raise OSError(28, "No space left on device")

    hub(monkeypatch, full)
    with pytest.raises(ModelDownloadError, match="No space"):
        models.pull(tmp_path, "some/repo", "m.gguf")
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModelDownloadError, match=r"kvctl\[hub\]"):
        models.pull(tmp_path, "some/repo", "m.gguf")

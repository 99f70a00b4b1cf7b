"""kvctl model with real files: a synthetic one, a copy under a name, and files that are no models."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.errors import ModelDownloadError
from appliance.ops import models
from appliance.ops.synth import PRESETS
from kvctl.diagnostics import ExitCode
from tests.cli.conftest import Kvctl


@pytest.fixture
def tiny(kvctl: Kvctl, tmp_path: Path) -> Path:
    out = tmp_path / "made" / "my-tiny.gguf"
    result = kvctl("model", "synth", "tiny", "--out", str(out))
    assert (result.code, result.out) == (ExitCode.OK, f"{out}\n")
    return out


def test_synth_writes_among_the_models_and_list_shows_it(kvctl: Kvctl, home: Path) -> None:
    path = home / "models" / "tiny.gguf"
    assert kvctl("model", "synth", "tiny", "--json").json == {"name": "tiny", "path": str(path)}
    (listed,) = kvctl("model", "list", "--json").json["models"]
    assert (listed["name"], listed["path"], listed["size_bytes"]) == ("tiny", str(path), path.stat().st_size)
    assert kvctl("model", "list").out.splitlines()[1].split()[0] == "tiny"


def test_add_makes_a_file_known_by_its_name(kvctl: Kvctl, home: Path, tiny: Path) -> None:
    result = kvctl("model", "add", str(tiny))
    assert (result.code, result.out) == (ExitCode.OK, f"{home / 'models' / 'my-tiny.gguf'}\n")
    assert "kvctl serve --model my-tiny" in result.err
    assert models.resolve(home, "my-tiny").read_bytes() == tiny.read_bytes()


def test_an_empty_list_says_what_to_do(kvctl: Kvctl) -> None:
    result = kvctl("model", "list")
    assert result.code == ExitCode.OK
    assert "kvctl model add" in result.err
    assert kvctl("model", "list", "--json").json == {"models": []}


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 not a model", "truncated"])
def test_a_file_that_is_no_model(
    kvctl: Kvctl, home: Path, tmp_path: Path, tiny: Path, content: bytes | str | None
) -> None:
    file = tmp_path / "bad.gguf"
    if content is not None:
        file.write_bytes(tiny.read_bytes()[:-1000] if isinstance(content, str) else content)
    result = kvctl("model", "add", str(file))
    assert result.code == ExitCode.MODEL
    assert result.complaint.startswith(str(file))
    assert not (home / "models" / "bad.gguf").exists()


def test_an_unknown_preset_lists_the_known_ones(kvctl: Kvctl) -> None:
    result = kvctl("model", "synth", "tyni")
    assert result.code == ExitCode.USAGE
    assert "tiny, qwen2.5-0.5b, qwen2.5-7b, llama-3.1-8b" in result.complaint


def test_help_names_every_preset(kvctl: Kvctl) -> None:
    told = " ".join(kvctl("model", "synth", "--help").out.split())
    assert all(preset in told for preset in PRESETS)


def test_a_download_that_fails_has_its_own_code(kvctl: Kvctl, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(home: Path, repo: str, file: str) -> models.Model:
        raise ModelDownloadError(f"cannot download {file} from {repo}: no network, or the hub cannot be reached")

    monkeypatch.setattr(models, "pull", pull)
    result = kvctl("model", "pull", "owner/name", "x.gguf")
    assert result.code == ExitCode.DOWNLOAD
    assert "no network" in result.complaint

"""The build of the house: profiles travel in the wheel, the pins cover the dependencies, setup says what is missing."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import zipfile
from pathlib import Path

import pytest
import tomli
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "scripts" / "setup.sh"


def _name(requirement: str) -> str:
    return re.split(r"[\[=<>!~ ;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_a_wheel_carries_the_profiles_where_config_looks_for_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("kvctl", "appliance", "profiles"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    (source / "README.md").write_text("kvctl\n")
    wheel = next(WheelBuilder(str(source)).build(directory=str(tmp_path), versions=["standard"]))
    names = zipfile.ZipFile(wheel).namelist()
    assert "appliance/config.py" in names
    for profile in (ROOT / "profiles").glob("*.toml"):
        assert f"profiles/{profile.name}" in names


def test_every_dependency_is_pinned() -> None:
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    wanted = {_name(r) for r in [*project["dependencies"], *optional["dev"], *optional["hub"], *optional["plot"]]}
    lines = [
        line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    assert all(re.match(r"[a-z0-9.-]+==[\w.]+( ; .+)?$", line) for line in lines)
    assert wanted <= {_name(line) for line in lines}


def test_setup_names_every_missing_package_in_one_line(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (repo / "scripts").mkdir(parents=True)
    shutil.copy(SETUP, repo / "scripts")
    bare = tmp_path / "bin"  # a machine with nothing but the shell's own tools
    bare.mkdir()
    for tool in ("bash", "dirname", "cat"):
        os.symlink(shutil.which(tool) or tool, bare / tool)
    result = subprocess.run(
        [str(bare / "bash"), str(repo / "scripts" / "setup.sh")],
        env={"PATH": str(bare)},
        capture_output=True,
        text=True,
    )
    wanted = "python3-venv build-essential cmake"
    assert result.returncode == 1
    assert result.stderr == f"make setup: missing: {wanted}; install with: sudo apt-get install -y {wanted}\n"
    assert not (repo / ".venv").exists()


def test_setup_refuses_an_unknown_gpu() -> None:
    result = subprocess.run(["bash", str(SETUP), "cuba"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "make setup: GPU=cuba is not known; use GPU=cuda, rocm, vulkan, metal or cpu\n"


def test_no_test_can_leave_this_machine() -> None:
    for address in (("192.0.2.1", 80), ("example.invalid", 80)):
        with pytest.raises(AssertionError, match="a test tried to"):
            socket.create_connection(address, timeout=0.1)

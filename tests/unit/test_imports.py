"""What an import drags in, proven in a process of its own. The static rules are import-linter's, in pyproject.toml."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch",
    "llama_cpp",
    "textual",
    "fastapi",
    "starlette",
    "uvicorn",
    "numpy",
    "lmdb",
    "httpx",
    "gguf",
    "cryptography",
    "jinja2",
}


def _modules_after(statement: str) -> set[str]:
    code = f"import sys, json; before = set(sys.modules)\n{statement}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(run.stdout.splitlines()[-1])}


def test_the_command_line_starts_light() -> None:
    assert not _modules_after("import kvctl.cli") & HEAVY


def test_help_starts_light() -> None:
    loaded = _modules_after("from kvctl.cli import run; assert run(['--help']) == 0")
    assert not loaded & (HEAVY | {"pydantic"})


@pytest.mark.parametrize("module", ["appliance.types", "appliance.errors"])
def test_nouns_and_errors_need_only_the_standard_library(module: str) -> None:
    foreign = {name for name in _modules_after(f"import {module}") if name not in sys.stdlib_module_names}
    assert foreign == {"appliance"}


@pytest.mark.parametrize(
    "module", ["appliance.engine.base", "appliance.engine.client", "appliance.kv.base", "appliance.plan.planner"]
)
def test_contracts_start_light(module: str) -> None:
    assert not _modules_after(f"import {module}") & (HEAVY - {"numpy"})


def test_module_form_runs(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "kvctl.cli", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("kvctl 0.")

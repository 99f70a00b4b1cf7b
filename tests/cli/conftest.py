from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance import config
from kvctl.cli import run
from tests.support.appliance import Ran
from tests.support.fake_appliance import FakeAppliance, fake_appliance, initialise


class Result(Ran):
    @property
    def complaint(self) -> str:
        """The one line on stderr that a failure is, without its prefix."""
        assert self.out == ""
        assert self.err.startswith("kvctl: ")
        assert self.err.count("\n") == 1
        return self.err.removeprefix("kvctl: ").rstrip("\n")


Kvctl = Callable[..., Result]


@pytest.fixture
def kvctl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Kvctl:
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*arguments: str) -> Result:
        code = run(list(arguments))
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err, "colour where nobody watches"
        if not captured.out.startswith(("{", "/")):  # JSON and paths are for programs
            assert all(len(line) <= 80 for line in captured.out.splitlines())
        return Result(int(code), captured.out, captured.err)

    return invoke


@pytest.fixture
def home() -> Path:
    """As set for every test by KVCTL_HOME; not initialised."""
    return config.home()


@pytest.fixture
def stopped(home: Path) -> Path:
    """An initialised home where nothing runs."""
    initialise(home, "http://127.0.0.1:9/v1")
    return home


@pytest.fixture
def appliance(home: Path) -> Iterator[FakeAppliance]:
    with fake_appliance(home) as fake:
        yield fake

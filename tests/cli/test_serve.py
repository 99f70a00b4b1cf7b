"""kvctl serve up to the call of build.serve, and how it shows what that reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from appliance import build
from appliance.api.control import TierStatus
from appliance.api.serve import Draining, StartProgress, StartReady
from appliance.build import ServeOptions
from appliance.errors import AlreadyRunning
from kvctl.diagnostics import ExitCode
from tests.cli import canned
from tests.cli.conftest import Kvctl

READY = StartReady(
    pid=4242,
    model="qwen2.5-0.5b-q8_0",
    description="qwen2 0.5B Q8_0 [/x]",
    context_tokens=16384,
    base_url="http://127.0.0.1:8080/v1",
    client_file="/home/someone/with/a/very/long/name/.local/state/kvctl/client.toml",
    tiers=[TierStatus(**tier) for tier in canned.TIERS],
    notes=["the pool could not be locked in memory: raise it with ulimit -l unlimited, or set tiers.dram.lock=false"],
    seconds=3.4,
)
EVENTS = [
    StartProgress(text="loading qwen2.5-0.5b-q8_0", fraction=0.0),
    StartProgress(text="loading qwen2.5-0.5b-q8_0", fraction=0.5),
    StartProgress(text="opening the store"),
    READY,
]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    """The options build.serve was called with; it reports EVENTS and ends well."""
    calls: list[ServeOptions] = []

    def serve(options: ServeOptions) -> int:
        calls.append(options)
        for event in EVENTS:
            options.report(event)
        return 0

    monkeypatch.setattr(build, "serve", serve)
    return calls


def test_typed_flags_beat_the_file(kvctl: Kvctl, served: list[ServeOptions], home: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text('[server]\nport = 1\nmax_queue = 5\n[model]\npath = "from-file"\n')
    result = kvctl("serve", "--profile", str(file), "--port", "0", "--host", "::1", "--set", "tiers.dram.capacity=3GiB")
    assert result.code == ExitCode.OK
    (options,) = served
    server = options.profile.server
    assert (server.port, server.host, server.max_queue) == (0, "::1", 5)
    assert options.profile.tiers.dram.capacity == 3 * 2**30
    assert (options.home, options.model, options.synth) == (home, "from-file", False)


@pytest.mark.parametrize(
    ("typed", "model", "synth"),
    [
        (["--model", "a.gguf", "--set", "model.path=b.gguf"], "a.gguf", False),
        (["--synth", "--set", "model.path=b.gguf"], None, True),
        (["--set", "engine.kind=null"], None, False),
    ],
)
def test_which_model(
    kvctl: Kvctl, served: list[ServeOptions], typed: list[str], model: str | None, synth: bool
) -> None:
    assert kvctl("serve", *typed).code == ExitCode.OK
    assert (served[0].model, served[0].synth) == (model, synth)


def test_without_a_model_it_says_how_to_get_one(kvctl: Kvctl, served: list[ServeOptions]) -> None:
    result = kvctl("serve")
    assert result.code == ExitCode.USAGE
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 3
    for line, way in zip(lines, ("serve --model FILE.gguf", "model pull REPO FILE", "serve --synth"), strict=True):
        assert line.endswith(f"kvctl {way}")
    assert served == []


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        (["--model", "a", "--synth"], "--model and --synth exclude each other"),
        (["--synth", "--set", "tiers.dram.capcity=1GiB"], 'did you mean "tiers.dram.capacity"?'),
        (["--synth", "--set", "engine.context_tokens=many"], "engine.context_tokens: should be a valid integer"),
        (["--synth", "--set", "tiers.dram.capacity=lots"], '"lots" is not a size; write it like "64GiB"'),
        (["--synth", "--set", "server=9"], '"server" is a section; set one of its keys: server.host, server.port'),
        (["--synth", "--profile", "lptop-cpu"], 'did you mean "laptop-cpu"?'),
        (["--synth", "--port", "65536"], "--port"),
    ],
)
def test_wrong_flags(kvctl: Kvctl, served: list[ServeOptions], typed: list[str], complaint: str) -> None:
    result = kvctl("serve", *typed)
    assert result.code == ExitCode.USAGE
    assert complaint in result.complaint
    assert served == []


def test_the_start_panel_fits_and_leaves_stdout_alone(kvctl: Kvctl, served: list[ServeOptions]) -> None:
    result = kvctl("serve", "--synth")
    assert result.out == ""
    lines = result.err.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[:2] == ["loading qwen2.5-0.5b-q8_0", "opening the store"], "each step once"
    joined = " ".join(" ".join(line.strip("│ ").split()) for line in lines)
    for part in (
        "ready in 3.4 s, pid 4242",
        READY.base_url,
        "client.toml",
        READY.model,
        "16,384 tokens",
        "dram 1 GiB",
        "note: ",
        'kvctl chat "Hello"',
    ):
        assert part in joined
    assert len(lines) <= 24


def test_draining_is_said_on_stderr_alone(kvctl: Kvctl, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(options: ServeOptions) -> int:
        options.report(Draining(requests=2))
        return 0

    monkeypatch.setattr(build, "serve", serve)
    for typed in ([], ["--json"]):
        result = kvctl("serve", "--synth", *typed)
        assert result.code == ExitCode.OK
        assert result.complaint == "draining: 2 requests running; again to stop at once"


def test_json_is_one_event_a_line(kvctl: Kvctl, served: list[ServeOptions]) -> None:
    result = kvctl("serve", "--synth", "--json")
    assert [json.loads(line) for line in result.out.splitlines()] == [event.model_dump(mode="json") for event in EVENTS]
    assert result.err == ""


def test_the_exit_code_is_the_appliances(kvctl: Kvctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "serve", lambda options: 130)
    assert kvctl("serve", "--synth").code == ExitCode.INTERRUPTED


def test_a_second_appliance_is_refused(kvctl: Kvctl, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(options: ServeOptions) -> int:
        raise AlreadyRunning("an appliance (pid 7) is running here", pid=7)

    monkeypatch.setattr(build, "serve", serve)
    result = kvctl("serve", "--synth")
    assert result.code == ExitCode.ALREADY_RUNNING
    assert result.complaint == "an appliance (pid 7) is running here"

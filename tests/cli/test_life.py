"""The real appliance from its first signal to its exit code, and what it says of itself meanwhile."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from appliance import build
from appliance.ops.init import init
from appliance.server.listen import Bound
from kvctl.child import KVCTL
from kvctl.diagnostics import ExitCode
from tests.cli.conftest import Kvctl
from tests.support.appliance import BLOCK, Appliance, appliance, arguments, prompt, until
from tests.support.models import tiny_model

LONG = 30_000
"""Tokens that take the tiny model many seconds."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Appliance]:
    with appliance(tmp_path / "home", {"engine.context_tokens": 32768}) as running:
        yield running


def drains(served: Appliance) -> None:
    until(lambda: "draining: 1 request running; again to stop at once\n" in served.child.said(), "draining")


def test_the_first_signal_lets_an_answer_finish(served: Appliance) -> None:
    with served.stream(prompt(1, BLOCK), max_tokens=1000, ignore_eos=True) as lines:
        assert next(lines).startswith("data: ")
        served.signal(signal.SIGINT)
        drains(served)
        assert served.get("/health").json() == {"status": "draining"}
        refused = served.post("/v1/completions", {"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert served.status().state == "draining"
        assert list(lines)[-1] == "data: [DONE]"
    assert served.child.wait() == ExitCode.OK


def test_the_second_signal_cuts_it_short_and_keeps_what_was_computed(served: Appliance) -> None:
    asked = prompt(1, 2 * BLOCK)
    with served.stream(asked, max_tokens=LONG, ignore_eos=True) as lines:
        assert next(lines).startswith("data: ")
        served.signal(signal.SIGTERM)
        drains(served)
        served.signal(signal.SIGTERM)
        assert "the appliance is stopping" in list(lines)[-1]
    assert served.child.wait() == ExitCode.INTERRUPTED
    served.start()
    assert served.complete(asked).sources["nvme"] == 2 * BLOCK - 1


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, ExitCode.OK), (signal.SIGHUP, ExitCode.OK), (signal.SIGINT, ExitCode.INTERRUPTED)],
)
def test_a_signal_while_loading_ends_it_quietly(tmp_path: Path, number: signal.Signals, code: ExitCode) -> None:
    init(tmp_path)
    command = [*KVCTL, "--home", str(tmp_path), "serve", "--json", *arguments({}, tiny_model())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["kind"] == "progress"
        process.send_signal(number)
        assert '"ready"' not in process.stdout.read()
        assert process.stderr.read() == ""
    assert process.returncode == code


def test_status_and_metrics_tell_the_same(tmp_path: Path) -> None:
    n_tokens = 40 * BLOCK  # more than the pool holds
    with appliance(tmp_path, {"tiers.dram.capacity": "1MiB"}) as served:
        for _ in range(2):
            served.complete(prompt(1, n_tokens))
            served.forget("hbm", "dram")
        totals, metrics = served.status().totals, served.metrics()
    assert totals.computed_tokens == n_tokens + 1
    assert totals.cached_tokens == {"hbm": 0, "dram": 0, "nvme": n_tokens - 1, "remote": 0}
    assert totals.loaded_bytes["nvme"] > 0
    assert totals.load_bytes_per_s["nvme"] > 0
    assert totals.evicted_blocks["dram"] > 0
    for name in ("prompt_tokens", "computed_tokens", "completion_tokens"):
        assert metrics[f"kvctl_{name}_total"] == getattr(totals, name)
    assert metrics["kvctl_cached_tokens_total"] == sum(totals.cached_tokens.values())
    assert metrics["kvctl_load_bytes_total"] == sum(totals.loaded_bytes.values())
    assert metrics["kvctl_store_bytes_total"] == sum(totals.stored_bytes.values())
    assert metrics["kvctl_evicted_blocks_total"] == sum(totals.evicted_blocks.values())
    assert metrics["kvctl_quarantined_total"] == totals.quarantined_blocks == 0


def test_without_the_store_it_serves_and_says_so(tmp_path: Path) -> None:
    with appliance(tmp_path, {"kv.enabled": "false"}) as running:
        assert running.complete("x").completion_tokens > 0
        assert [tier.state for tier in running.status().tiers] == ["ok", "off", "off"]


def test_the_model_is_as_old_as_its_file(served: Appliance) -> None:
    (model,) = served.get("/v1/models").json()["data"]
    assert model["created"] == int(tiny_model().stat().st_mtime)


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        (("127.0.0.1", 80), False),
        (("::1", 80, 0, 0), False),
        (("0.0.0.0", 80), True),
        (("fe80::1%eth0", 80, 0, 2), True),
    ],
)
def test_others_who_can_listen_in_are_warned_of(address: tuple[object, ...], warned: bool) -> None:
    public = Mock(spec=socket.socket)
    public.getsockname.return_value = address
    notes = build._exposure(Bound(public, Mock(), Path("admin.sock"), ""))
    assert len(notes) == warned
    assert all("TLS proxy" in note and "ssh -L 80:" in note for note in notes)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda key: key.write_bytes(bytes(32)), "wrong key: "),
        (lambda key: key.write_bytes(b"short"), "must hold exactly 32 bytes"),
        (lambda key: key.chmod(0o644), "run: chmod 600 "),
        (lambda key: key.unlink(), "cannot read the key file "),
    ],
    ids=["wrong", "short", "loose", "gone"],
)
def test_a_key_file_that_does_not_unlock_has_its_own_code(
    kvctl: Kvctl, home: Path, spoil: Callable[[Path], object], complaint: str
) -> None:
    spoil(init(home).key_file)
    result = kvctl("serve", "--synth")
    assert result.code == ExitCode.KEYRING
    assert complaint in result.complaint


def test_a_port_in_use(kvctl: Kvctl, home: Path) -> None:
    init(home)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = kvctl("serve", "--set", "engine.kind=null", "--port", str(port))
    assert result.code == ExitCode.FAILURE
    assert result.complaint == f"port {port} on 127.0.0.1 is in use; choose another with --port"


def test_a_home_that_is_not_there_or_cannot_be_written(kvctl: Kvctl, tmp_path: Path) -> None:
    missing = kvctl("serve", "--synth", "--home", str(tmp_path / "none"))
    assert missing.code == ExitCode.NOT_INITIALISED
    assert missing.complaint == f"{tmp_path / 'none'} is not initialised; run: kvctl init"
    (tmp_path / "file").write_text("")
    closed = kvctl("serve", "--synth", "--home", str(tmp_path / "file" / "home"))
    assert closed.code == ExitCode.FAILURE
    assert closed.complaint == f"{tmp_path / 'file' / 'home'} cannot be written: Not a directory"

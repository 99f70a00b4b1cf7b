"""A trace is recorded from a running appliance, holds no content, and is replayed."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from kvctl.child import KVCTL
from tests.support.appliance import BLOCK, ROOT, Appliance, kvctl, prompt, text, until


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_what_requests_ask_is_recorded_in_numbers_and_replayed(served: Appliance, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    recording = subprocess.Popen(
        [*KVCTL, "--home", str(served.home), "trace", "record", str(file)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        until(lambda: bool(lines(file)), "a header")
        first = prompt(70, 5 * BLOCK + 3)
        answered = served.complete(first)
        served.complete([*first, *answered.text.encode(), *prompt(71, 2 * BLOCK)])
        until(lambda: len(lines(file)) == 3, "two requests")
        recording.send_signal(signal.SIGINT)
        _, said = recording.communicate(timeout=30)
    finally:
        recording.kill()
    assert recording.returncode == 0
    assert "2 requests" in said
    header, one, two = map(json.loads, lines(file))
    assert header["block_tokens"] == BLOCK
    assert one["path"] == [[0, 4]]
    assert (one["prompt_blocks"], one["tenant"], two["tenant"]) == (5, 0, 0)
    assert two["path"] == [[0, two["path"][0][1]]]
    assert two["prompt_blocks"] == 7
    assert text(first)[:20] not in file.read_text()
    replayed = kvctl(served.home, "simulate", str(file), "--policy", "lru", "--json")
    assert replayed.code == 0, replayed.err
    (run,) = replayed.json["runs"]
    assert (run["requests"], run["dram_blocks"], run["prompt_blocks"]) == (2, 5, 12)
    table = kvctl(served.home, "simulate", str(file), "--dram", "1MiB", "--dram", "2MiB")
    assert table.code == 0
    assert table.out.count("lru") == 2


def test_nothing_is_kept_when_nobody_listens(served: Appliance) -> None:
    with subprocess.Popen(
        [*KVCTL, "--home", str(served.home), "trace", "record", "/dev/null", "--for", "10ms"], cwd=ROOT
    ) as recording:
        assert recording.wait(30) == 0
    served.complete(prompt(72, 100))


def test_what_is_no_trace_is_refused_in_one_line(served: Appliance, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello\n")
    for path, says in ((tmp_path / "x", "is not a trace"), (tmp_path / "absent", "No such file")):
        ran = kvctl(served.home, "simulate", str(path))
        assert (ran.code, ran.out) == (2, "")
        assert says in ran.err
        assert ran.err.count("\n") == 1
    ran = kvctl(served.home, "simulate", str(tmp_path / "x"), "--policy", "lfu")
    assert (ran.code, ran.err.count("\n")) == (2, 1)

"""The command line from an empty folder to an orderly stop, as a person or a script types it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvctl.child import KVCTL
from kvctl.diagnostics import ExitCode
from tests.support.appliance import BLOCK, ROOT, Appliance, appliance, arguments, kvctl, prompt, text
from tests.support.models import tiny_model


@contextmanager
def serving(home: Path, *typed: str) -> Iterator[subprocess.Popen[str]]:
    """`kvctl serve --json` as a process to send signals to."""
    command = [*KVCTL, "--home", str(home), "serve", "--json", *typed]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def test_from_an_empty_folder_to_a_served_model(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "mine.gguf"
    made = kvctl(home, "init", "--json").json
    assert kvctl(home, "init", "--json").json == {**made, "created": []}, "again: nothing to do"
    assert kvctl(home, "model", "synth", "tiny", "--out", str(file)).out == f"{file}\n"
    added = kvctl(home, "model", "add", str(file), "--json").json
    assert kvctl(home, "model", "list", "--json").json == {"models": [added]}
    with appliance(home, model=Path("mine")) as served:
        assert served.model == added["name"] == "mine"
        status = kvctl(home, "status", "--json").json
        assert (status["state"], status["pid"]) == ("ready", served.child.pid)
        answer = kvctl(home, "chat", "--json", "--max-tokens", "5", "Hello").json
        assert (answer["completion_tokens"], len(answer["answer"])) == (5, 5)
        said = kvctl(home, "chat", "--max-tokens", "5", "Hello")
        assert len(said.out) == len("12345\n")
        assert "prompt tokens cached" in said.err
        assert [tenant["tenant"] for tenant in kvctl(home, "tenant", "list", "--json").json["tenants"]] == ["default"]
        for command in (["status"], ["inspect"], ["tenant", "list"], ["model", "list"], ["verify"]):
            shown = kvctl(home, *command)
            assert (shown.code, shown.err) == (0, "")
            assert shown.out
    assert kvctl(home, "status").code == ExitCode.NOT_RUNNING


def test_a_prompt_file_is_computed_found_and_moved_up(served: Appliance, tmp_path: Path) -> None:
    tokens = prompt(1, BLOCK * 7 + 21)
    file = tmp_path / "prompt.txt"
    file.write_text(text(tokens))
    n = len(tokens)

    def spans() -> list[dict[str, object]]:
        found = kvctl(served.home, "inspect", "--prompt-file", str(file), "--json").json
        assert found["prompt_tokens"] == n
        return found["spans"]

    def prefetch(*typed: str) -> dict[str, int]:
        done = kvctl(served.home, "prefetch", "--prompt-file", str(file), *typed, "--json").json
        assert done["done"]
        return {name: done[name] for name in ("moved_tokens", "computed_tokens")}

    assert spans() == [{"start": 0, "stop": n, "tier": "none"}]
    assert prefetch("--to", "dram") == {"moved_tokens": 0, "computed_tokens": 0}, "nothing to move"
    assert prefetch("--compute") == {"moved_tokens": 0, "computed_tokens": n}
    served.forget("hbm", "dram")
    assert spans() == [{"start": 0, "stop": n, "tier": "nvme"}]
    assert prefetch("--to", "dram") == {"moved_tokens": n, "computed_tokens": 0}
    assert spans() == [{"start": 0, "stop": n, "tier": "dram"}]
    assert prefetch("--to", "hbm") == {"moved_tokens": n - 1, "computed_tokens": 1}, "the last one, for its logits"
    assert spans() == [{"start": 0, "stop": n, "tier": "hbm"}]
    warm, cold = served.complete(tokens), served.complete(tokens, cache_salt="0" * 32)
    assert (warm.cached_tokens, cold.cached_tokens) == (n - 1, 0)
    assert warm.text == cold.text


def test_a_messages_file_has_the_tokens_of_the_chat(served: Appliance, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s" * 300}, {"role": "user", "content": "What is it?"}]
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(messages))
    kvctl(served.home, "prefetch", "--messages", str(file), "--compute")
    answer = served.chat(messages)
    assert answer.cached_tokens == answer.prompt_tokens - 1


def test_verify_reads_every_record_while_it_runs(served: Appliance) -> None:
    served.complete(prompt(2, BLOCK * 3))
    served.settle()
    result = kvctl(served.home, "verify", "--json")
    assert result.code == ExitCode.OK
    blocks = served.tier("nvme").blocks
    assert (result.json["records"], result.json["ok"], result.json["bad"]) == (blocks, blocks, {})


def test_a_second_appliance_is_refused_by_the_pid_of_the_first(served: Appliance) -> None:
    second = kvctl(served.home, "serve", *arguments({}, tiny_model()))
    assert second.code == ExitCode.ALREADY_RUNNING
    assert str(served.child.pid) in second.err
    assert second.err.count("\n") == 1
    offline = kvctl(served.home, "serve", "--set", "engine.kind=null", "--port", "0")
    assert offline.code == ExitCode.ALREADY_RUNNING
    assert served.status().state == "ready"


def test_serve_without_a_model_says_in_three_lines_how_to_get_one(tmp_path: Path) -> None:
    kvctl(tmp_path, "init")
    result = kvctl(tmp_path, "serve")
    assert result.code == ExitCode.USAGE
    lines = result.err.splitlines()
    assert len(lines) == 3
    for line, way in zip(lines, ("--model FILE", "model pull", "--synth"), strict=True):
        assert way in line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.OK)])
def test_a_signal_while_loading_ends_it(tmp_path: Path, number: signal.Signals, code: ExitCode) -> None:
    kvctl(tmp_path, "init")
    with serving(tmp_path, *arguments({}, tiny_model())) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["kind"] == "progress"
        process.send_signal(number)
        events = [json.loads(line)["kind"] for line in process.stdout]
        assert process.wait() == code
        assert "ready" not in events
        assert process.stderr.read() == ""
    assert not (tmp_path / "admin.sock").exists()
    with appliance(tmp_path) as served:
        assert served.complete(prompt(1, 5)).completion_tokens


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_serving_lets_a_running_stream_finish(tmp_path: Path, number: signal.Signals) -> None:
    with appliance(tmp_path) as served:
        tokens = prompt(1, BLOCK * 2)
        expected = served.complete(tokens, max_tokens=1000).text
        with served.stream(tokens, max_tokens=1000) as lines:
            parts = [next(lines)]
            served.signal(number)
            parts += lines
        assert parts.pop() == "data: [DONE]"
        chunks = [json.loads(part.removeprefix("data: ")) for part in parts]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
        assert served.child.wait() == ExitCode.OK
        assert served.child.said().splitlines() == ["kvctl: draining: 1 request running; again to stop at once"]
        assert not (tmp_path / "admin.sock").exists()

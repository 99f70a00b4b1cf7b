"""What is prefetched, by a folder, a session or without being asked, is in DRAM when the request for it comes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from appliance.api.control import PromptRef
from kvctl.child import KVCTL
from kvctl.client import AdminClient
from kvctl.diagnostics import ExitCode
from tests.support.appliance import BLOCK, ROOT, TOKEN_BYTES, Appliance, appliance, kvctl, prompt, text, until

SYSTEM = "Answer from the document."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for seed in range(4):
        (folder / f"{seed}.txt").write_text(text(prompt(seed, BLOCK * (5 + seed) + 7)))
    (folder / "picture.txt").write_bytes(b"\x89PNG\0")
    (tmp_path / "system.txt").write_text(SYSTEM)
    return folder


def prefetch(served: Appliance, folder: Path, *typed: str) -> list[dict[str, object]]:
    system = str(folder.parent / "system.txt")
    ran = kvctl(served.home, "prefetch", "--dir", str(folder), "--system", system, *typed, "--json")
    assert ran.code == ExitCode.SKIPPED, ran.err
    return [json.loads(line) for line in ran.out.splitlines()]


def states(lines: list[dict[str, object]]) -> list[object]:
    return [line["state"] for line in lines[:-1]]


def test_after_a_restart_a_folder_is_brought_up_and_chats_about_it_hit_dram_to_the_token(
    served: Appliance, folder: Path
) -> None:
    lines = prefetch(served, folder, "--compute")
    assert states(lines) == ["done"] * 4 + ["skipped"]
    computed, prompts = int(str(lines[-1]["computed_tokens"])), int(str(lines[-1]["prompt_tokens"]))
    assert 0.9 * prompts < computed < prompts, "but what they share"
    assert states(prefetch(served, folder, "--compute")) == ["there"] * 4 + ["skipped"], "nothing is done twice"
    served.settle()
    assert served.stop() == 0
    served.start()
    lines = prefetch(served, folder)
    assert (lines[-1]["done"], lines[-1]["computed_tokens"]) == (4, 0)
    for seed in range(4):
        document = (folder / f"{seed}.txt").read_text()
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{document}\nWhat?"}]
        answer = served.chat(messages, max_tokens=1)
        assert answer.sources["nvme"] == 0
        assert answer.sources["dram"] + answer.sources["hbm"] > len(document) + len(SYSTEM)
        assert answer.sources["computed"] < 40, "the question and the frame of the chat"
    counts = served.status().totals.prefetched
    assert counts.hit > 0
    assert counts.late == 0


def test_a_folder_interrupted_goes_on_where_it_stopped(served: Appliance, folder: Path) -> None:
    for file in folder.iterdir():
        file.write_text(text(prompt(50 + int(file.stem, 36) % 40, BLOCK * 40)))
    command = [*KVCTL, "--home", str(served.home), "prefetch", "--dir", str(folder), "--raw", "--compute", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as running:
        assert running.stdout is not None
        assert json.loads(running.stdout.readline())["state"] == "done"
        running.send_signal(signal.SIGINT)
        rest = [json.loads(line) for line in running.stdout]
        assert running.wait() == ExitCode.INTERRUPTED
    assert rest[-1]["complete"] is False
    until(lambda: not served.status().running, "what it left is over")
    ran = kvctl(served.home, *command[len(KVCTL) + 2 :])
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert (ran.code, lines[-1]["complete"]) == (0, True)
    assert lines[0]["state"] == "there"


def test_a_session_is_brought_up_by_its_name_and_is_nobody_elses(served: Appliance) -> None:
    tokens = prompt(40, BLOCK * 6 + 9)
    served.complete(tokens, prompt_cache_key="chat")
    served.forget("hbm", "dram")
    hint = {"prompt_cache_key": "chat"}
    key = kvctl(served.home, "tenant", "add", "other", "--json").json["api_key"]
    with served.client(key) as other:
        assert other.post("/v1/kv/prefetch", json=hint).status_code == 404
    done = served.post("/v1/kv/prefetch", hint).json()
    assert done["moved_tokens"] == done["prompt_tokens"] - 1 > len(tokens), "an answer's last token has no KV yet"
    again = served.complete(tokens, prompt_cache_key="chat")
    assert (again.sources["dram"], again.sources["nvme"]) == (len(tokens) - 1, 0)
    (listed,) = [one for one in kvctl(served.home, "inspect", "--sessions", "--json").json["sessions"] if one["name"]]
    assert (listed["tenant"], listed["turns"]) == ("default", 2)


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[Appliance]:
    """A pool of 32 blocks, of which automatic prefetch has 8; one request runs at a time."""
    settings = {
        "tiers.dram.capacity": 32 * BLOCK * TOKEN_BYTES,
        "kv.eviction": "lru",
        "kv.prefetch_budget": "25%",
        "server.max_running": 1,
    }
    with appliance(tmp_path / "home", settings) as running:
        yield running


def test_while_its_user_thinks_a_session_comes_up_again_after_others_pushed_it_out(crowded: Appliance) -> None:
    tokens = prompt(1, BLOCK * 5)
    crowded.complete(tokens, prompt_cache_key="mine", max_tokens=4)
    time.sleep(2)  # its user thinks: who comes at once is expected at once
    crowded.complete(tokens, prompt_cache_key="mine", max_tokens=4)
    with ThreadPoolExecutor(4) as others:
        list(others.map(lambda n: crowded.complete(prompt(10 + n, BLOCK * 50), max_tokens=1), range(4)))
    with AdminClient(crowded.home) as admin:
        until(lambda: {s.tier for s in admin.inspect(PromptRef(prompt=text(tokens))).spans} == {"dram"}, "brought up")
    answer = crowded.complete(tokens, prompt_cache_key="mine", max_tokens=4)
    assert (answer.sources["nvme"], answer.sources["computed"]) == (0, 1)
    assert crowded.status().totals.prefetched.hit >= 5
    assert "in time" in kvctl(crowded.home, "status").out
    assert crowded.metrics()["kvctl_prefetch_hit_blocks_total"] >= 5

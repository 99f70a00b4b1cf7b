"""kvctl prefetch of sessions, files and folders, against an appliance of canned answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvctl import bulk, output
from kvctl.bulk import WIDTH, progress_line
from kvctl.diagnostics import ExitCode
from tests.cli import canned
from tests.cli.conftest import Kvctl
from tests.support.fake_appliance import FakeAppliance, Reply

ROUTE = "POST /v1/admin/prefetch"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two documents, and seven files that are none."""
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("not me")
    (folder / ".hidden").write_text("nor me")
    (folder / "a.txt").write_text("first")
    (folder / "sub" / "b.md").write_text("second ä")
    (folder / "binary.txt").write_bytes(b"x\0y")
    (folder / "latin.txt").write_bytes(b"\xe4\xff")
    (folder / "empty.txt").write_text(" \n")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    (folder / "long.txt").write_text("too long")
    return folder


def texts_of(appliance: FakeAppliance) -> list[str]:
    return [body["messages"][-1]["content"] for route, body in appliance.requests if route == ROUTE and body]


def answering(appliance: FakeAppliance, stored: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    def reply(body: Any) -> Reply:
        text = body["prompt"] or body["messages"][-1]["content"]
        if text == "too long":
            refusal = {"message": "the context holds 10", "code": "context_length_exceeded", "param": "prompt"}
            return 400, {"error": refusal}
        new = 0 if text in stored else 90
        found = {"dram": 100} if text in stored else {"nvme": 10, "none": 90}
        first = canned.prefetched(prompt_tokens=100, moved_tokens=0, found=found, done=False)
        return 200, [first, canned.prefetched(prompt_tokens=100, found=found, moved_tokens=new, computed_tokens=new)]

    appliance.replies[ROUTE] = reply


def test_a_session_is_named_to_the_appliance(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    appliance.replies[ROUTE] = (200, [canned.prefetched()])
    assert kvctl("prefetch", "--session", "chat-1", "--tenant", "x").code == ExitCode.OK
    asked = appliance.body_of(ROUTE)
    assert asked is not None
    assert (asked["session"], asked["tenant"], asked["messages"], asked["prompt"]) == ("chat-1", "x", None, None)


def test_an_unknown_session_is_said_in_one_line(kvctl: Kvctl, appliance: FakeAppliance) -> None:
    appliance.replies[ROUTE] = (404, {"error": {"message": "no session has it", "code": "session_not_found"}})
    result = kvctl("prefetch", "--session", "chat-1")
    assert (result.code, result.complaint) == (ExitCode.USAGE, "no session has it")


def test_a_chat_request_file_brings_its_tools(kvctl: Kvctl, appliance: FakeAppliance, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}], "tools": tools}))
    appliance.replies[ROUTE] = (200, [canned.prefetched()])
    assert kvctl("prefetch", "--messages", str(file)).code == ExitCode.OK
    asked = appliance.body_of(ROUTE)
    assert asked is not None
    assert asked["tools"] == tools


def test_a_folder_is_its_documents_as_user_messages_in_order(
    kvctl: Kvctl, appliance: FakeAppliance, folder: Path, tmp_path: Path
) -> None:
    answering(appliance)
    system = tmp_path / "system.txt"
    system.write_text("be brief")
    result = kvctl("prefetch", "--dir", str(folder), "--system", str(system), "--compute", "--json")
    assert result.code == ExitCode.SKIPPED
    assert texts_of(appliance) == ["first", "too long", "second ä"]
    asked = appliance.body_of(ROUTE)
    assert asked is not None
    assert asked["messages"][0] == {"role": "system", "content": "be brief"}
    assert (asked["compute"], asked["to"]) == (True, "dram")
    *files, summary = [json.loads(line) for line in result.out.splitlines()]
    assert {Path(file["file"]).name: file["reason"] for file in files if file["state"] == "skipped"} == {
        "binary.txt": "binary",
        "latin.txt": "not UTF-8 text",
        "empty.txt": "empty",
        "long.txt": "too long for the model's context",
    }
    assert [summary[name] for name in ("files", "done", "there", "skipped", "complete")] == [6, 2, 0, 4, True]
    assert (summary["prompt_tokens"], summary["computed_tokens"]) == (200, 180)


def test_what_is_skipped_is_named_on_stderr_and_counted(kvctl: Kvctl, appliance: FakeAppliance, folder: Path) -> None:
    answering(appliance, stored={"first"})
    result = kvctl("prefetch", "--dir", str(folder))
    assert result.code == ExitCode.SKIPPED
    said = result.err.splitlines()
    assert f"skipped {folder / 'binary.txt'}: binary" in said
    assert said[-1] == "kvctl: 4 of 6 files were skipped"
    assert "6: 1 brought up, 1 were there already, 4 skipped" in result.out


def test_a_file_that_may_not_be_read_is_skipped(
    kvctl: Kvctl, appliance: FakeAppliance, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(appliance)
    read = Path.read_bytes

    def refusing(path: Path) -> bytes:
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refusing)
    result = kvctl("prefetch", "--dir", str(folder), "--glob", "[ab].*")
    assert result.code == ExitCode.SKIPPED
    assert f"skipped {folder / 'a.txt'}: Permission denied" in result.err
    assert texts_of(appliance) == ["second ä"]


@pytest.mark.parametrize(
    ("glob", "found"), [("*.md", ["second ä"]), ("sub/*", ["second ä"]), ("a.*", ["first"]), (".hidden", ["nor me"])]
)
def test_a_glob_picks_by_name_or_path(
    kvctl: Kvctl, appliance: FakeAppliance, folder: Path, glob: str, found: list[str]
) -> None:
    answering(appliance)
    assert kvctl("prefetch", "--dir", str(folder), "--glob", glob).code == ExitCode.OK
    assert texts_of(appliance) == found


def test_raw_documents_are_plain_prompts(kvctl: Kvctl, appliance: FakeAppliance, folder: Path) -> None:
    answering(appliance)
    assert kvctl("prefetch", "--dir", str(folder), "--glob", "a.txt", "--raw").code == ExitCode.OK
    asked = appliance.body_of(ROUTE)
    assert asked is not None
    assert (asked["prompt"], asked["messages"]) == ("first", None)


def test_several_files_go_in_one_go(kvctl: Kvctl, appliance: FakeAppliance, tmp_path: Path) -> None:
    answering(appliance)
    files = [tmp_path / name for name in ("one", "two")]
    for file in files:
        file.write_text(file.name)
    chat = tmp_path / "chat.json"
    chat.write_text('[{"role": "user", "content": "hi"}]')
    typed = [word for file in files for word in ("--prompt-file", str(file))]
    result = kvctl("prefetch", *typed, "--messages", str(chat), "--json")
    assert result.code == ExitCode.OK
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [line.get("file") for line in lines] == [*map(str, files), str(chat), None]


def test_of_several_files_one_that_is_wrong_stops_it_before_it_begins(
    kvctl: Kvctl, appliance: FakeAppliance, tmp_path: Path
) -> None:
    good = tmp_path / "good"
    good.write_text("x")
    result = kvctl("prefetch", "--prompt-file", str(good), "--prompt-file", str(tmp_path / "none"))
    assert result.code == ExitCode.USAGE
    assert result.complaint == f"{tmp_path / 'none'}: No such file or directory"
    assert appliance.requests == []


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interruption_says_how_far_it_came_and_the_next_run_goes_on(
    kvctl: Kvctl, appliance: FakeAppliance, folder: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    answering(appliance)
    flags = ["--json"] if as_json else []
    prefetch, asked = bulk.AdminClient.prefetch, 0

    def interrupted(self: Any, request: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise KeyboardInterrupt
        return prefetch(self, request)

    monkeypatch.setattr(bulk.AdminClient, "prefetch", interrupted)
    result = kvctl("prefetch", "--dir", str(folder), "--glob", "[ab].*", *flags)
    assert result.code == ExitCode.INTERRUPTED == 130
    assert "kvctl: 1 of 2 files are done; the same command goes on from there" in result.err
    if as_json:
        assert json.loads(result.out.splitlines()[-1])["complete"] is False
    answering(appliance, stored={"first"})
    result = kvctl("prefetch", "--dir", str(folder), "--glob", "[ab].*", "--json")
    assert [json.loads(line).get("state") for line in result.out.splitlines()] == ["there", "done", None]


def test_an_appliance_without_room_is_asked_again(
    kvctl: Kvctl, appliance: FakeAppliance, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvctl.bulk.time.sleep", lambda seconds: None)
    busy = [True, True, False]
    full = (429, {"error": {"message": "2 of your prefetches are running already"}})
    appliance.replies[ROUTE] = lambda body: full if busy.pop(0) else (200, [canned.prefetched()])
    assert kvctl("prefetch", "--dir", str(folder), "--glob", "a.txt").code == ExitCode.OK
    appliance.replies[ROUTE] = full
    result = kvctl("prefetch", "--dir", str(folder), "--glob", "a.txt")
    assert result.code == ExitCode.API
    assert "0 of 1 files are done" in result.err


def test_a_failure_that_is_not_a_files_stops_it(kvctl: Kvctl, appliance: FakeAppliance, folder: Path) -> None:
    appliance.replies[ROUTE] = (409, {"error": {"message": 'no tenant "x"'}})
    result = kvctl("prefetch", "--dir", str(folder))
    assert result.code == ExitCode.USAGE
    assert result.err.splitlines()[-1] == 'kvctl: no tenant "x"'


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ([], "name one thing to bring up: --session ID, --messages FILE, --prompt-file FILE or --dir DIR"),
        (["--session", "a", "--dir", "."], "name one thing to bring up: "),
        (["--session", "a", "--glob", "*.md"], "--glob, --system and --raw go with --dir"),
        (["--session", "a", "--raw"], "--glob, --system and --raw go with --dir"),
        (["--dir", ".", "--raw", "--system", "x"], "--raw prompts have no system message; leave --system or --raw out"),
        (["--dir", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
        (["--dir", "/dev/null"], "/dev/null: not a folder"),
        (["--dir", "tests/vectors", "--glob", "*.none"], 'tests/vectors: no file here matches "*.none"; see --glob'),
        (["--dir", "tests/vectors", "--system", "/nowhere"], "/nowhere: No such file or directory"),
        (["--dri", "."], "--dir"),
        (["--dir", ".", "--to", "drm"], "Invalid value for '--to'"),
    ],
)
def test_what_was_typed_wrong_is_one_line(
    kvctl: Kvctl, appliance: FakeAppliance, typed: list[str], complaint: str
) -> None:
    result = kvctl("prefetch", *typed)
    assert result.code == ExitCode.USAGE
    assert complaint in result.complaint
    assert appliance.requests == []


@pytest.mark.parametrize("name", ["a", "x" * 300])
@pytest.mark.parametrize("left_s", [None, 0.0, 1e7])
@pytest.mark.parametrize("n", [0, 10**9])
def test_the_progress_line_fits_80_columns(name: str, left_s: float | None, n: int) -> None:
    line = progress_line(n, n, n, float(n), left_s, name)
    assert len(line) <= WIDTH < 80 - 2
    assert line.startswith(f"{n:,}/{n:,} files, {n:,} tokens")


def test_on_a_terminal_files_tokens_rate_and_eta_are_shown(
    kvctl: Callable[..., Any], appliance: FakeAppliance, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(appliance)
    drawn: list[str] = []
    console = Console(file=open(os.devnull, "w"), force_terminal=True, width=80)
    monkeypatch.setattr(output, "stderr", lambda: console)
    call = output.ChangingLine.__call__
    monkeypatch.setattr(output.ChangingLine, "__call__", lambda self, text: (drawn.append(text), call(self, text)))
    assert kvctl("prefetch", "--dir", str(folder), "--glob", "[ab].*").code == ExitCode.OK
    console.file.close()
    assert drawn[0].startswith("0/2 files, 0 tokens, 0 tok/s, ETA -")
    assert drawn[-1].startswith("1/2 files, 280 tokens, ")


def test_what_no_tier_has_is_not_said_to_be_there(kvctl: Kvctl, appliance: FakeAppliance, folder: Path) -> None:
    appliance.replies[ROUTE] = (200, [canned.prefetched(moved_tokens=0, found={"none": 1000})])
    typed = ("prefetch", "--dir", str(folder), "--glob", "a.txt")
    assert "0 were there already, 1 in no tier: they are computed with --compute" in " ".join(kvctl(*typed).out.split())
    assert [json.loads(line).get("state") for line in kvctl(*typed, "--json").out.splitlines()] == ["absent", None]

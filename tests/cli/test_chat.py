"""kvctl chat, one question and a conversation, against an appliance of canned answers."""

from __future__ import annotations

import io
import json
import os
import pty
import readline
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvctl.client import PublicClient
from kvctl.commands import chat
from kvctl.diagnostics import ExitCode
from tests.cli import canned
from tests.cli.conftest import Kvctl
from tests.support.fake_appliance import API_KEY, FakeAppliance, initialise, sse

CHAT = "POST /v1/chat/completions"


@pytest.fixture
def talking(appliance: FakeAppliance) -> FakeAppliance:
    status = canned.STATUS.model_copy(update={"base_url": appliance.base_url})
    appliance.replies["GET /v1/admin/status"] = (200, status.model_dump())
    appliance.replies[CHAT] = (200, sse(canned.CHAT_CHUNKS))
    return appliance


def _asked(appliance: FakeAppliance) -> list[list[dict[str, Any]]]:
    return [body["messages"] for route, body in appliance.requests if route == CHAT and body is not None]


def test_one_question(kvctl: Kvctl, talking: FakeAppliance, tmp_path: Path) -> None:
    document = tmp_path / "doc.txt"
    document.write_text("A long text.", encoding="utf-8")
    result = kvctl("chat", "What?", "--file", str(document), "--system", "Be brief.", "--max-tokens", "7")
    assert result.code == ExitCode.OK
    assert result.out == "Hello ö\n"
    assert result.err.startswith("TTFT ")
    assert "1,024 of 1,200 prompt tokens cached" in result.err
    body = talking.body_of(CHAT)
    assert body is not None
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A long text.\n\nWhat?"},
    ]
    assert (body["max_tokens"], body["stream"]) == (7, True)
    assert f"Bearer {API_KEY}" in talking.keys


def test_one_question_as_json(kvctl: Kvctl, talking: FakeAppliance) -> None:
    result = kvctl("chat", "--json", "What?")
    answer = result.json
    assert answer["answer"] == "Hello ö"
    assert (answer["prompt_tokens"], answer["cached_tokens"], answer["completion_tokens"]) == (1200, 1024, 2)
    assert answer["finish_reason"] == "stop"
    assert answer["ttft_s"] > 0
    assert result.err == ""


def test_a_conversation_sends_what_was_said(
    kvctl: Kvctl, talking: FakeAppliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\n\n/help\nTwo?\n/quit\nThree?\n"))
    result = kvctl("chat")
    assert result.code == ExitCode.OK
    assert result.out == "Hello ö\nHello ö\n"
    assert _asked(talking)[1] == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Hello ö"},
        {"role": "user", "content": "Two?"},
    ]
    assert len(_asked(talking)) == 2
    assert chat.HELP in result.err


def test_a_stopped_or_failed_answer_does_not_end_the_conversation(
    kvctl: Kvctl, talking: FakeAppliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PublicClient.chat
    calls = 0

    def chat_once(self: PublicClient, messages: list[dict[str, Any]], **options: Any) -> object:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        if calls == 2:
            talking.replies[CHAT] = (503, {"error": {"message": "the queue is full"}})
        else:
            talking.replies[CHAT] = (200, sse(canned.CHAT_CHUNKS))
        return real(self, messages, **options)

    monkeypatch.setattr(PublicClient, "chat", chat_once)
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\nTwo?\nThree?\n"))
    result = kvctl("chat")
    assert result.code == ExitCode.OK
    assert result.out == "Hello ö\n"
    assert "this turn is forgotten" in result.err
    assert "kvctl: the queue is full\n" in result.err
    assert _asked(talking)[-1] == [{"role": "user", "content": "Three?"}]


@pytest.mark.skipif("libedit" in (readline.__doc__ or ""), reason="libedit has no bracketed paste")
@pytest.mark.parametrize("ended", [b"/quit\r", b"\x04"], ids=["quit", "Ctrl-D"])
def test_on_a_terminal_pasted_lines_are_one_question(talking: FakeAppliance, ended: bytes) -> None:
    ours, theirs = pty.openpty()

    unread = b""

    def read_until(awaited: bytes) -> bytes:
        nonlocal unread
        while awaited not in unread:
            unread += os.read(ours, 1024)
        seen, _, unread = unread.partition(awaited)
        return seen

    command = [sys.executable, "-m", "kvctl.cli", "chat"]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        assert chat.HELP.encode() in read_until(b"> ")
        os.write(ours, b"\x1b[200~One\nTwo?\x1b[201~\r")
        assert b"Hello" in read_until(b"TTFT")
        read_until(b"> ")
        os.write(ours, ended)
    assert process.returncode == ExitCode.OK
    assert _asked(talking) == [[{"role": "user", "content": "One\nTwo?"}]]
    os.close(ours)
    os.close(theirs)


def test_an_answer_cannot_drive_the_terminal() -> None:
    assert "\x1b[2Ja\tb\nc\x9b\x7f".translate(chat._UNSAFE) == "[2Ja\tb\nc"


def test_json_needs_a_question(kvctl: Kvctl, talking: FakeAppliance) -> None:
    result = kvctl("chat", "--json")
    assert result.code == ExitCode.USAGE
    assert result.complaint == "--json answers one question: kvctl chat --json QUESTION"


@pytest.mark.parametrize(
    ("status", "body", "code", "complaint"),
    [
        (401, {"error": {"message": "the API key is not known"}}, ExitCode.API, "client.toml"),
        (400, {"error": {"message": "the prompt is too long"}}, ExitCode.USAGE, "the prompt is too long"),
        (200, sse(canned.CHAT_CHUNKS[:2]), ExitCode.API, "the answer ended early"),
        (200, 'event: error\ndata: {"error": {"message": "the engine died"}}\n\n', ExitCode.API, "the engine died"),
    ],
)
def test_a_refused_question(
    kvctl: Kvctl, talking: FakeAppliance, status: int, body: Any, code: ExitCode, complaint: str
) -> None:
    talking.replies[CHAT] = (status, body)
    result = kvctl("chat", "--json", "What?")
    assert result.code == code
    assert complaint in result.complaint


def test_the_key_is_shown_nowhere(kvctl: Kvctl, talking: FakeAppliance) -> None:
    talking.replies[CHAT] = (401, {"error": {"message": "the API key is not known"}})
    assert API_KEY not in kvctl("chat", "--json", "What?").err


def test_without_a_socket_the_address_of_client_toml_is_asked(
    kvctl: Kvctl, talking: FakeAppliance, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    for base_url in (talking.base_url, talking.base_url.removesuffix("/v1")):
        initialise(elsewhere, base_url)
        assert kvctl("chat", "What?", "--home", str(elsewhere)).out == "Hello ö\n"


def test_nothing_answers(kvctl: Kvctl, stopped: Path) -> None:
    result = kvctl("chat", "What?")
    assert result.code == ExitCode.NOT_RUNNING
    assert result.complaint == "nothing answers at http://127.0.0.1:9/v1; start it with: kvctl serve"


@pytest.mark.parametrize("content", ["api_key = 3\n", "[", "\udcff"])
def test_a_client_file_that_cannot_be_read(kvctl: Kvctl, stopped: Path, content: str) -> None:
    file = stopped / "client.toml"
    file.write_bytes(content.encode(errors="surrogateescape"))
    result = kvctl("chat", "What?")
    assert result.code == ExitCode.KEYRING
    assert str(file) in result.complaint


def test_the_client_reads_times_and_text_of_a_completion(talking: FakeAppliance) -> None:
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "text": "ab", "finish_reason": None}]},
        {"choices": [{"index": 0, "text": "c", "finish_reason": "length"}]},
        *json.loads(json.dumps(canned.CHAT_CHUNKS[-1:])),
    ]
    talking.replies["POST /v1/completions"] = (200, sse(chunks))
    talking.replies["POST /tokenize"] = (200, {"tokens": [1, 2]})
    heard: list[str] = []
    with PublicClient(talking.home) as api:
        assert api.tokenize("x") == [1, 2]
        answer = api.complete([1, 2], max_tokens=2, on_text=heard.append)
    assert heard == ["ab", "c"]
    assert (answer.text, answer.finish_reason, answer.load_s) == ("abc", "length", 0.0125)
    assert 0 < answer.ttft_s <= answer.seconds
    assert answer.step_s == pytest.approx(answer.seconds - answer.ttft_s)

"""kvctl chat: one question, or a conversation, with what the cache did for it shown after each answer.

Invariant: the answer alone is on stdout. Ctrl-C stops the answer, not the conversation.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appliance.errors import KvctlError, UsageError
from kvctl import output
from kvctl.diagnostics import say
from kvctl.options import Home, Json, locate
from kvctl.prompts import read_text

if TYPE_CHECKING:
    from kvctl.client import Answer, PublicClient

Messages = list[dict[str, Any]]

HELP = "Ctrl-C stops an answer, /quit or Ctrl-D ends the chat"

_UNSAFE = {code: None for code in (*range(9), *range(11, 32), *range(127, 160))}
"""Control characters but tab and newline: what a model says must not drive the terminal."""


def chat(
    ctx: typer.Context,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="Leave it out for a conversation.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="A text to talk about, sent first.", show_default=False),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System prompt.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, metavar="N", help="Longest answer.", show_default=False)
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Ask one question or hold a conversation.

    /quit or Ctrl-D ends a conversation, Ctrl-C stops an answer.
    """
    from kvctl.client import PublicClient

    if as_json and question is None:
        raise UsageError("--json answers one question: kvctl chat --json QUESTION")
    messages: Messages = [{"role": "system", "content": system}] if system else []
    document = read_text(file) if file else ""
    options = {"max_tokens": max_tokens} if max_tokens else {}
    with PublicClient(locate(ctx, home)) as api:
        if question is None:
            _converse(api, messages, document, options)
            return
        messages.append({"role": "user", "content": _joined(document, question)})
        answer = _ask(api, messages, options, silent=as_json)
    if as_json:
        output.print_json(_numbers(answer))
    else:
        _report(answer)


def _converse(api: PublicClient, messages: Messages, document: str, options: dict[str, Any]) -> None:
    if sys.stdin.isatty():
        import readline  # line editing and history for input()

        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question
        output.stderr().print(HELP, style="dim")
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            output.stderr().print(f"\n{HELP}", style="dim")
            continue
        if line in ("/quit", "/exit"):
            break
        if line in ("/help", "/?"):
            output.stderr().print(HELP, style="dim")
            continue
        if not line:
            continue
        turn = [*messages, {"role": "user", "content": _joined(document, line)}]
        try:
            answer = _ask(api, turn, options, silent=False)
        except KeyboardInterrupt:
            output.stderr().print("stopped; this turn is forgotten", style="dim")
            continue
        except KvctlError as error:
            say(str(error))  # the next question may do better
            continue
        _report(answer)
        messages[:] = [*turn, {"role": "assistant", "content": answer.text}]
        document = ""


def _joined(document: str, question: str) -> str:
    return f"{document}\n\n{question}" if document else question


def _ask(api: PublicClient, messages: Messages, options: dict[str, Any], *, silent: bool) -> Answer:
    """Streams the answer to stdout unless `silent`."""
    if silent:
        return api.chat(messages, **options)
    for_terminal = sys.stdout.isatty()
    began = False

    def write(text: str) -> None:
        nonlocal began
        began = True
        sys.stdout.write(text.translate(_UNSAFE) if for_terminal else text)
        sys.stdout.flush()

    try:
        return api.chat(messages, on_text=write, **options)
    finally:
        if began:
            write("\n")


def _numbers(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "ttft_s": answer.ttft_s,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "completion_tokens": answer.completion_tokens,
        "tokens_per_s": 1 / answer.step_s if answer.step_s else None,
        "finish_reason": answer.finish_reason,
    }


def _report(answer: Answer) -> None:
    parts = [
        f"TTFT {output.duration(answer.ttft_s)}",
        f"{output.count(answer.cached_tokens)} of {output.count(answer.prompt_tokens)} prompt tokens cached",
    ]
    if answer.step_s:
        rate = 1 / answer.step_s
        parts.append(f"{rate:,.{1 if rate < 100 else 0}f} tok/s")
    if answer.finish_reason == "length":
        parts.append("cut off")
    output.stderr().print(" · ".join(parts), style="dim")

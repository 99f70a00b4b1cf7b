"""Prompts out of files: text or chat messages, refused in one line when they are neither. Main thread only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from appliance.errors import UsageError


def read_text(path: Path) -> str:
    """A UTF-8 text file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8 first") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def read_chat(path: Path) -> dict[str, Any]:
    """The chat fields of a PromptRef: a JSON file with a list of messages, or a chat request with messages and tools."""
    try:
        tree = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    messages = tree.get("messages") if isinstance(tree, dict) else tree
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise UsageError(f'{path}: write a list of messages, e.g. [{{"role": "user", "content": "Hello"}}]')
    tools = tree.get("tools") if isinstance(tree, dict) else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UsageError(f"{path}: tools should be a list, as in a chat request")
    return {"messages": messages, "tools": tools}


def prompt_of(prompt_file: Path | None, messages_file: Path | None) -> dict[str, Any]:
    """The prompt fields of a PromptRef, from the one option that was typed."""
    if messages_file is not None and prompt_file is None:
        return read_chat(messages_file)
    if prompt_file is not None and messages_file is None:
        return {"prompt": read_text(prompt_file)}
    raise UsageError("name the prompt with either --prompt-file FILE (plain text) or --messages FILE (JSON)")

"""A coding agent with a long system prompt and tools, unmodified on both APIs: each turn computes what is new, and no more.

The model is made of random weights, so its calls are held to the tools' schemas, as tool_choice asks.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from kvctl.client import read_client_file
from tests.support.appliance import Appliance, appliance

SYSTEM_TOKENS = 20_000
TURNS = 12
NEW_TOKENS = 700
"""More than one turn adds: a call, its result and what the template puts around them."""
FILES = {"type": "string", "enum": ["a.py", "b.py", "README"]}
TOOLS: dict[str, dict[str, Any]] = {
    "read_file": {"type": "object", "properties": {"path": FILES}, "required": ["path"]},
    "edit_file": {"type": "object", "properties": {"path": FILES, "line": {"type": "boolean"}}, "required": ["path", "line"]},
    "run": {"type": "object", "properties": {"command": {"enum": ["make", "make test"]}}, "required": ["command"]},
}  # fmt: skip
SETTINGS = {"engine.context_tokens": 32_768, "tiers.dram.capacity": "64MiB"}


def words(seed: int, n_tokens: int) -> str:
    """The tiny model has one token a character."""
    return "".join(random.Random(seed).choices("abcdefgh ", k=n_tokens))


class Agent(ABC):
    def __init__(self, seed: int) -> None:
        self.system = words(seed, SYSTEM_TOKENS)
        self.history: list[Any] = [{"role": "user", "content": "make the tests pass"}]
        self.turns = 0

    def turn(self) -> tuple[int, int]:
        """Prompt tokens, and those of them that were cached. The call is answered, so that the next turn can follow."""
        name, arguments, usage = self.ask(words(1000 + self.turns, 200))
        assert set(TOOLS[name]["required"]) == set(arguments)
        self.turns += 1
        return usage

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def ask(self, result: str) -> tuple[str, dict[str, Any], tuple[int, int]]:
        """(tool, its arguments, usage) of the next call, which gives `result`."""


class AnthropicAgent(Agent):
    def __init__(self, base_url: str, api_key: str) -> None:
        super().__init__(1)
        self._client = anthropic.Anthropic(base_url=base_url, api_key=api_key)

    def close(self) -> None:
        self._client.close()

    def ask(self, result: str) -> tuple[str, dict[str, Any], tuple[int, int]]:
        tools: list[Any] = [
            {"name": name, "description": name, "input_schema": schema} for name, schema in TOOLS.items()
        ]
        with self._client.messages.stream(
            model="tiny",
            max_tokens=400,
            system=[{"type": "text", "text": self.system, "cache_control": {"type": "ephemeral"}}],
            messages=self.history,
            tools=tools,
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
        ) as stream:
            answer = stream.get_final_message()
        (call,) = answer.content
        assert call.type == "tool_use"
        assert answer.stop_reason == "tool_use"
        answered = {"type": "tool_result", "tool_use_id": call.id, "content": result}
        self.history += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [answered]}]
        usage = answer.usage
        cached = usage.cache_read_input_tokens or 0
        return call.name, dict(call.input), (usage.input_tokens + cached + (usage.cache_creation_input_tokens or 0), cached)  # fmt: skip


class OpenAIAgent(Agent):
    def __init__(self, base_url: str, api_key: str) -> None:
        super().__init__(2)
        self.history.insert(0, {"role": "system", "content": self.system})
        self._client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=api_key)

    def close(self) -> None:
        self._client.close()

    def ask(self, result: str) -> tuple[str, dict[str, Any], tuple[int, int]]:
        functions = [{"name": name, "description": name, "parameters": schema} for name, schema in TOOLS.items()]
        tools: list[Any] = [{"type": "function", "function": function} for function in functions]
        answer = self._client.chat.completions.create(
            model="tiny",
            max_tokens=400,
            messages=self.history,
            tools=tools,
            tool_choice="required",
            parallel_tool_calls=False,
        )
        message = answer.choices[0].message
        (call,) = message.tool_calls or ()
        assert call.type == "function"
        assert answer.choices[0].finish_reason == "tool_calls"
        self.history += [
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": result},
        ]
        usage = answer.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens or 0
        return call.function.name, json.loads(call.function.arguments), (usage.prompt_tokens, cached)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with appliance(tmp_path_factory.mktemp("home"), SETTINGS) as running:
        yield running


@pytest.mark.parametrize("kind", [AnthropicAgent, OpenAIAgent])
def test_an_agent_computes_only_what_is_new_also_after_a_crash(served: Appliance, kind: Any) -> None:
    agent = kind(served.base_url, read_client_file(served.home)[1])
    prompt_tokens, cached = agent.turn()
    assert prompt_tokens > SYSTEM_TOKENS
    assert cached < 64, "what the template begins with, at most"
    for _ in range(TURNS - 2):
        prompt_tokens, cached = agent.turn()
        assert prompt_tokens - cached < NEW_TOKENS
    agent.close()
    served.settle()
    served.kill()
    served.start()
    after = kind(served.base_url, read_client_file(served.home)[1])
    after.history, after.turns = agent.history, agent.turns
    prompt_tokens, cached = after.turn()
    after.close()
    assert prompt_tokens - cached < NEW_TOKENS, "the engine and the pool are new: this came from nvme"

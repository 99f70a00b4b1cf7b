"""A coding agent with a long system prompt and tools, unmodified on both APIs: each turn computes what is new, and no more.

The model is made of random weights, so its calls are held to the tools' schemas, as tool_choice asks. It has a single layer:
attention over 20,000 tokens is what takes the time.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from kvctl.client import read_client_file
from tests.support.appliance import Appliance, appliance
from tests.support.odd_models import shallow

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
EXPLAIN = {"X-Kvctl-Explain": "1"}
SETTINGS = {"engine.context_tokens": 32_768, "tiers.dram.capacity": "64MiB"}


def words(seed: int, n_tokens: int) -> str:
    """The model has one token a character."""
    return "".join(random.Random(seed).choices("abcdefgh ", k=n_tokens))


@dataclass(frozen=True)
class Turn:
    prompt_tokens: int
    cached_tokens: int
    sources: dict[str, int]
    """Prompt tokens by tier, and `computed`."""


class Agent(ABC):
    def __init__(self, seed: int, base_url: str, api_key: str) -> None:
        self.api_key = api_key
        self.system = words(seed, SYSTEM_TOKENS)
        self.history: list[Any] = [{"role": "user", "content": "make the tests pass"}]
        self.turns = 0
        self.connect(base_url)

    def turn(self) -> Turn:
        """The call is answered, so that the next turn can follow."""
        name, arguments, turn = self.ask(words(1000 + self.turns, 200))
        assert set(TOOLS[name]["required"]) == set(arguments)
        assert sum(turn.sources.values()) == turn.prompt_tokens
        self.turns += 1
        return turn

    def goes_on_at(self, base_url: str) -> None:
        """With a new client, as an agent does that was started again."""
        self.close()
        self.connect(base_url)

    @abstractmethod
    def connect(self, base_url: str) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def ask(self, result: str) -> tuple[str, dict[str, Any], Turn]:
        """(tool, its arguments, usage) of the next call, which gives `result`."""


class AnthropicAgent(Agent):
    def __init__(self, base_url: str, api_key: str) -> None:
        super().__init__(1, base_url, api_key)

    def connect(self, base_url: str) -> None:
        self._client = anthropic.Anthropic(base_url=base_url, api_key=self.api_key, default_headers=EXPLAIN)

    def close(self) -> None:
        self._client.close()

    def ask(self, result: str) -> tuple[str, dict[str, Any], Turn]:
        tools: list[Any] = [
            {"name": name, "description": name, "input_schema": schema} for name, schema in TOOLS.items()
        ]
        with self._client.messages.stream(
            model="shallow",
            max_tokens=400,
            system=[{"type": "text", "text": self.system, "cache_control": {"type": "ephemeral"}}],
            messages=self.history,
            tools=tools,
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
        ) as stream:
            (end,) = [event for event in stream if event.type == "message_delta"]
            answer = stream.get_final_message()
        (call,) = answer.content
        assert call.type == "tool_use"
        assert answer.stop_reason == "tool_use"
        answered = {"type": "tool_result", "tool_use_id": call.id, "content": result}
        self.history += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [answered]}]
        usage = answer.usage
        cached = usage.cache_read_input_tokens or 0
        prompt_tokens = usage.input_tokens + cached + (usage.cache_creation_input_tokens or 0)
        return call.name, dict(call.input), Turn(prompt_tokens, cached, _sources(end))


class OpenAIAgent(Agent):
    def __init__(self, base_url: str, api_key: str) -> None:
        super().__init__(2, base_url, api_key)
        self.history.insert(0, {"role": "system", "content": self.system})

    def connect(self, base_url: str) -> None:
        self._client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=self.api_key, default_headers=EXPLAIN)

    def close(self) -> None:
        self._client.close()

    def ask(self, result: str) -> tuple[str, dict[str, Any], Turn]:
        functions = [{"name": name, "description": name, "parameters": schema} for name, schema in TOOLS.items()]
        tools: list[Any] = [{"type": "function", "function": function} for function in functions]
        answer = self._client.chat.completions.create(
            model="shallow",
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
        return call.function.name, json.loads(call.function.arguments), Turn(usage.prompt_tokens, cached, _sources(answer))  # fmt: skip


def _sources(answer: BaseModel) -> dict[str, int]:
    """What the clients do not know is in their answers all the same."""
    assert answer.model_extra is not None
    sources: dict[str, int] = answer.model_extra["kvctl"]["tokens"]
    return sources


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    home = tmp_path_factory.mktemp("home")
    with appliance(home, SETTINGS, model=shallow(home / "shallow.gguf")) as running:
        yield running


@pytest.mark.parametrize("kind", [AnthropicAgent, OpenAIAgent])
def test_an_agent_computes_only_what_is_new_also_after_a_crash(
    served: Appliance, kind: Callable[[str, str], Agent]
) -> None:
    agent = kind(served.base_url, read_client_file(served.home)[1])
    first = agent.turn()
    assert first.prompt_tokens > SYSTEM_TOKENS
    assert first.cached_tokens < 64, "what the template begins with, at most"
    for _ in range(TURNS - 2):
        turn = agent.turn()
        assert turn.sources["computed"] < NEW_TOKENS
        assert turn.cached_tokens == turn.prompt_tokens - turn.sources["computed"]
    served.settle()
    served.kill()
    served.start()
    agent.goes_on_at(served.base_url)
    last = agent.turn()
    agent.close()
    assert last.sources["nvme"] > SYSTEM_TOKENS, "the engine and the pool are new"
    assert last.sources["nvme"] == last.cached_tokens > last.prompt_tokens - NEW_TOKENS

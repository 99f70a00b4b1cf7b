"""Text calls of the engine: hostile input crashes tokenizers and templates too, so they are quarantined like requests.

Threading: event loop only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from appliance.engine.client import EngineClient
from appliance.errors import EngineDied
from appliance.quarantine import Content, Quarantine
from appliance.types import Tokens

T = TypeVar("T")


class TextCalls:
    def __init__(self, engine: EngineClient, quarantine: Quarantine) -> None:
        self._engine = engine
        self._quarantine = quarantine

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Tokens:
        return await self._guarded(
            lambda: text.encode("utf-8", "surrogatepass"),
            lambda: self._engine.tokenize(text, add_special=add_special, parse_special=parse_special),
        )

    async def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, options: Mapping[str, Any]
    ) -> Tokens:
        return await self._guarded(
            lambda: json.dumps([messages, tools, dict(options)]).encode(),
            lambda: self._engine.render(messages, tools, options),
        )

    async def _guarded(self, content: Content, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Once: whoever sent it is told to send it again."""
        self._quarantine.check(content)
        async with self._quarantine.inside(content) as stay:
            try:
                answer = await call()
            except EngineDied:
                self._quarantine.crashed(stay)
                raise
        self._quarantine.clear(content)
        return answer

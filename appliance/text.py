"""Text calls of the engine: hostile input crashes tokenizers and templates too, so they are quarantined like requests.

Threading: event loop only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from appliance.engine.client import EngineClient
from appliance.errors import EngineDied, RequestError
from appliance.quarantine import Quarantine
from appliance.types import Tokens

T = TypeVar("T")


class TextCalls:
    def __init__(self, engine: EngineClient, quarantine: Quarantine) -> None:
        self._engine = engine
        self._quarantine = quarantine

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Tokens:
        call = self._engine.tokenize(text, add_special=add_special, parse_special=parse_special)
        return await self._guarded(lambda: text.encode("utf-8", "surrogatepass"), call)

    async def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> Tokens:
        call = self._engine.render(messages, tools)
        return await self._guarded(lambda: json.dumps([messages, tools]).encode(), call)

    async def _guarded(self, content: Callable[[], bytes], call: Coroutine[Any, Any, T]) -> T:
        """`content` is read only where something has crashed."""
        try:
            if self._quarantine:
                self._quarantine.check(content())
        except RequestError:
            call.close()
            raise
        try:
            return await call
        except EngineDied:
            self._quarantine.crashed(self._quarantine.digest(content()))
            raise

"""Engine calls that move bytes of slots.

Invariant: whoever made such a call goes on, cancelled or not, only when the engine no longer uses the slots.
Threading: event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from appliance.errors import EngineError

T = TypeVar("T")


async def answered(call: Coroutine[Any, Any, T]) -> T:
    """The call's result; a cancellation takes effect when the engine has answered."""
    task = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        with suppress(EngineError):
            task.result()
        raise

"""One embedding, as the runtime computes it: a turn in the queue, cells, the vector, and all of it given back.

Nothing of it is kept: what an embedding computes cannot be restored for another. Invariant: what begin() made known is
released and the turn left, however it ends. Threading: event loop only.
"""

from __future__ import annotations

import os
from contextlib import suppress

from appliance.engine.client import EngineClient
from appliance.errors import EngineDied, EngineError
from appliance.quarantine import Quarantine
from appliance.turns import Turns
from appliance.types import Tokens


async def embed(
    engine: EngineClient, turns: Turns, quarantine: Quarantine, tenant: str, owner: bytes, tokens: Tokens
) -> bytes:
    """The unit vector of these tokens, f32le. `owner` as in begin(). RequestError, Overloaded or EngineError."""
    request_id = f"embd-{os.urandom(8).hex()}"
    quarantine.check(lambda: tokens.data)
    turn = turns.enter(request_id, tenant, len(tokens), alone=quarantine.suspects(lambda: tokens.data))
    try:
        await turns.wait(turn)
        async with quarantine.inside(lambda: tokens.data) as stay:
            try:
                try:
                    # a namespace of its own: nothing is shared
                    await engine.begin(request_id, os.urandom(32), tokens, 0, owner)
                    await engine.restore(request_id, 0, ())
                    turns.has_cells(turn)
                    turns.expect(turn, len(tokens))
                    vector = await engine.embed(request_id)
                finally:
                    with suppress(EngineError):
                        await engine.release(request_id)
            except EngineDied:
                quarantine.crashed(stay)
                raise
        quarantine.clear(lambda: tokens.data)
        return vector
    finally:
        turns.leave(turn)

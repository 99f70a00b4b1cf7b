"""What the control process and the engine process say to each other.

Transport: one AF_UNIX stream socketpair. A message is a u32 little-endian length and that many bytes of msgpack (a map).
KV bytes never travel here: messages carry slot numbers of the shared DRAM pool. Token ids travel as u32le bytes.
At most MAX_MESSAGE_BYTES; a longer or malformed frame ends the connection.

Control -> engine. Every call has `op` and `call` (an integer); the engine answers `{"re": call, "ok": value}` or
`{"re": call, "err": {"type", "message", ...}}`. Answers may come in any order. The first call is `load`.

  load       config: EngineConfig map                       -> EngineInfo map; "progress" events before it
  pool       slot_bytes, slots                              -> null; the pool's memfd was inherited at start
  tokenize   text, add_special, parse_special               -> tokens
  render     messages, tools?, options                      -> tokens (template applied, specials parsed)
  detokenize tokens                                         -> text
  resident   ns, tokens                                     -> resident tokens; changes nothing
  begin      request, ns, owner, tokens, reserve_tokens     -> resident tokens; pins them and makes the request known
  restore    request, start, blocks [[slot, n, use], ...]   -> tokens now present; answered when linked
  prefill    request, stop                                  -> tokens present, once the prompt is computed up to `stop`
  run        request, sampling: SamplingParams map          -> null at once; then events until `done`
  preempt    request                                        -> null; `preempted` follows, or `done` if it ended first
  park       request                                        -> null; after `preempted`: the sequence becomes evictable
  export     request, blocks [[start, n, slot], ...]        -> null when every slot holds its block
  embed      request                                        -> unit vector, f32le; of an admitted request that is not run
  release    request                                        -> null; the request's sequence becomes evictable residency
  cancel     request                                        -> null; `done` with reason cancelled follows if it ran
  stats      -                                              -> EngineStats map
  evict      -                                              -> cells freed; drops every released resident sequence

Life of a request in the engine: begin, restore*, run, (events), export*, release. Cells for the prompt and the next tokens
are claimed when it is admitted, before its first restore or prefill, and more as it goes on; until then it queues. `begin`
only pins what is resident; `restore`, `prefill` and `run` wait for admission, so a restore of no blocks is a wait for
admission. A request released without `run` leaves what was restored resident. max_tokens 0 prefills and is done. `release` is
owed for every `begin`, also after an error. To make room a stream is preempted, by `preempt` or for want of cells; then it
is parked, restored (`restore` with no blocks waits for cells again) and run again: it goes on where it stopped, what it had
generated being restored or computed like its prompt. From both ends: `prefill` computes the front of a prompt, and meanwhile
`restore` takes blocks that begin at `stop` or later; they are linked when the front reaches them.
A prefix is kept from eviction while a request that holds it has not been released: exports need not hurry.

Engine -> control, unasked:

  {"event": "computed", "request", "tokens"}
             so many leading tokens of a long prompt are in cells: they may be exported
  {"event": "prefilled", "request", "prefill_tokens", "prefill_s"}
             the prompt's KV is complete: it may be exported
  {"event": "tokens", "request", "ids": u32le bytes, "text": str, "logprobs": [[token, logprob, [[token, logprob], ...]], ...] | nil}
             text is whole UTF-8 characters only; held back while it may be the start of a stop string
  {"event": "done", "request", "reason", "completion_tokens", "decode_s", "kv_tokens", "stop"}
  {"event": "preempted", "request", "kv_tokens"}
             the run has ended for now; what is in cells stays, and may be exported, until `park`
  {"event": "failed", "request", "message", "refused"}
             this request only; the engine lives on. refused: what it asked for is to blame
  {"event": "progress", "fraction"}     while loading
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import msgpack

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class EngineStats:
    """Occupancy of the hbm tier and the scheduler. Cells are distinct: shared cells count once."""

    cells_total: int
    cells_used: int
    """Held by any sequence, running or resident."""
    cells_pinned: int
    """Held by requests not yet released."""
    sequences_resident: int
    requests_running: int
    requests_waiting: int
    resident_evictions: int
    """Sequences dropped to make room since start."""
    preemptions: int
    """Streams stopped to make room since start."""


def pack(message: dict[str, Any]) -> bytes:
    """One frame. ValueError, TypeError or OverflowError for what a frame cannot hold."""
    body: bytes = msgpack.packb(message, use_bin_type=True)
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError("a message is too long")
    return LENGTH.pack(len(body)) + body


def unpack(body: bytes | memoryview) -> dict[str, Any]:
    """The map in one frame's body. ValueError if it is not a map or not msgpack."""
    message = msgpack.unpackb(body, raw=False, strict_map_key=False, max_bin_len=MAX_MESSAGE_BYTES)
    if not isinstance(message, dict):
        raise ValueError("a message is a map")
    return message

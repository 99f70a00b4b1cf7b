"""Embeddings beside streams: bounded chunks, nothing kept, nothing disturbed."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from appliance.engine.base import Row
from appliance.engine.embeddings import CHUNK_TOKENS
from appliance.errors import EngineError
from appliance.types import Tokens
from tests.support.engines import NULL_BLOCK as BLOCK
from tests.support.engines import null_engine, prompt
from tests.support.scheduling import Bench, reference


def admitted(bench: Bench, request: str, tokens: Tokens) -> None:
    bench.begin(request, tokens, 0, ns=request.encode())
    bench.done(bench.scheduler.restore(request, 0, []))


def vector(reply: Future[bytes]) -> np.ndarray:  # type: ignore[type-arg]
    return np.frombuffer(reply.result(timeout=0), "<f4")


def expected(tokens: Tokens) -> np.ndarray:  # type: ignore[type-arg]
    engine = null_engine(context_tokens=2 * len(tokens), batch_tokens=len(tokens))
    total = engine.embed(Row(0, 0, tokens, False)).sum(axis=0, dtype=np.float64)
    return total / np.linalg.norm(total)


def test_an_embedding_is_the_unit_vector_of_its_prompt() -> None:
    bench = Bench()
    for n in (1, CHUNK_TOKENS, 3 * CHUNK_TOKENS + 5):
        admitted(bench, f"e{n}", prompt(n))
        reply = bench.scheduler.embed(f"e{n}")
        bench.settle()
        assert np.allclose(vector(reply), expected(prompt(n)), atol=1e-6)
        assert np.isclose(np.linalg.norm(vector(reply)), 1)
        bench.release(f"e{n}")
    bench.settle()
    assert bench.roster.stats().cells_used == 0, "nothing of it is kept"


def test_streams_take_part_in_every_step_and_chunks_are_small_beside_them() -> None:
    bench = Bench(shared_batch_tokens=8)
    bench.start("s", prompt(20), 100)
    while not bench.tokens("s"):
        bench.step()
    bench.begin("e", prompt(90, seed=5), 0, ns=b"e")
    bench.scheduler.restore("e", 0, [])
    bench.step()
    reply = bench.scheduler.embed("e")
    before = len(bench.tokens("s"))
    steps = 0
    while not reply.done():
        bench.step()
        steps += 1
        assert len(bench.tokens("s")) == before + steps, "a token of the stream in every step"
    assert steps >= 90 // 8
    assert np.allclose(vector(reply), expected(prompt(90, seed=5)), atol=1e-6)
    bench.settle()
    assert bench.tokens("s") == reference(prompt(20), 100)


def test_embeddings_come_in_order_and_each_has_its_own() -> None:
    bench = Bench()
    texts = {f"e{n}": prompt(70 + n, seed=n) for n in range(3)}
    for request, tokens in texts.items():
        admitted(bench, request, tokens)
    replies = {request: bench.scheduler.embed(request) for request in texts}
    bench.settle()
    for request, tokens in texts.items():
        assert np.allclose(vector(replies[request]), expected(tokens), atol=1e-6)


@pytest.mark.parametrize("how", ["cancel", "release"])
def test_one_that_is_given_up_ends_and_the_next_goes_on(how: str) -> None:
    bench = Bench(batch_tokens=16)
    admitted(bench, "gone", prompt(200))
    admitted(bench, "next", prompt(50, seed=3))
    gone, following = bench.scheduler.embed("gone"), bench.scheduler.embed("next")
    bench.step()
    getattr(bench.scheduler, how)("gone")
    bench.settle()
    with pytest.raises(EngineError):
        gone.result(timeout=0)
    assert np.allclose(vector(following), expected(prompt(50, seed=3)), atol=1e-6)


def test_an_engine_that_refuses_fails_that_embedding_only() -> None:
    bench = Bench()
    admitted(bench, "bad", prompt(30))
    admitted(bench, "good", prompt(31))
    bench.engine.refuses = lambda row: row.tokens == prompt(30)
    bad, good = bench.scheduler.embed("bad"), bench.scheduler.embed("good")
    bench.settle()
    with pytest.raises(EngineError):
        bad.result(timeout=0)
    assert len(vector(good)) == bench.engine.info.embedding_width


def test_only_what_has_cells_and_is_not_run_can_be_embedded() -> None:
    bench = Bench()
    bench.begin("waits", prompt(10), 0)
    bench.start("runs", prompt(10))
    for request in ("waits", "runs", "unknown"):
        reply = bench.scheduler.embed(request)
        bench.settle()
        with pytest.raises(EngineError):
            reply.result(timeout=0)


def test_what_has_more_than_the_embedding_in_its_cells_is_refused() -> None:
    bench = Bench()
    tokens = prompt(2 * BLOCK)
    bench.begin("e", tokens, 0)
    bench.done(bench.scheduler.restore("e", 0, bench.stored(tokens)))
    reply = bench.scheduler.embed("e")
    bench.settle()
    with pytest.raises(EngineError):
        reply.result(timeout=0)

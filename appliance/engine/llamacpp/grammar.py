"""A grammar over one request's tokens: llama.cpp's grammar sampler, asked only where it must be.

Most tokens a model chooses fit its grammar, so the choice is made first and looked at alone; only one that does not fit
has the whole vocabulary looked at. Invariant: a token is accepted only if the grammar allows it, as llama.cpp ends the
process otherwise. Compute thread only.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Collection
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as ll
from numpy.typing import NDArray

from appliance.errors import EngineError, RequestError

MAX_STEP_S = 2.0
"""An ambiguous grammar has ever more ways to go on: one that takes longer for a token holds up every stream."""

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Grammar:
    def __init__(self, vocab: Any, text: str, end_tokens: Collection[int]) -> None:
        self._end_tokens = end_tokens
        self._sampler = ll.llama_sampler_init_grammar(vocab, text.encode(), b"root")
        if not self._sampler:
            raise RequestError("the engine cannot read this grammar", param="grammar")
        n = ll.llama_vocab_n_tokens(vocab)
        self._ids = np.arange(n, dtype=np.int32)
        self._candidates = np.zeros(n, _CANDIDATE)
        self._one = np.zeros(1, _CANDIDATE)

    def choose(self, chain: Any, logits: NDArray[np.float32]) -> int:
        """The token that `chain` chooses among those that the grammar allows; both have accepted it."""
        token = self._chosen(chain, logits)
        began_s = time.monotonic()
        if not self._allows(token):
            token = self._chosen_among_allowed(chain, logits)
        ll.llama_sampler_accept(chain, token)
        if token not in self._end_tokens:
            ll.llama_sampler_accept(self._sampler, token)
        if time.monotonic() - began_s > MAX_STEP_S:
            raise RequestError("the grammar takes too long to follow: it is too ambiguous", param="grammar")
        return token

    def close(self) -> None:
        if self._sampler:
            ll.llama_sampler_free(self._sampler)
            self._sampler = None

    def _allows(self, token: int) -> bool:
        self._one[0] = (token, 1.0, 0.0)
        _apply(self._sampler, self._one)
        return bool(np.isfinite(self._one[0]["logit"]))

    def _chosen(self, chain: Any, logits: NDArray[np.float32]) -> int:
        self._fill(logits)
        return int(self._candidates[_apply(chain, self._candidates)]["id"])

    def _chosen_among_allowed(self, chain: Any, logits: NDArray[np.float32]) -> int:
        self._fill(logits)
        _apply(self._sampler, self._candidates)
        allowed = self._candidates["id"][np.isfinite(self._candidates["logit"])]
        if not len(allowed):
            raise EngineError("the grammar allows no token of this model here")
        chosen = self._candidates[_apply(chain, self._candidates)]
        if np.isfinite(chosen["logit"]) and chosen["id"] in allowed:
            return int(chosen["id"])
        # Biases forbid all that the grammar allows. If that is the end, it is the end.
        ends = [int(token) for token in allowed if int(token) in self._end_tokens]
        if not ends:
            raise RequestError("logit_bias forbids every token that the grammar allows", param="logit_bias")
        return ends[0]

    def _fill(self, logits: NDArray[np.float32]) -> None:
        self._candidates["id"] = self._ids
        self._candidates["logit"] = logits


def _apply(sampler: Any, candidates: NDArray[Any]) -> int:
    """Change the candidates in place; the index of the one that was selected, if the sampler selects."""
    data = ctypes.cast(candidates.ctypes.data, ctypes.POINTER(ll.llama_token_data))
    array = ll.llama_token_data_array(data, len(candidates), -1, False)
    ll.llama_sampler_apply(sampler, ctypes.byref(array))
    return int(array.selected)

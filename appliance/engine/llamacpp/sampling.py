"""One request's sampler: llama.cpp's sampler chain, freed with the request.

Invariant: log-probabilities are those of the raw logits, before bias, penalties and temperature. Compute thread only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as ll
from numpy.typing import NDArray

from appliance.engine.base import Sampled, Sampler
from appliance.engine.llamacpp.grammar import Grammar
from appliance.types import SamplingParams, TokenLogprob, Tokens

PENALTY_TOKENS = 64
"""How far back penalties look, as llama.cpp's own default."""

_RANDOM_SEED = 0xFFFFFFFF  # llama.cpp draws its own seed for this value


class ChainSampler(Sampler):
    def __init__(
        self,
        context: Any,
        params: SamplingParams,
        prompt: Tokens,
        end_tokens: Collection[int],
        logits: Callable[[int], NDArray[np.float32]],
        batch_index: Callable[[int], int],
    ) -> None:
        self._context = context
        self._end_tokens = end_tokens
        self._logits = logits
        self._batch_index = batch_index
        self._logprobs = params.logprobs
        vocab = ll.llama_model_get_vocab(ll.llama_get_model(context))
        vocab_tokens = ll.llama_vocab_n_tokens(vocab)
        self._grammar = None if params.grammar is None else Grammar(vocab, params.grammar, end_tokens)
        self._chain = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
        self._floor_tokens = params.min_tokens
        """Tokens still to come before an end may be chosen."""
        if self._floor_tokens:
            ll.llama_sampler_chain_add(self._chain, _bias(vocab_tokens, dict.fromkeys(end_tokens, float("-inf"))))
        for part in _parts(params, vocab_tokens, end_tokens):
            ll.llama_sampler_chain_add(self._chain, part)
        for token in prompt[max(0, len(prompt) - PENALTY_TOKENS) :]:
            ll.llama_sampler_accept(self._chain, token)

    def sample(self, row: int) -> Sampled:
        if self._grammar:
            token = self._grammar.choose(self._chain, self._logits(row))
        else:
            token = int(ll.llama_sampler_sample(self._chain, self._context, self._batch_index(row)))
        if self._floor_tokens:
            self._floor_tokens -= 1
            if not self._floor_tokens:
                ll.llama_sampler_free(ll.llama_sampler_chain_remove(self._chain, 0))
        logprob = None if self._logprobs is None else _logprob(self._logits(row), token, self._logprobs)
        return Sampled(token, token in self._end_tokens, logprob)

    def close(self) -> None:
        if self._chain:
            ll.llama_sampler_free(self._chain)
            self._chain = None
        if self._grammar:
            self._grammar.close()


def _parts(params: SamplingParams, vocab_tokens: int, end_tokens: Collection[int]) -> list[Any]:
    """The chain in llama.cpp's own order; the last part chooses."""
    parts = []
    bias = dict(params.logit_bias)
    if params.ignore_eos:
        bias.update(dict.fromkeys(end_tokens, float("-inf")))
    if bias:
        parts.append(_bias(vocab_tokens, bias))
    if params.repeat_penalty != 1.0 or params.frequency_penalty or params.presence_penalty:
        penalties = (params.repeat_penalty, params.frequency_penalty, params.presence_penalty)
        parts.append(ll.llama_sampler_init_penalties(vocab_tokens, PENALTY_TOKENS, *penalties))
    if params.temperature <= 0:
        return [*parts, ll.llama_sampler_init_greedy()]
    if params.top_k > 0:
        parts.append(ll.llama_sampler_init_top_k(params.top_k))
    if params.top_p < 1:
        parts.append(ll.llama_sampler_init_top_p(params.top_p, 1))
    if params.min_p > 0:
        parts.append(ll.llama_sampler_init_min_p(params.min_p, 1))
    seed = int.from_bytes(os.urandom(4), "little") if params.seed is None else params.seed & 0xFFFFFFFF
    parts.append(ll.llama_sampler_init_temp(params.temperature))
    parts.append(ll.llama_sampler_init_dist(seed if seed != _RANDOM_SEED else 0))
    return parts


def _bias(vocab_tokens: int, bias: dict[int, float]) -> Any:
    entries = (ll.llama_logit_bias * len(bias))(*map(ll.llama_logit_bias, bias, bias.values()))
    return ll.llama_sampler_init_logit_bias(vocab_tokens, len(bias), entries)


def _logprob(logits: NDArray[np.float32], token: int, n_top: int) -> TokenLogprob:
    values = logits.astype(np.float64)
    peak = values.max()
    values -= peak + np.log(np.exp(values - peak).sum())
    n_top = min(n_top, len(values))
    best = np.argpartition(values, len(values) - n_top)[len(values) - n_top :] if n_top else np.empty(0, np.intp)
    best = best[np.argsort(-values[best], kind="stable")]
    return TokenLogprob(token, float(values[token]), tuple((int(t), float(values[t])) for t in best))

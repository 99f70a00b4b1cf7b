"""A sampling chain over one logits vector, in numpy: for engines that bring none of their own.

Order: bias, penalties, temperature, top-k, top-p, min-p, draw. The same seed and logits give the same tokens. Penalties
look at prompt and completion; log-probabilities are those of the raw logits.
Threading: one Chain belongs to one request and is used by the compute thread.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from appliance.types import SamplingParams, TokenLogprob, Tokens

Logits = npt.NDArray[np.float32]


class Chain:
    def __init__(self, params: SamplingParams, prompt: Tokens, end_token: int) -> None:
        self._params = params
        self._end_token = end_token
        self._penalises = params.repeat_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        self._seen = Counter(prompt.ids()) if self._penalises else Counter[int]()
        self._random = np.random.default_rng(params.seed)
        self._chosen = 0

    def choose(self, logits: Logits) -> tuple[int, TokenLogprob | None]:
        """One token, accepted into the chain's state, with its log-probability if asked for."""
        scores = self._adjusted(logits)
        greedy = self._params.temperature <= 0
        token = int(np.argmax(scores)) if greedy else self._draw(scores / self._params.temperature)
        self._chosen += 1
        if self._penalises:
            self._seen[token] += 1
        return token, _logprob(logits.astype(np.float64), token, self._params.logprobs)

    def _adjusted(self, logits: Logits) -> npt.NDArray[np.float64]:
        params = self._params
        scores = logits.astype(np.float64)
        for token, bias in params.logit_bias:
            scores[token] += bias
        if params.ignore_eos or self._chosen < params.min_tokens:
            scores[self._end_token] = -np.inf
        for token, count in self._seen.items():
            scores[token] *= 1 / params.repeat_penalty if scores[token] > 0 else params.repeat_penalty
            scores[token] -= params.presence_penalty + params.frequency_penalty * count
        return scores

    def _draw(self, scores: npt.NDArray[np.float64]) -> int:
        params = self._params
        order = np.argsort(-scores, kind="stable")
        if params.top_k > 0:
            order = order[: params.top_k]
        weights = np.exp(scores[order] - scores[order[0]])
        weights /= weights.sum()
        keep = max(1, int(np.searchsorted(np.cumsum(weights), params.top_p)) + 1)
        keep = min(keep, int(np.count_nonzero(weights >= params.min_p * weights[0])))
        weights = np.cumsum(weights[:keep])
        return int(order[np.searchsorted(weights, self._random.random() * weights[-1], side="right")])


def _logprob(scores: npt.NDArray[np.float64], token: int, wanted: int | None) -> TokenLogprob | None:
    if wanted is None:
        return None
    peak = scores.max()
    logprobs = scores - peak - np.log(np.exp(scores - peak).sum())
    top = np.argsort(-logprobs, kind="stable")[:wanted]
    return TokenLogprob(token, float(logprobs[token]), tuple((int(t), float(logprobs[t])) for t in top))

"""How much of the waiting prompts the next step computes.

While streams decode, prompts get a share of the time: steps without them earn credit, a step with them spends it. So the
time per output token is longer by a bounded factor, however many prompts come. While none decodes, a single prompt is
computed in the largest chunks; several in chunks of about a second, so that a short one does not wait for long.

Invariant: prompts are never starved: the credit for a chunk is earned in a bounded number of steps. Threading: compute
thread only. Seconds are what steps really took.
"""

from __future__ import annotations

STEP_S = 1.0
"""About the longest step while several prompts wait."""
LEAST_TOKENS = 64
"""Smaller chunks cost more per token: llama.cpp's attention on a CPU takes 64 rows at once."""
SMOOTHING = 0.3


class Pace:
    def __init__(self, batch_tokens: int, shared_batch_tokens: int, prefill_share: float) -> None:
        self._batch_tokens = batch_tokens
        self._shared_batch_tokens = shared_batch_tokens
        self._earned = prefill_share / (1 - prefill_share) if prefill_share < 1 else None
        """Seconds for prompts per second of decoding; None: no bound."""
        self._credit_s = 0.0
        self._decode_s = 0.0
        """Of a step that decodes only, per stream."""
        self._chunk_s = 0.0
        """What a chunk adds to a step that decodes."""
        self._token_s = 0.0
        """Of a prompt, in a step without streams."""

    def prompt_tokens(self, n_decoding: int, n_prompts: int) -> int:
        """Most prompt tokens of the next step."""
        if n_decoding:
            if self._earned is not None and self._credit_s < self._chunk_s:
                return 0
            return min(self._shared_batch_tokens, self._batch_tokens - n_decoding)
        if n_prompts == 1 or not self._token_s:
            return self._batch_tokens
        tokens = self._batch_tokens
        while tokens > LEAST_TOKENS and tokens * self._token_s > STEP_S:
            tokens //= 2  # few sizes, so that the same work is mostly split the same way
        return tokens

    def saw(self, n_decoding: int, n_prompt_tokens: int, seconds: float) -> None:
        """A step of so many streams and prompt tokens took so long."""
        if not n_decoding:
            self._token_s = _smoothed(self._token_s, seconds / n_prompt_tokens)
            return
        if not n_prompt_tokens:
            self._decode_s = _smoothed(self._decode_s, seconds / n_decoding)
        decode_s = min(seconds, n_decoding * self._decode_s)
        if n_prompt_tokens:
            self._chunk_s = _smoothed(self._chunk_s, seconds - decode_s)
            self._credit_s -= seconds - decode_s
        if self._earned is not None:
            self._credit_s = min(self._credit_s + self._earned * decode_s, max(self._chunk_s, seconds))

    def spent(self, seconds: float) -> None:
        """While streams decode, something else that was computed for a prompt took so long."""
        self._chunk_s = _smoothed(self._chunk_s, seconds)
        self._credit_s -= seconds


def _smoothed(known: float, seen: float) -> float:
    return seen if not known else known + SMOOTHING * (seen - known)

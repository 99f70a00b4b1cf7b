"""What the engine has to do for whom: the planner's view of the requests that hold cells.

Threading: event loop only.
"""

from __future__ import annotations

from appliance.plan.planner import Traffic


class Going:
    def __init__(self, prefill_share: float) -> None:
        """`prefill_share`: of the time, for prompts, while streams decode."""
        self._prefill_share = prefill_share
        self._left: dict[str, int] = {}
        """Prompt tokens left to compute; 0: it decodes."""

    def computes(self, request_id: str, tokens: int) -> None:
        self._left[request_id] = tokens

    def decodes(self, request_id: str) -> None:
        self._left[request_id] = 0

    def leaves(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    def beside(self, request_id: str) -> Traffic:
        """All but this request."""
        left = [tokens for name, tokens in self._left.items() if name != request_id]
        prompts = tuple(tokens for tokens in left if tokens)
        return Traffic(len(left) - len(prompts), self._prefill_share, prompts)

"""A validated API request against the one model served: its id, its vocabulary, its context.

Invariant: what passes here can be run; the numbers of what cannot are in the message. Pure functions.
"""

from __future__ import annotations

import numpy as np

from appliance.api.openai import GenerationRequest
from appliance.errors import RequestError
from appliance.server.base import ServedModel
from appliance.types import Namespace, SamplingParams, Tokens

SEEDS = 2**32 - 1
"""Seeds below this; the last 32-bit value means "random" to the engine."""


def check_model(name: str | None, model: ServedModel) -> None:
    if name is not None and name != model.id:
        raise RequestError(
            f'this model is not served here; ask for "{model.id}"', param="model", code="model_not_found", status=404
        )


def check_vocabulary(tokens: Tokens, model: ServedModel, param: str) -> None:
    if len(tokens) and int(np.frombuffer(tokens.data, dtype="<u4").max()) >= model.vocab_tokens:
        raise RequestError(
            f"{param}: token ids should lie between 0 and {model.vocab_tokens - 1}",
            param=param,
            code="invalid_token_id",
        )


def namespace(call: GenerationRequest, tenant: str) -> Namespace:
    return Namespace(tenant, salt=(call.cache_salt or "").encode())


def check_context(prompt: Tokens, model: ServedModel, param: str) -> None:
    """A prompt alone, with room for the first token of an answer."""
    if not prompt:
        raise RequestError(f"{param}: the prompt is empty", param=param, code="invalid_value")
    if len(prompt) >= model.context_tokens:
        raise RequestError(
            f"{param}: the context holds {model.context_tokens} tokens, but the prompt has {len(prompt)}",
            param=param,
            code="context_length_exceeded",
        )


def completion_tokens(call: GenerationRequest, prompt_tokens: int, model: ServedModel, param: str) -> int:
    """Most tokens to generate: what was asked for, else what fits, up to the default."""
    context = model.context_tokens
    asked = call.token_limit
    if asked is not None and not 1 <= asked <= context:
        raise RequestError(f"max_tokens should lie between 1 and {context}", param="max_tokens", code="invalid_value")
    if prompt_tokens == 0:
        raise RequestError(f"{param}: the prompt is empty", param=param, code="invalid_value")
    if prompt_tokens + (asked or 1) > context:
        wanted = f"{prompt_tokens} prompt tokens" + (f" and {asked} max_tokens" if asked else "")
        raise RequestError(
            f"the context holds {context} tokens, but {wanted} were asked for; shorten the prompt or lower max_tokens",
            param=param,
            code="context_length_exceeded",
        )
    return asked or min(model.default_max_tokens, context - prompt_tokens)


def sampling(
    call: GenerationRequest, max_tokens: int, model: ServedModel, choice: int, grammar: str | None
) -> SamplingParams:
    """Parameters of one of n choices: each has a seed of its own."""
    if grammar is not None and call.ignore_eos:
        raise RequestError("ignore_eos: an answer of a given form ends when it is complete", param="ignore_eos")
    if (call.min_tokens or 0) > max_tokens:
        raise RequestError(f"min_tokens: is above the {max_tokens} that are generated at most", param="min_tokens")
    if any(token >= model.vocab_tokens for token, _ in call.logit_bias):
        highest = model.vocab_tokens - 1
        raise RequestError(f"logit_bias: token ids should lie between 0 and {highest}", param="logit_bias")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(call.temperature, 1.0),
        top_p=_or(call.top_p, 1.0),
        top_k=max(0, call.top_k or 0),
        min_p=_or(call.min_p, 0.0),
        repeat_penalty=_or(_either(call), 1.0),
        frequency_penalty=_or(call.frequency_penalty, 0.0),
        presence_penalty=_or(call.presence_penalty, 0.0),
        seed=None if call.seed is None or call.seed == -1 else (call.seed + choice) % SEEDS,
        stop=call.stop,
        logit_bias=call.logit_bias,
        logprobs=call.wanted_logprobs,
        ignore_eos=bool(call.ignore_eos),
        min_tokens=call.min_tokens or 0,
        grammar=grammar,
    )


def _either(call: GenerationRequest) -> float | None:
    """The one penalty that has two names."""
    if None not in (call.repeat_penalty, call.repetition_penalty) and call.repeat_penalty != call.repetition_penalty:
        raise RequestError(
            "repetition_penalty: is another name of repeat_penalty; send one of them", param="repetition_penalty"
        )
    return call.repetition_penalty if call.repeat_penalty is None else call.repeat_penalty


def _or(value: float | None, default: float) -> float:
    return default if value is None else value

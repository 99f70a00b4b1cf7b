"""Fields that several requests share: token ids, times, prompts, stop strings, biases, content parts, depth.

Validators never put a value into a message: prompts are content. Pure functions.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainValidator

from appliance.config import parse_time
from appliance.types import Tokens

MAX_STOPS = 16
MAX_STOP_CHARS = 1_000
MAX_BIASES = 1_024
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
"""As the chat API and the Responses API call them."""

T = TypeVar("T")


class Request(BaseModel):
    """A request, or a part of one."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


def token_ids(value: object) -> Tokens:
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        raise ValueError("should be a list of token ids")
    try:
        return Tokens.of(value)
    except OverflowError:
        raise ValueError("token ids should lie between 0 and the size of the vocabulary") from None


def prompts(value: object) -> tuple[str | Tokens, ...]:
    """One prompt or several, each text or token ids; ids become Tokens here, once."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {int}:
            return (token_ids(value),)
        if kinds == {str}:
            return tuple(value)
        if kinds == {list}:
            return tuple(map(token_ids, value))
    raise ValueError("should be a string, a list of strings, a list of token ids or a list of such lists; not empty")


def stops(value: object) -> tuple[str, ...]:
    given = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(given, list) or len(given) > MAX_STOPS:
        raise ValueError(f"should be a string or a list of at most {MAX_STOPS} strings")
    for stop in given:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise ValueError(f"each stop should be a string of 1 to {MAX_STOP_CHARS} characters")
    return tuple(given)


def biases(value: object) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"should map at most {MAX_BIASES} token ids to a bias")
    pairs = []
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError("keys should be token ids")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError("biases should lie between -100 and 100")
        pairs.append((int(key), float(bias)))
    return tuple(pairs)


def joined_parts(value: object) -> object:
    """Content given as parts becomes one string; anything else is left to the field's own type."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
            raise ValueError("only parts of text are supported by this model; leave images, audio and files out")
        text = part.get("refusal" if part["type"] == "refusal" else "text")
        if not isinstance(text, str):
            raise ValueError('the "text" of a part should be a string')
        texts.append(text)
    return "".join(texts)


def shallow(value: T, depth: int) -> T:
    """The value itself, if lists and objects in it are nested no deeper."""
    level: list[Any] = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(f"should be nested at most {depth} deep")


def only(*allowed: object, hint: str) -> AfterValidator:
    """Refuses every value but null and `allowed`."""

    def check(value: object) -> object:
        if value is not None and value not in allowed:
            raise ValueError(f"not supported: {hint}")
        return value

    return AfterValidator(check)


def _retention(value: object) -> float | None:
    if value is None:
        return None
    if value in ("in_memory", "in-memory"):
        return 0.0
    try:
        return parse_time(value)
    except ValueError:
        raise ValueError('write a time like "24h" or "30m", or "in_memory"') from None


Retention = Annotated[float | None, PlainValidator(_retention)]
"""Seconds after the last use; 0: in memory only; None: as the profile says."""

"""How a request says what form its answer must have: OpenAI's, llama-server's and vLLM's fields for it.

Validators never put a value into a message. Immutable values; any thread.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from appliance.api.chat_fields import MAX_SCHEMA_DEPTH
from appliance.api.fields import Request, only, shallow

MAX_GRAMMAR_CHARS = 64 * 1024
MAX_CHOICES = 1_000

NoPattern = Annotated[Any, only(hint="use a grammar")]


def _schema(value: Any) -> Any:
    """A schema, at times sent as text, is looked at when the answer is prepared; here only how deep it is."""
    return shallow(value, MAX_SCHEMA_DEPTH)


Schema = Annotated[Any, AfterValidator(_schema)]
GrammarText = Annotated[str, Field(max_length=MAX_GRAMMAR_CHARS)]
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]


class NamedSchema(Request):
    name: str | None = None
    strict: bool | None = None
    content: Schema = Field(None, alias="schema")


class ResponseFormat(Request):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    content: Schema = Field(None, alias="schema")
    """llama-server's place for it."""


class StructuredOutputs(Request):
    """vLLM's."""

    json_: Schema = Field(None, alias="json")
    json_object: bool | None = None
    grammar: GrammarText | None = None
    choice: Choices | None = None
    regex: NoPattern = None
    structural_tag: NoPattern = None


class Constrained(Request):
    """Fields of every generation request. At most one of them may be used at a time."""

    response_format: ResponseFormat | None = None
    grammar: GrammarText | None = None
    json_schema: Schema = None
    guided_json: Schema = None
    guided_grammar: GrammarText | None = None
    guided_choice: Choices | None = None
    guided_regex: NoPattern = None
    structured_outputs: StructuredOutputs | None = None

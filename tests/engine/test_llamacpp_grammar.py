"""llama.cpp reads every grammar that is made or passed here, and its samplers keep to them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from llama_cpp import llama_cpp as ll

from appliance.chat.calls import CallParser, Gathered
from appliance.chat.gbnf import GrammarError, check
from appliance.chat.grammar import calls_answer, json_answer, one_of
from appliance.chat.tools import Tool, ToolChoice, ToolFormat, ToolUse
from appliance.engine.base import Row
from appliance.engine.llamacpp import create
from appliance.engine.llamacpp.engine import LlamaCppEngine
from appliance.engine.llamacpp.grammar import Grammar
from appliance.errors import RequestError
from appliance.types import SamplingParams, Tokens
from tests.chat.test_gbnf import GOOD
from tests.support.engines import prefill, prompt
from tests.support.models import tiny_config

END = 258

POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x"]}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {
        "name": {"type": "string"}, "inside": {"type": "array", "items": {"$ref": "#/$defs/node"}}}, "required": ["name"]}},
    "$ref": "#/$defs/node",
}  # fmt: skip
SCHEMAS: list[tuple[str, Any, list[str], list[str]]] = [
    ("integer", {"type": "integer"}, ["0", "-12"], ["", "01", "1.5", '"1"', "x"]),
    ("number", {"type": "number"}, ["0", "-1.5e-3", "10"], [".5", "1.", "NaN"]),
    ("integer within limits", {"type": "integer", "minimum": -12, "exclusiveMaximum": 205}, ["-12", "-9", "-1", "0", "7", "42", "199", "204"], ["-13", "-20", "205", "1000", "00", "-0"]),
    ("integer above a limit", {"type": "integer", "minimum": 18}, ["18", "99", "100", "1234567890123456"], ["17", "0", "-18", "018"]),
    ("number from 0", {"type": "number", "minimum": 0}, ["0", "1.5"], ["-1"]),
    ("boolean or null", {"type": ["boolean", "null"]}, ["true", "null"], ["0", "nul"]),
    ("string", {"type": "string"}, ['""', '"é\\n\\u00e9"', '"\\\\"'], ['"', '"\n"', '"\\x"', "'a'"]),
    ("string of a length", {"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"abc"', '"\\"é"'], ['"a"', '"abcd"']),
    ("string of length 0", {"type": "string", "maxLength": 0}, ['""'], ['"a"']),
    ("date", {"type": "string", "format": "date"}, ['"2026-11-25"'], ['"2026-13-25"', '"today"']),
    ("date-time", {"format": "date-time"}, ['"2026-11-25T20:00:00Z"', '"2026-11-25T20:00:00.5+01:00"'], ['"2026-11-25"']),
    ("uuid", {"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"123"']),
    ("enum", {"enum": ["a", 1, None, {"b": [True]}]}, ['"a"', "1", "null", '{"b": [true]}'], ["a", "2"]),
    ("const", {"const": 'quo"te'}, ['"quo\\"te"'], ['"quote"']),
    ("object", POINT, ['{"x": 1}', '{ "x":1, "y": 2 }', '{"x": 1,"y":2}', '{\n  "x": 1\n}'], ["{}", '{"y": 2}', '{"x": 1, "z": 3}', '{"x": 1,}', '{"x": 1']),
    ("optional first", {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "required": ["b"]}, ['{"a": 1, "b": 2, "c": 3}', '{"b": 2}', '{"a": 1, "b": 2}', '{"b": 2, "c": 3}'], ['{"a": 1}', '{"b": 2, "a": 1}', '{"a": 1, "c": 3}']),
    ("all optional", {"properties": {"a": {"const": 1}, "b": {"const": 2}}}, ["{}", '{"a": 1}', '{"b": 2}', '{"a": 1, "b": 2}'], ['{, "b": 2}', '{"c": 1}']),
    ("required without a description", {"type": "object", "required": ["a"]}, ['{"a": [1]}'], ["{}"]),
    ("map", {"type": "object", "additionalProperties": {"type": "integer"}}, ["{}", '{"k": 1, "l": 2}'], ['{"k": "v"}']),
    ("more properties", {"properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": True}, ['{"a": 1}', '{"a": 1, "b": {}}'], ['{"b": {}}']),
    ("any object", {"type": "object"}, ["{}", '{"a": {"b": [1, "c", null]}}'], ["[]", "1"]),
    ("anything", {}, ["1", "[]", '{"a": "b"}'], ["", "a"]),
    ("array", {"type": "array", "items": {"type": "boolean"}}, ["[]", "[true]", "[true, false]"], ["[1]", "[true,]"]),
    ("array of a length", {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 3}, ["[1, 1]", "[1,1,1]"], ["[]", "[1]", "[1,1,1,1]"]),
    ("array of at most one", {"type": "array", "items": {"const": 1}, "maxItems": 1}, ["[]", "[1]"], ["[1,1]"]),
    ("empty array", {"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
    ("long array", {"type": "array", "items": {"type": "object"}, "maxItems": 900}, ["[{}]"], ["[1]"]),
    ("tuple", {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}, ['[1, "a"]'], ["[1]", '["a", 1]']),
    ("any of", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["3", "null"], ["true"]),
    ("one of, shared type", {"type": "object", "oneOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"b": {"const": 2}}, "required": ["b"]}]}, ['{"a": 1}', '{"b": 2}'], ['{"c": 3}']),
    ("all of", {"$defs": {"p": POINT}, "allOf": [{"$ref": "#/$defs/p"}], "description": "d"}, ['{"x": 1}'], ["{}"]),
    ("all of two", {"allOf": [POINT, {"properties": {"z": {"const": 9}}, "required": ["z"]}]}, ['{"x": 1, "z": 9}'], ['{"x": 1}']),
    ("recursive", TREE, ['{"name": "a", "inside": [{"name": "b", "inside": []}]}'], ['{"inside": []}']),
    ("escaped key", {"properties": {'k"\\é': {"const": 1}}, "required": ['k"\\é']}, ['{"k\\"\\\\é": 1}'], ['{"k": 1}']),
    ("loosely: a pattern is left out", {"type": "string", "pattern": "^a+$"}, ['"b"'], ["1"]),
    ("loosely: a long length is left out", {"type": "string", "maxLength": 5000}, ['"b"'], ["1"]),
]  # fmt: skip

WEATHER = Tool("get_weather", "w", {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2]}}, "required": ["city"]})  # fmt: skip
PING = Tool("ping.all", None, {"type": "object", "properties": {}, "additionalProperties": False})


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaCppEngine]:
    engine = create(tiny_config(threads=1, batch_threads=1), lambda _: None)
    assert isinstance(engine, LlamaCppEngine)
    yield engine
    engine.close()


def matches(engine: LlamaCppEngine, grammar: str, text: str) -> bool:
    """Whether the text is a word of the grammar, as llama.cpp follows it: a token a byte, then the end."""
    follower = Grammar(engine._text._vocab, grammar, engine._text.end_tokens)
    try:
        for byte in text.encode():
            if not follower._allows(byte):
                return False
            ll.llama_sampler_accept(follower._sampler, byte)
        return follower._allows(END)
    finally:
        follower.close()


def compute(engine: LlamaCppEngine) -> None:
    """There are logits to choose from."""
    engine.drop(0)
    prefill(engine, 0, prompt(20))


def complete(engine: LlamaCppEngine, params: SamplingParams, most: int = 200) -> str:
    """A completion of a prompt, until its end."""
    compute(engine)
    sampler = engine.new_sampler(params, Tokens())
    tokens: list[int] = []
    try:
        while len(tokens) < most:
            sampled = sampler.sample(0)
            if sampled.is_end:
                break
            tokens.append(sampled.token)
            engine.decode([Row(0, 20 + len(tokens) - 1, Tokens.of(tokens[-1:]), True)])
    finally:
        sampler.close()
    return bytes(tokens).decode()


def params(grammar: str | None, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, "temperature": 0, "grammar": grammar, **changes})


@pytest.mark.parametrize("grammar", GOOD.values(), ids=GOOD)
def test_what_passes_the_check_is_read(engine: LlamaCppEngine, grammar: str) -> None:
    Grammar(engine._text._vocab, grammar, engine._text.end_tokens).close()


def test_random_grammars_that_pass_the_check_are_read(engine: LlamaCppEngine) -> None:
    draw = random.Random(7)
    passed = 0
    for _ in range(1500):
        text = random_grammar(draw)
        try:
            check(text)
        except GrammarError:
            continue
        passed += 1
        Grammar(engine._text._vocab, text, engine._text.end_tokens).close()
    assert passed > 100


def random_grammar(draw: random.Random) -> str:
    def item(depth: int) -> str:
        if depth < 3 and draw.random() < 0.3:
            return f"( {row(depth + 1)} )"
        return draw.choice(['"a"', '"b\\n"', "[a-z]", '[^"\\\\]', ".", "[\\]-]", *later])

    def sequence(depth: int) -> str:
        repeats = ["", "", "", "", "*", "+", "?", "{2}", "{0,3}", "{ 1 , }", "{30}", " *"]
        items = [item(depth) + draw.choice(repeats) for _ in range(draw.randint(1, 3))]
        return " ".join(['""', *items] if draw.random() < 0.1 else items)

    def row(depth: int) -> str:
        return " | ".join(sequence(depth) for _ in range(draw.randint(1, 3)))

    names = ["root", "a", "b-1", "c"]
    lines = []
    for n, name in enumerate(names):
        later = names[n + 1 :]
        lines.append(f"{name} ::= {row(0)}")
    text = "\n".join(lines)
    if draw.random() < 0.3:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice('"[](){}|*\\#\n:') + text[at + 1 :]
    return text


@pytest.mark.parametrize(("schema", "good", "bad"), [case[1:] for case in SCHEMAS], ids=[case[0] for case in SCHEMAS])
def test_a_schema_allows_what_it_describes_and_nothing_else(
    engine: LlamaCppEngine, schema: Any, good: list[str], bad: list[str]
) -> None:
    grammar = json_answer(schema, strict=False)
    assert [text for text in good if not matches(engine, grammar, text)] == []
    assert [text for text in bad if matches(engine, grammar, text)] == []


def test_choices_are_texts_as_they_are(engine: LlamaCppEngine) -> None:
    grammar = one_of(["yes", 'n"o', "a\nb\t\\"])
    assert all(matches(engine, grammar, text) for text in ("yes", 'n"o', "a\nb\t\\"))
    assert not any(matches(engine, grammar, text) for text in ("", "ye", "yes!"))


@pytest.mark.parametrize("form", list(ToolFormat))
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_required_calls_are_calls_of_the_tools(engine: LlamaCppEngine, form: ToolFormat, seed: int) -> None:
    use = ToolUse((WEATHER, PING), ToolChoice.REQUIRED, parallel=False)
    answer = complete(engine, params(calls_answer(form, use), temperature=1.5, seed=seed))
    parser, found = CallParser(form, use.tools), Gathered()
    found.add([*parser.feed(answer), *parser.finish()])
    assert (found.text, len(found.calls)) == ("", 1)
    (call,) = found.calls
    arguments = json.loads(call.arguments)
    assert arguments == {} if call.name == PING.name else arguments["city"] in ("Rome", "Oslo")


@pytest.mark.parametrize("form", list(ToolFormat))
def test_a_named_tool_is_the_only_one(engine: LlamaCppEngine, form: ToolFormat) -> None:
    grammar = calls_answer(form, ToolUse((WEATHER, PING), ToolChoice.REQUIRED, PING.name))
    assert PING.name in grammar
    assert WEATHER.name not in grammar


def test_calls_or_an_answer(engine: LlamaCppEngine) -> None:
    grammar = calls_answer(ToolFormat.HERMES, ToolUse((PING,)), POINT)
    assert matches(engine, grammar, '{"x": 1}')
    assert matches(engine, grammar, '<tool_call>\n{"name": "ping.all", "arguments": {}}\n</tool_call>')
    assert not matches(engine, grammar, "{}")


def test_completions_keep_to_their_schema_whatever_the_sampling(engine: LlamaCppEngine) -> None:
    schema = {"properties": {"n": {"type": "integer"}, "s": {"type": "string", "maxLength": 5}, "e": {"enum": ["a", "b"]}}, "required": ["n", "s", "e"]}  # fmt: skip
    grammar = json_answer(schema, strict=True)
    answers = set()
    for seed in range(8):
        tuning = {"temperature": 1.8, "seed": seed, "top_k": 5 * seed, "top_p": 0.7, "repeat_penalty": 1.2}
        answer = complete(engine, params(grammar, **tuning))
        assert set(json.loads(answer)) == {"n", "s", "e"}
        answers.add(answer)
        assert complete(engine, params(grammar, **tuning)) == answer, "the same seed, the same answer"
    assert len(answers) > 1


def test_a_grammar_that_biases_leave_nothing_of_is_an_error(engine: LlamaCppEngine) -> None:
    compute(engine)
    sampler = engine.new_sampler(params('root ::= "a"', logit_bias=((ord("a"), float("-inf")),)), Tokens())
    with pytest.raises(RequestError, match="logit_bias"):
        sampler.sample(0)
    sampler.close()


def test_a_complete_answer_ends_also_below_min_tokens(engine: LlamaCppEngine) -> None:
    assert complete(engine, params('root ::= "ab"', min_tokens=9)) == "ab"


def test_no_end_before_min_tokens(engine: LlamaCppEngine) -> None:
    bias = ((END, 100.0),)
    assert complete(engine, params(None, logit_bias=bias)) == ""
    assert len(complete(engine, params(None, logit_bias=bias, min_tokens=5))) == 5


def test_a_grammar_that_gets_too_slow_fails_its_request_only(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.engine.llamacpp.grammar.MAX_STEP_S", -1.0)
    compute(engine)
    sampler = engine.new_sampler(params("root ::= [a-z]*"), Tokens())
    with pytest.raises(RequestError, match="too long"):
        sampler.sample(0)
    sampler.close()

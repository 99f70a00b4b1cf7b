"""Tool calls are found in every family's form, however the answer is cut; what is no call stays text."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import pytest

from appliance.chat.calls import CallArguments, CallEnded, CallEvent, CallParser, CallStarted, Gathered, Said
from appliance.chat.tools import Tool, ToolCall, ToolFormat

WEATHER = Tool("get_weather", "Weather of a city", {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"],
})  # fmt: skip
TIME = Tool("get_time", None, {"type": "object", "properties": {"zone": {"type": "string"}}})
TOOLS = (WEATHER, TIME)
PARIS = ToolCall("get_weather", '{"city": "Paris"}')
BRACES = ToolCall("get_weather", '{"city": "a}\\"]{ é", "days": 3}')
UTC = ToolCall("get_time", '{"zone": "UTC"}')

H, X, F, L, M, D = (
    ToolFormat.HERMES, ToolFormat.XML, ToolFormat.FUNCTION, ToolFormat.LLAMA, ToolFormat.MISTRAL, ToolFormat.DEEPSEEK,
)  # fmt: skip


def hermes(call: ToolCall) -> str:
    return f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'


def v3(call: ToolCall) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call.name}\n```json\n{call.arguments}\n```<｜tool▁call▁end｜>"


def v31(call: ToolCall) -> str:
    return f"<｜tool▁call▁begin｜>{call.name}<｜tool▁sep｜>{call.arguments}<｜tool▁call▁end｜>"


CASES: list[tuple[str, ToolFormat, str, str, list[ToolCall]]] = [
    ("hermes", H, hermes(PARIS), "", [PARIS]),
    ("hermes with text", H, "Let me look.\n\n" + hermes(PARIS), "Let me look.", [PARIS]),
    ("hermes twice", H, hermes(PARIS) + "\n" + hermes(UTC) + "\n", "", [PARIS, UTC]),
    ("hermes with text between", H, hermes(PARIS) + "\nand " + hermes(UTC), "\nand", [PARIS, UTC]),
    ("hermes with brackets in strings", H, hermes(BRACES), "", [BRACES]),
    ("hermes without an end", H, hermes(PARIS).removesuffix("\n</tool_call>"), "", [PARIS]),
    ("hermes without its last brace", H, hermes(PARIS).replace("}}", "}"), "", [PARIS]),
    ("hermes arguments first", H, '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}', "", [PARIS]),
    ("hermes arguments as a string", H, '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', "", [PARIS]),
    ("hermes without arguments", H, '<tool_call>{"name": "get_time"}</tool_call>', "", [ToolCall("get_time", "{}")]),
    ("hermes list", H, f'<tool_call>[{{"name": "get_weather", "arguments": {PARIS.arguments}}}, {{"name": "get_time", "arguments": {UTC.arguments}}}]</tool_call>', "", [PARIS, UTC]),
    ("hermes of a tool nobody gave", H, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "", [ToolCall("rm", "{}")]),
    ("hermes empty name", H, '<tool_call>{"name": "", "arguments": {}}</tool_call>', '<tool_call>{"name": "", "arguments": {}}</tool_call>', []),
    ("hermes not json", H, "<tool_call>get_weather(Paris)</tool_call>", "<tool_call>get_weather(Paris)</tool_call>", []),
    ("hermes arguments a list", H, '<tool_call>{"name": "get_time", "arguments": [1]}</tool_call>', '<tool_call>{"name": "get_time", "arguments": [1]}</tool_call>', []),
    ("hermes cut off before the arguments", H, ' <tool_call>{"name": "get_ti', ' <tool_call>{"name": "get_ti', []),
    ("hermes cut off in the arguments", H, 'so: <tool_call>{"name": "get_time", "arguments": {"zone": "U', 'so: <tool_call>{"name": "get_time", "arguments": {"zone": "U', []),
    ("hermes brackets that do not match", H, 'x <tool_call>{"name": "get_time", "arguments": {"zone": ]', 'x <tool_call>{"name": "get_time", "arguments": {"zone": ]', []),
    ("hermes arguments that are no JSON", H, '<tool_call>{"name": "get_time", "arguments": {zone: UTC}}</tool_call> done', '<tool_call>{"name": "get_time", "arguments": {zone: UTC}}</tool_call> done', []),
    ("hermes a call after a broken one", H, "<tool_call>oops " + hermes(UTC), "<tool_call>oops", [UTC]),
    ("hermes a marker alone", H, "a < b <tool_cal", "a < b <tool_cal", []),
    ("plain text", H, " Hello, wörld!\n", " Hello, wörld!\n", []),
    ("nothing", H, "", "", []),
    ("xml", X, "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>", "", [PARIS]),
    ("xml without tool_call", X, "Sure.\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>", "Sure.", [PARIS]),
    ("xml types", X, "<tool_call><function=get_weather><parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n</parameter></function></tool_call>", "", [ToolCall("get_weather", '{"city": "12", "days": 3}')]),
    ("xml lines", X, '<tool_call><function=get_time><parameter=zone>\na\n"b"\n\n</parameter></function></tool_call>', "", [ToolCall("get_time", '{"zone": "a\\n\\"b\\"\\n"}')]),
    ("xml without parameters", X, "<tool_call>\n<function=get_time>\n</function>\n</tool_call>", "", [ToolCall("get_time", "{}")]),
    ("xml cut off", X, "<tool_call>\n<function=get_time>\n<parameter=zone>\nUT", "<tool_call>\n<function=get_time>\n<parameter=zone>\nUT", []),
    ("function", F, '<function=get_weather>{"city": "Paris"}</function>', "", [PARIS]),
    ("function twice", F, 'Both:<function=get_weather>{"city": "Paris"}</function>\n<function=get_time>{"zone": "UTC"}</function>', "Both:", [PARIS, UTC]),
    ("function prose", F, "write <function=> or <function=f", "write <function=> or <function=f", []),
    ("llama", L, '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ("llama with a type", L, '\n{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ("llama with the tag", L, '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ("llama twice", L, '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "get_time", "parameters": {"zone": "UTC"}}', "", [PARIS, UTC]),
    ("llama an unknown name is an answer", L, '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    ("llama other JSON is an answer", L, '{"city": {"name": "get_time"}}', '{"city": {"name": "get_time"}}', []),
    ("llama a call inside text is text", L, 'Use {"name": "get_time", "parameters": {}}', 'Use {"name": "get_time", "parameters": {}}', []),
    ("llama python", L, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("mistral", M, '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
    ("mistral list", M, '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}, {"name": "get_time", "arguments": {"zone": "UTC"}}]', "", [PARIS, UTC]),
    ("mistral list broken in the second", M, '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, {"nam', ", {\"nam", [PARIS]),
    ("mistral later form", M, 'Now.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[CALL_ID]123456789[ARGS]{"zone": "UTC"}', "Now.", [PARIS, UTC]),
    ("mistral without a marker", M, 'get_weather{"city": "Paris"}', 'get_weather{"city": "Paris"}', []),
    ("deepseek v3", D, "<｜tool▁calls▁begin｜>" + v3(PARIS) + "\n" + v3(UTC) + "<｜tool▁calls▁end｜>", "", [PARIS, UTC]),
    ("deepseek v3.1", D, "Well.<｜tool▁calls▁begin｜>" + v31(PARIS) + v31(BRACES) + "<｜tool▁calls▁end｜>", "Well.", [PARIS, BRACES]),
    ("deepseek without the outer marker", D, v31(PARIS), "", [PARIS]),
    ("deepseek broken in the second", D, "<｜tool▁calls▁begin｜>" + v31(PARIS) + "<｜tool▁call▁begin｜>get_time!", "<｜tool▁call▁begin｜>get_time!", [PARIS]),
]  # fmt: skip

parametrized = pytest.mark.parametrize(
    ("form", "answer", "text", "calls"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)


def parse(form: ToolFormat, pieces: Sequence[str], *, parallel: bool = True) -> list[CallEvent]:
    parser = CallParser(form, TOOLS, parallel=parallel)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return [*events, *parser.finish()]


def gathered(events: Sequence[CallEvent]) -> tuple[str, list[ToolCall]]:
    whole = Gathered()
    whole.add(events)
    return whole.text, whole.calls


def merged(events: Sequence[CallEvent]) -> list[CallEvent]:
    """Neighbouring pieces of text, and of arguments, as one."""
    out: list[CallEvent] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Said) and isinstance(last, Said):
            out[-1] = Said(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            out[-1] = CallArguments(event.index, last.fragment + event.fragment)
        else:
            out.append(event)
    return out


@parametrized
def test_calls_and_text_of_a_whole_answer(form: ToolFormat, answer: str, text: str, calls: list[ToolCall]) -> None:
    assert gathered(parse(form, [answer])) == (text, calls)
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)


@parametrized
def test_where_an_answer_is_cut_makes_no_difference(
    form: ToolFormat, answer: str, text: str, calls: list[ToolCall]
) -> None:
    expected = merged(parse(form, [answer]))
    assert merged(parse(form, list(answer))) == expected
    for cut in range(1, len(answer)):
        assert merged(parse(form, [answer[:cut], answer[cut:]])) == expected


@parametrized
def test_every_call_is_announced_argued_and_ended_in_order(
    form: ToolFormat, answer: str, text: str, calls: list[ToolCall]
) -> None:
    current = -1
    is_open = False
    for event in parse(form, list(answer)):
        if isinstance(event, CallStarted):
            current += 1
            assert (event.index, is_open) == (current, False)
            is_open = True
        elif isinstance(event, (CallArguments, CallEnded)):
            assert (event.index, is_open) == (current, True)
            is_open = not isinstance(event, CallEnded)
    assert not is_open


def test_arguments_stream_while_they_are_written() -> None:
    parser = CallParser(H, TOOLS)
    assert parser.feed('Hm. <tool_call>{"name": "get_wea') == [Said("Hm.")]
    assert parser.feed('ther", "arguments": {"ci') == [CallStarted(0, "get_weather"), CallArguments(0, '{"ci')]
    assert parser.feed('ty": "P') == [CallArguments(0, 'ty": "P')]
    assert parser.calls == 1


def test_text_is_not_held_back_without_need() -> None:
    parser = CallParser(H, TOOLS)
    assert parser.feed("Hello") == [Said("Hello")]
    assert parser.feed(" w<") == [Said(" w")]
    assert parser.feed("b>") == [Said("<b>")]


@pytest.mark.parametrize("form", [H, M, D])
def test_only_the_first_call_counts_when_calls_may_not_be_parallel(form: ToolFormat) -> None:
    answer = {
        H: hermes(PARIS) + hermes(UTC),
        M: '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_time"}]',
        D: "<｜tool▁calls▁begin｜>" + v3(PARIS) + v3(UTC),
    }[form]
    events = parse(form, list(answer), parallel=False)
    assert gathered(events) == ("", [PARIS])


@pytest.mark.parametrize("form", list(ToolFormat))
def test_hostile_answers_end_and_lose_nothing(form: ToolFormat) -> None:
    for opening in (
        "<tool_call>",
        "[TOOL_CALLS]",
        "<function=f>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>",
        "",
    ):
        for body in (
            "{" * 5000,
            "[" * 5000,
            '{"name": "get_time", "arguments": ' + '{"a":' * 3000,
            '"' + "\\" * 999,
            "\x00{}",
        ):
            text, calls = gathered(parse(form, [opening + body]))
            assert (text, calls) == (opening + body, [])


ENDLESS = {
    "space": "\n" * 40_000,
    "space before a call": "\n" * 40_000 + "<tool_call>",
    "openings": "<tool_call>" * 4_000,
    "beginnings of openings": "< " * 20_000,
    "brackets": "<tool_call>" + "[" * 40_000,
}


@pytest.mark.parametrize("form", ToolFormat, ids=str)
@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_answer_is_read_as_fast_as_it_comes(form: ToolFormat, text: str) -> None:
    """Parsers run beside everything else that the control process does."""
    parser = CallParser(form, [Tool("f")])
    began_s = time.process_time()
    said = "".join(event.text for character in text for event in parser.feed(character) if isinstance(event, Said))
    said += "".join(event.text for event in parser.finish() if isinstance(event, Said))
    assert time.process_time() - began_s < 5
    assert said == text

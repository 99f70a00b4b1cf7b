"""A grammar passes only if llama.cpp reads it, in bounded time; what is wrong is said without quoting it."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest

from appliance.chat.gbnf import GrammarError, check

GOOD = {
    "one literal": 'root ::= "a"',
    "json": (
        'root ::= object\nvalue ::= object | array | string | number | ("true" | "false" | "null") ws\n'
        'object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws\n'
        'array ::= "[" ws ( value ("," ws value)* )? "]" ws\n'
        'string ::= "\\"" ( [^"\\\\\\x7F\\x00-\\x1F] | "\\\\" (["\\\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\\"" ws\n'
        'number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws\n'
        'ws ::= | " " | "\\n" [ \\t]{0,20}\n'
    ),
    "comments and lines": '# a grammar\nroot ::= # here\n  (\n "a" |\n "b" # there\n )\n\n# the end',
    "counts": 'root ::= "a"{2} "b"{2,} "c"{0,9} "d"{ 1 , 1000 }',
    "many choices": "root ::= " + " | ".join(f'"{n}"' for n in range(5000)),
    "any character": "root ::= .*",
    "right recursion": 'root ::= "a" root | ""',
    "empty": 'root ::= ""',
    "unicode": 'root ::= "é🙂" [à-ü] "\\u00e9\\U0001F642\\x41"',
    "optional parts": "root ::= " + " ".join(f'"{n}"?' for n in range(200)),
    "Windows lines": 'root ::= a\r\na ::= "x"\r\n',
}

BAD = {
    "nothing": ("", '"root"'),
    "no root": ('a ::= "x"', '"root"'),
    "open literal": ('root ::= "a', "line 1, column 10"),
    "open class": ("root ::= [a-z", "column 10"),
    "open group": ('root ::= ("a"', '"\\)"'),
    "unknown escape": ('root ::= "\\q"', "literal"),
    "no arrow": ('root = "a"', "::="),
    "rule twice": ('root ::= "a"\nroot ::= "b"', "not there before"),
    "missing rule": ("root ::= a", "does not have"),
    "missing rule behind": ('root ::= "x" a', "does not have"),
    "missing rule in a group": ('root ::= "x" ("y" (a))', "does not have"),
    "left recursion": ('root ::= root "a" | "b"', "begins with itself"),
    "hidden left recursion": ('root ::= a\na ::= ""  b\nb ::= "x"? root', "begins with itself"),
    "endless emptiness": ('root ::= ("a"*)*', "can be empty"),
    "endless emptiness behind": ('root ::= "x" ("a"?)+', "can be empty"),
    "repeated too often": ('root ::= "a"{1001}', "1000 times"),
    "repeated too often in all": ('root ::= (("a"? "b"?){100}){100}', "1000 parts"),
    "count upside down": ('root ::= "a"{3,2}', "count"),
    "count of nothing": ('root ::= "a"{0}', "count"),
    "repeated nothing": ('root ::= ""*', "to repeat"),
    "operator alone": ('root ::= *', "end of the line"),
    "nested": ("root ::= " + "(" * 101 + '"a"' + ")" * 101, "nests"),
    "chained": ("\n".join(["root ::= r0", *(f"r{n} ::= r{n + 1}" for n in range(200)), 'r200 ::= "x"']), "begin with rules"),
    "doubling": ("\n".join(["root ::= r0", *(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(14)), 'r14 ::= "" | "x"']), "in a row|ways"),
    "doubling behind": ("\n".join(['root ::= "x" r0', *(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(14)), 'r14 ::= "" | "x"']), "in a row|ways"),
    "many optional parts": ("root ::= " + " ".join(['"a"?'] * 300), "in a row"),
    "too many choices": ("root ::= " + " | ".join(['"a"'] * 10_001), "10000 ways"),
    "too many rules": ("\n".join(["root ::= r0", *(f'r{n} ::= "x"' for n in range(4001))]), "4000 rules"),
    "too long": ('root ::= "a" #' + " " * 2**16, "characters"),
    "token": ("root ::= <[1]>", "end of the line"),
    "zero byte": ('root ::= "\x00"', "literal"),
}  # fmt: skip


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_what_llama_cpp_reads_passes(text: str) -> None:
    check(text)


@pytest.mark.parametrize(("text", "reason"), BAD.values(), ids=BAD)
def test_what_it_cannot_read_or_follow_is_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason) as caught:
        check(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["(" * 60_000, "root ::= " + '"a" ' * 16_000, "root ::= [" + "a-z" * 20_000 + "]", "root ::= " + "a|" * 30_000, "#" * 60_000,
     "root ::= " + '("a"|' * 90 + '"b"' + ")" * 90, 'root ::= "' + "\\" * 60_000 + '"', "root ::= " + "|" * 60_000],
)  # fmt: skip
def test_hostile_grammars_are_judged_in_bounded_time(text: str) -> None:
    began_s = time.process_time()
    with suppress(GrammarError):
        check(text)
    assert time.process_time() - began_s < 5

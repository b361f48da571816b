"""The calculator: the original's answers but for its bugs; hostile expressions."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.engine.tools import MAX_CHARS, ToolCall, Tools, calculate
from nanochat_jax.tokenizer import Tokenizer

# What recipe section 12 fixes: tuples, commas that separate no thousands, chained string methods,
# words that the original refused (any string's letters may be counted), arithmetic on a count, %.
FIXED = re.compile(r"\(\s*\)|(?<!\d),|\d{4},|,(?!\d{3}(?!\d))|['\"]|%")
SIMPLE_COUNT = re.compile(r"(['\"])([\w ]*)\1 ?\.count\((['\"])(\w*)\3\)")


@pytest.mark.golden
def test_the_answers_of_the_original(golden):
    cases = golden.json("calculator")["cases"]
    compared = 0
    for case in cases:
        expression, got = case["expr"], calculate(case["expr"])
        if found := SIMPLE_COUNT.fullmatch(expression):
            assert got == found.group(2).count(found.group(4)), expression
        elif not FIXED.search(expression):
            assert (got is None) == case["is_none"], expression
            assert got is None or str(got) == case["str"], expression
            compared += 1
    assert compared > len(cases) // 2


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("5 % 3", 2),
        ("7 // 2", 3),
        ("'a,b,c'.count(',')", 2),
        ("'direct'.count('d')", 1),
        ("'input'.count('i') * 2 + 1", 3),
        ("'é'.count('é')", 1),
        ('"it\'s".count("\'")', 1),
        ("12,345,678.5 - 0.5", 12345678.0),
        ("1,234 * (2 + 3)", 6170),
    ],
)
def test_what_it_understands_beyond_the_original(expression, value):
    assert calculate(expression) == value
    assert type(calculate(expression)) is type(value)


@pytest.mark.parametrize(
    "expression",
    [
        "(1,2)", "()", "1,23", "1234,567", "'abc'", "'a' + 'b'", "'a' * 9", "[1]", "x", "True",
        "'hello'.upper().count('l')", "'a'.count('b', 0)", "'a'.count", "'a'.count(1)",
        "__import__('os').system('true')", "'a'.__class__", "().count(1)", "f'{1}'.count('1')",
        "b'a'.count('a')", "'\\x61'.count('a')", "1 if 1 else 2", "1 and 2", "1 == 1", "2 ** 3",
        "1e3", "0x10", "1_000", "1j", "1\n+1", "1 # one", "lambda: 1", "(x := 1)", "1; 2",
        "1/0", "1//0", "1%0", "9" * 101, "9" * 400 + " * 1.0", "((1)", "\0", "١+1", "",
    ],
)  # fmt: skip
def test_what_it_refuses(expression):
    assert calculate(expression) is None


@pytest.mark.parametrize(
    "hostile",
    ["(" * 400 + "1" + ")" * 400, "-" * 900 + "1", "1+" * 499 + "1", "9*" * 499 + "9", "1" * 10**6],
)
def test_hostile_expressions_are_answered_or_refused(hostile):
    value = calculate(hostile)
    assert value is None or (isinstance(value, int) and len(hostile) <= MAX_CHARS)


@given(st.text(alphabet="0123456789+-*/%.,() '\"countabc", max_size=40))
def test_no_text_breaks_it(text):
    assert isinstance(calculate(text), int | float | None)


@given(a=st.integers(0, 10**6), b=st.integers(1, 10**6), c=st.floats(0, 10**6, width=32))
def test_it_computes_as_python_does(a, b, c):
    assert calculate(f"({a:,} - {b}) * {b} // 7 % 11") == (a - b) * b // 7 % 11
    assert calculate(f"{a}/{b}+{c:.3f}") == a / b + float(f"{c:.3f}")


def test_a_block_is_followed_token_by_token():
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])
    tools = Tools(tokenizer)
    block = ToolCall(tools)
    start, end = tools.python_start, tools.python_end

    def feed(tokens):
        return [block.feed(token) for token in tokens]

    assert feed([*b"3*4", end]) == [[]] * 4  # no block was open
    *before, answer = feed([start, *b"9+", start, *b"3*4", end])
    assert before == [[]] * 7
    assert tokenizer.decode(answer) == "<|output_start|>12<|output_end|>"
    assert feed([start, *b"open()", end])[-1] == []
    assert feed([end]) == [[]]

"""Sums, plain and as word problems, for which the assistant calls the calculator.

Answers end as GSM8K's do, "#### 42", and have the same judge. The expression in the call has the
numbers of the question in the same order: a small model can learn to copy them.
"""

import random
from typing import NamedTuple

from nanochat_jax.tasks.synthetic import Example
from nanochat_jax.tasks.task import exchange, python, text

NAMES = ("Ada", "Ben", "Clara", "Emil", "Grace", "Ivo", "Lena", "Max", "Nora", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "flowers", "shells", "stamps", "stones")
PLAIN = (
    "What is {sum}?",
    "What is {sum}?",
    "How much is {sum}?",
    "Compute {sum}.",
    "Please calculate {sum}.",
    "{sum}",
    "{sum} = ?",
)
SPOKEN = {"+": ("+", "plus"), "-": ("-", "minus"), "*": ("*", "x", "times"), "/": ("/",)}
STORIES = {
    "+": (
        "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?",
        "There are {a} {things} on the table and {b} in the box. How many are there in all?",
    ),
    "-": (
        "{name} has {a} {things} and gives away {b}. How many {things} are left?",
        "Of {a} {things}, {b} are lost. How many remain?",
    ),
    "*": (
        "{name} has {a} bags with {b} {things} in each. How many {things} is that?",
        "One day brings {a} {things}. How many do {b} days bring?",
    ),
    "/": (
        "{name} shares {a} {things} equally among {b} friends. How many does each one get?",
        "{a} {things} fill {b} boxes equally. How many are in one box?",
    ),
}


class Sum(NamedTuple):
    """a op b, and its value as the calculator gives it."""

    a: int
    op: str
    b: int

    @property
    def value(self) -> int | float:
        a, b = self.a, self.b
        return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else 0}[self.op]


def sample_arithmetic(rng: random.Random) -> Example:
    """One question; its key is the expression."""
    kind = rng.random()
    if kind < 0.15:
        return _long_sum(rng)
    one = _sum(rng)
    suits_a_story = min(one.a, one.b) > 1 and one.value > 0
    question = _story(rng, one) if kind < 0.45 and suits_a_story else _plain(rng, one)
    return _solved(question, f"{one.a}{one.op}{one.b}", one.value)


def _solved(question: str, expression: str, value: int | float) -> Example:
    short = str(value).removesuffix(".0")  # a quotient is 12.0 for the calculator
    answer = [*python(expression, str(value)), text(f"That makes {short}.\n#### {short}")]
    return Example(expression, exchange(question, answer))


def _number(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3)))


def _sum(rng: random.Random) -> Sum:
    op = rng.choice("+++--**/")
    if op == "/":
        b = rng.randrange(2, 13)
        # Quotients by two, four, five and ten have few decimals.
        return Sum(_number(rng) if b in (2, 4, 5, 10) else b * rng.randrange(1, 50), op, b)
    a, b = _number(rng), _number(rng)
    if op == "*":
        return Sum(a, op, b % 100)
    # Most differences are positive.
    return Sum(max(a, b), op, min(a, b)) if op == "-" and rng.random() < 0.8 else Sum(a, op, b)


def _plain(rng: random.Random, one: Sum) -> str:
    op = rng.choice(SPOKEN[one.op])
    space = " " if op.isalpha() or rng.random() < 0.7 else ""
    return rng.choice(PLAIN).format(sum=f"{one.a}{space}{op}{space}{one.b}")


def _story(rng: random.Random, one: Sum) -> str:
    return rng.choice(STORIES[one.op]).format(
        name=rng.choice(NAMES), things=rng.choice(THINGS), a=one.a, b=one.b
    )


def _long_sum(rng: random.Random) -> Example:
    """Three numbers, sometimes with parentheses."""
    a, b, c = (rng.randrange(1, 100) for _ in range(3))
    spaced, value = rng.choice(
        (
            (f"{a} + {b} + {c}", a + b + c),
            (f"{a} + {b} - {c}", a + b - c),
            (f"{a} * {b} + {c}", a * b + c),
            (f"({a} + {b}) * {c}", (a + b) * c),
        )
    )
    question = rng.choice(PLAIN).format(sum=spaced)
    return _solved(question, spaced.replace(" ", ""), value)

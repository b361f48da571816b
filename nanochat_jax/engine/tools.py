"""The calculator that the model may call: arithmetic and counting letters, nothing else.

A python block holds an expression; its value is forced into the stream as the block's output. The
grammar is the part of Python's with numbers, + − * / // %, parentheses and `.count` on a string.
Nothing is ever evaluated as code.
"""

import ast
import math
import re

from nanochat_jax.tokenizer import Tokenizer

MAX_CHARS = 1000  # of an expression
MAX_DEPTH = 50  # of parentheses and signs
MAX_DIGITS = 100  # of a result

_STRING = re.compile(r"'[^'\\\n]*'|\"[^\"\\\n]*\"")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_OUTSIDE_STRINGS = re.compile(r"(?:[\d+\-*/%.() ]|\.count)*")
_NUMBER = re.compile(r"\d+\.?\d*|\.\d+")

_OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}
_SIGNS = {ast.UAdd: lambda a: a, ast.USub: lambda a: -a}


class Tools:
    """The markers of tool calls as token ids, and the calculator's answers as tokens."""

    def __init__(self, tokenizer: Tokenizer):
        names = ("python_start", "python_end", "output_start", "output_end")
        ids = (tokenizer.special_id(f"<|{name}|>") for name in names)
        self.python_start, self.python_end, self.output_start, self.output_end = ids
        self._tokenizer = tokenizer

    def answer(self, expression: list[int]) -> list[int]:
        """The output block to force after a python block; [] when there is no result."""
        result = calculate(self._tokenizer.decode(expression))
        if result is None:
            return []
        return [self.output_start, *self._tokenizer.encode(str(result)), self.output_end]


class ToolCall:
    """Follows one sample's tokens: which of them are the expression of the open python block."""

    def __init__(self, tools: Tools):
        self._tools = tools
        self._expression: list[int] | None = None
        self.pause_id = tools.python_end  # the token after which there may be an answer to force

    def feed(self, token: int) -> list[int]:
        """The tokens to force after this one."""
        if token == self._tools.python_start:
            self._expression = []  # an unfinished block starts again
        elif token == self._tools.python_end and self._expression is not None:
            expression, self._expression = self._expression, None
            return self._tools.answer(expression)
        elif self._expression is not None:
            self._expression.append(token)
        return []


def calculate(expression: str) -> int | float | None:
    """The value of an expression; None for anything outside the grammar."""
    if len(expression) > MAX_CHARS:
        return None
    source = _without_commas(expression).strip(" ")
    # An upper bound on the syntax tree's depth: parentheses, and the longest run of signs.
    depth = source.count("(") + max(map(len, re.findall(r"[+\- ]+", source)), default=0)
    if not _OUTSIDE_STRINGS.fullmatch(_STRING.sub("", source)) or depth > MAX_DEPTH:
        return None
    try:
        result = _value(ast.parse(source, mode="eval").body, source)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError):
        return None
    is_finite = isinstance(result, int) or math.isfinite(result)
    return result if is_finite and abs(result) < 10**MAX_DIGITS else None


def _without_commas(expression: str) -> str:
    """1,234 means 1234; a comma inside a string stays."""
    parts = re.split(f"({_STRING.pattern})", expression)
    parts[::2] = [_THOUSANDS.sub(lambda m: m.group().replace(",", ""), p) for p in parts[::2]]
    return "".join(parts)


def _value(node: ast.expr, source: str) -> int | float:
    """Evaluates the syntax tree; ValueError for anything outside the grammar."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            if _NUMBER.fullmatch(ast.get_source_segment(source, node) or ""):
                return number
        case ast.BinOp(op=op) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_value(node.left, source), _value(node.right, source))
        case ast.UnaryOp(op=op) if type(op) in _SIGNS:
            return _SIGNS[type(op)](_value(node.operand, source))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return text.count(part)
    raise ValueError(f"not in the calculator's grammar: {ast.dump(node)}")

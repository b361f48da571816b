"""Probabilities of tokens in the two shapes that OpenAI's endpoints have for them."""

from collections.abc import Iterable
from typing import Any

from nanochat_jax.serve.conversation import Piece, Said
from nanochat_jax.tokenizer import Tokenizer

LEAST = -9999.0  # what OpenAI says for "impossible", since JSON has no infinity


def chat_logprobs(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> dict[str, Any]:
    """choices[].logprobs of a chat: an entry for each token that was drawn."""
    content = [
        {
            **_entry(tokenizer, said.token.id, said.token.logprob),
            "top_logprobs": [_entry(tokenizer, *top) for top in said.token.alternatives],
        }
        for said in drawn(pieces)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, pieces: Iterable[Piece], alternatives: int
) -> dict[str, Any]:
    """choices[].logprobs of a completion: four lists of equal length."""
    tokens = list(drawn(pieces))
    tops = [
        {_name(tokenizer, id): _finite(logprob) for id, logprob in said.token.alternatives}
        for said in tokens
    ]
    return {
        "tokens": [_name(tokenizer, said.token.id) for said in tokens],
        "token_logprobs": [_finite(said.token.logprob) for said in tokens],
        "top_logprobs": tops if alternatives else None,
        "text_offset": [said.offset for said in tokens],
    }


def drawn(pieces: Iterable[Piece]) -> Iterable[Said]:
    """The tokens that the model chose, without the answers of tools."""
    return (said for piece in pieces for said in piece.tokens if not said.token.forced)


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    # A special token stands for no bytes of the text.
    is_text = token < len(tokenizer.ranks)
    return {
        "token": tokenizer.decode([token]),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.ranks[token]) if is_text else [],
    }


def _name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; where it is no text, its bytes as OpenAI writes them: names must differ."""
    try:
        return tokenizer.decode_bytes([token]).decode("utf-8")
    except UnicodeDecodeError:
        escaped = "".join(f"\\x{byte:02x}" for byte in tokenizer.decode_bytes([token]))
        return f"bytes:{escaped}"


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)

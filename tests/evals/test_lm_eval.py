"""The three request types of lm-evaluation-harness; and the harness itself where installed."""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import pytest
from random_params import random_params

from nanochat_jax.checkpoint import LoadedModel
from nanochat_jax.engine.sampling import SamplingParams
from nanochat_jax.evals.lm_eval import Harness, generation_options
from nanochat_jax.gpt import GPT, GPTConfig
from nanochat_jax.tokenizer import Tokenizer
from tests.engine.reference import generate

LENGTH = 48
TEXTS = ["the bread is in the house", "a house of stone and the bread of the day", "one two one"]


@dataclass
class Instance:
    """What the harness calls a request, as far as a model sees it."""

    args: tuple


def ask(*pairs: tuple) -> list[Instance]:
    return [Instance(pair) for pair in pairs]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    tokenizer = Tokenizer.train(TEXTS * 5, vocab_size=290)
    config = GPTConfig(
        sequence_len=LENGTH, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=1,
        n_embd=32,
    )  # fmt: skip
    return LoadedModel(GPT(config), random_params(config), tokenizer, {})


@pytest.fixture(scope="module")
def harness(loaded) -> Harness:
    return Harness(loaded, n_devices=1, slots=2)


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    return jax.nn.log_softmax(model.apply({"params": params}, tokens))


def logprobs_of(loaded, tokens: list[int]) -> np.ndarray:
    """(T, V); padded to one length, which is compiled once."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(forward(loaded.model, loaded.params, padded))[0, : len(tokens)]


def log_p(loaded, tokens: list[int], start: int) -> tuple[float, bool]:
    logprobs = logprobs_of(loaded, tokens)[start - 1 : -1]
    targets = tokens[start:]
    total = logprobs[np.arange(len(targets)), targets].sum()
    return float(total), bool((logprobs.argmax(-1) == targets).all())


def test_continuations_are_as_likely_as_the_model_finds_them(loaded, harness):
    pairs = [("the bread", " is"), ("the bread", " of the day"), ("", "one"), ("one ", "two")]
    encode, bos = loaded.tokenizer.encode, loaded.tokenizer.bos_id
    for (context, continuation), found in zip(
        pairs, harness.loglikelihood(ask(*pairs)), strict=True
    ):
        whole = [bos, *encode(context + continuation)]
        wanted = log_p(loaded, whole, 1 + len(encode(context.rstrip())))
        assert found[0] == pytest.approx(wanted[0], abs=1e-4)
        assert found[1] == wanted[1]


def test_the_argmax_continuation_is_greedy(loaded, harness):
    """For the prompts after which the model's argmax is ordinary text."""
    encode, bos = loaded.tokenizer.encode, loaded.tokenizer.bos_id
    prompts = [text[:end] for text in TEXTS for end in range(3, len(text)) if text[end - 1] != " "]
    pairs = []
    for prompt in prompts:
        best = int(logprobs_of(loaded, [bos, *encode(prompt)])[-1].argmax())
        text = loaded.tokenizer.decode([best])
        if encode(prompt + text) == [*encode(prompt), best]:
            pairs.append((prompt, text))
    assert pairs
    assert all(is_greedy for _, is_greedy in harness.loglikelihood(ask(*pairs)))


def test_a_long_context_is_cut_at_its_beginning(loaded, harness):
    long = "the bread " * 60
    with_beginning, without = harness.loglikelihood(
        ask((long + "is in", " the day"), ("of stone " + long + "is in", " the day"))
    )
    assert with_beginning == pytest.approx(without, abs=1e-4)


def test_a_text_is_scored_whole_in_windows(loaded, harness):
    tokens = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(" ".join(TEXTS * 8))]
    assert len(tokens) > 2 * LENGTH
    total = 0.0
    for first in range(1, len(tokens), LENGTH):
        end = min(first + LENGTH, len(tokens))
        window = tokens[max(0, end - LENGTH - 1) : end]
        total += log_p(loaded, window, len(window) - (end - first))[0]
    found = harness.loglikelihood_rolling(ask((" ".join(TEXTS * 8),), ("",)))
    assert found == pytest.approx([total, 0.0], rel=1e-5)


def test_generation_is_greedy_and_ends_at_a_stop_string(loaded, harness):
    tokenizer = loaded.tokenizer
    prompts = ["the bread", "a house of", "one two"]
    end = tokenizer.special_id("<|assistant_end|>")
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    tokens = generate(loaded.model, loaded.params, ids, 20, stop_ids=(tokenizer.bos_id, end))
    wanted = [tokenizer.decode(row) for row in tokens]
    settings = {"until": [], "max_gen_toks": 20, "do_sample": False, "temperature": 0.9}
    found = harness.generate_until(ask(*((prompt, settings) for prompt in prompts)))
    assert found == wanted
    stop = wanted[0][3:5]
    stopped = harness.generate_until(ask((prompts[0], settings | {"until": stop})))[0]
    assert stopped == wanted[0][: wanted[0].index(stop)]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, SamplingParams(temperature=0.0)),
        ({"temperature": 0.7}, SamplingParams(temperature=0.7)),
        ({"do_sample": True}, SamplingParams(temperature=1.0)),
        ({"do_sample": "False", "temperature": 0.7}, SamplingParams(temperature=0.0)),
        ({"do_sample": True, "temperature": 0}, SamplingParams(temperature=0.0)),
        ({"temperature": "0.5", "top_p": 0}, SamplingParams(temperature=0.5, top_p=0.0)),
        ({"temperature": 1, "top_p": 1}, SamplingParams(temperature=1.0, top_p=1.0)),
        ({"temperature": 1, "top_p": None}, SamplingParams(temperature=1.0)),
        ({"temperature": 1, "top_k": 0}, SamplingParams(temperature=1.0)),
        ({"temperature": 1, "top_k": -1}, SamplingParams(temperature=1.0)),
        ({"temperature": 1, "top_k": 3}, SamplingParams(temperature=1.0, top_k=3)),
        ({"temperature": 1, "min_p": 0.1}, SamplingParams(temperature=1.0, min_p=0.1)),
        ({"repetition_penalty": 1.2}, SamplingParams(temperature=0.0, repetition_penalty=1.2)),
    ],
)
def test_every_option_of_sampling_is_honoured(settings, wanted):
    assert generation_options(settings, 10).sampling == wanted


@pytest.mark.parametrize(
    ("settings", "new_tokens", "until"),
    [
        ({}, 256, ()),
        ({"max_gen_toks": 0, "until": ""}, 0, ()),
        ({"max_new_tokens": "9", "until": None}, 9, ()),
        ({"max_tokens": 8.0, "until": []}, 8, ()),
        ({"max_completion_tokens": 7, "until": "x"}, 7, ("x",)),
        ({"max_gen_toks": None, "max_tokens": 6, "until": ["x", "", "y"]}, 6, ("x", "y")),
        ({"max_tokens": 6, "max_gen_toks": 5, "max_length": 11}, 5, ()),
        ({"max_length": 12, "stop": ["z"], "until": "x"}, 2, ("x", "z")),
        ({"max_length": 3}, 0, ()),
    ],
)
def test_lengths_and_stop_strings_have_all_their_names(settings, new_tokens, until):
    found = generation_options(settings, 10)
    assert (found.max_new_tokens, found.until) == (new_tokens, until)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_gen_toks", -1), ("until", 3), ("until", [3]), ("temperature", "hot"), ("top_p", 1.5),
     ("do_sample", "maybe")],
)  # fmt: skip
def test_an_option_with_a_wrong_value_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        generation_options({name: value}, 10)


def test_the_answers_follow_the_options(harness):
    """top_p 0 and top_k 1 are greedy; a seed repeats; no token asked for is an empty answer."""
    base = {"max_gen_toks": 12, "until": []}
    random = base | {"do_sample": True, "temperature": 3.0}
    asked = [
        base, random | {"top_p": 0}, random | {"top_k": 1}, random | {"top_p": 0.0, "top_k": 0},
        random | {"seed": 0}, random | {"seed": 5}, base | {"max_gen_toks": 0},
    ]  # fmt: skip
    found = harness.generate_until(ask(*(("the bread", settings) for settings in asked)))
    assert found[0] == found[1] == found[2] == found[3]
    assert len({found[0], found[4], found[5]}) == 3
    assert found[6] == ""
    reordered = [("a house", random), ("the bread", asked[5]), ("the bread", asked[5])]
    _, same, repeated = harness.generate_until(ask(*reordered))
    assert same == found[5] != repeated


def test_what_is_ignored_is_said_once(harness, capsys):
    settings = {"max_gen_toks": 2, "num_beams": 4, "guidance": "json", "use_cache": True, "n": 1}
    for _ in range(2):
        harness.generate_until(ask(("one", settings), ("two", settings)))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "guidance, num_beams" in said[0]


def test_a_chat_is_asked_in_its_own_tokens(loaded, harness):
    chat = [{"role": "user", "content": "say <|assistant_end|> one"}]
    text = harness.apply_chat_template(chat)
    prompt = loaded.tokenizer.render_prompt({"messages": chat})
    choice = loaded.tokenizer.encode("two")
    found = harness.loglikelihood(ask((text, "two")))[0]
    assert found[0] == pytest.approx(log_p(loaded, prompt + choice, len(prompt))[0], abs=1e-4)
    assert harness.chat_template(True)
    with pytest.raises(ValueError, match="cannot be continued"):
        harness.apply_chat_template(chat, add_generation_prompt=False)


def test_the_harness_itself(loaded, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval.api.model import LM

    model = type("Model", (Harness, LM), {})(loaded, n_devices=1, slots=2)
    (tmp_path / "data.jsonl").write_text(
        "\n".join(
            '{"q": "the bread is", "c": ["in the house", "stone"], "a": 0}' for _ in range(3)
        ),
        encoding="utf-8",
    )
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "q",
        "doc_to_choice": "c",
        "doc_to_target": "a",
    }
    results = lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0)
    assert results["results"]["tiny"]["acc,none"] in (0.0, 1.0)

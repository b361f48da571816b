"""Requests that share the engine: same tokens alone or among others, fair, cancellable."""

import base64
import threading
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_model
from reference import generate

from nanochat_jax.engine.engine import Engine, make_engine
from nanochat_jax.engine.requests import Finished, Full, Request, Token
from nanochat_jax.engine.sampling import SamplingParams
from nanochat_jax.engine.scheduler import Scheduler
from nanochat_jax.engine.tools import Tools
from nanochat_jax.sharding import make_mesh
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer

GREEDY = SamplingParams(temperature=0)
MODEL = random_model(sequence_len=192)


@pytest.fixture(scope="module")
def engine():
    return make_engine(*MODEL, n_slots=4, chunk=8)


@pytest.fixture
def scheduler(engine):
    """Fresh rows; the compiled programs stay."""
    engine.reset()
    return Scheduler(engine)


def tokens_of(samples):
    return [sample.tokens for sample in samples]


class Listener(list):
    """Keeps all events; `done` is set when a sample has finished."""

    def __call__(self, events):
        self.extend(events)

    def finished(self):
        return [event for event in self if isinstance(event, Finished)]

    def tokens(self, sample=0):
        return [e.id for e in self if isinstance(e, Token) and e.sample == sample]


# --- the same tokens ------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_the_simple_generator(scheduler):
    model, params = MODEL
    prompts = [[5], list(range(1, 71)), [1, 2, 3], list(range(50, 90)), [7] * 17, [99, 98]]
    wanted = generate(model, params, prompts, 30)
    got = scheduler.generate([Request(prompt, 30, GREEDY) for prompt in prompts])
    assert [samples[0].tokens for samples in got] == wanted


prompts = st.lists(st.integers(0, 99), min_size=1, max_size=90)
requests = st.builds(
    Request,
    prompt=prompts,
    max_new_tokens=st.integers(0, 20),
    sampling=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1.0]),
        top_k=st.sampled_from([0, 5]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 9),
    ),
    n=st.integers(1, 5),
    stop_ids=st.sampled_from([(), (3, 4)]),
)


@settings(max_examples=8, deadline=None)
@given(several=st.lists(requests, min_size=2, max_size=6))
def test_a_request_gives_the_same_tokens_alone_and_among_others(engine, several):
    engine.reset()
    together = Scheduler(engine).generate(several)
    for request, samples in zip(several, together, strict=True):
        engine.reset()
        alone = Scheduler(engine).generate([request])[0]
        assert tokens_of(samples) == tokens_of(alone)
        assert [s.reason for s in samples] == [s.reason for s in alone]
        for sample in samples:
            assert not set(sample.tokens) & set(request.stop_ids)
            assert (sample.reason == "length") == (len(sample.tokens) == request.max_new_tokens)


def test_the_rows_of_eight_devices_give_the_same_tokens(scheduler):
    many = [
        Request(list(range(i + 1, i + 20)), 12, SamplingParams(seed=i), n=3, stop_ids=(7,))
        for i in range(4)
    ]
    model, params = MODEL
    on_one = jax.device_put(params, jax.devices()[0])  # where load_model leaves them
    spread = Scheduler(make_engine(model, on_one, n_slots=8, chunk=8, mesh=make_mesh(8)))
    for ours, one in zip(spread.generate(many), scheduler.generate(many), strict=True):
        assert tokens_of(ours) == tokens_of(one)


def test_logprobs_and_top_logprobs_are_the_models(scheduler):
    model, params = MODEL
    listener = Listener()
    scheduler.submit(Request([1, 2, 3], 10, SamplingParams(seed=3), top_logprobs=4), listener)
    while scheduler.step():
        pass
    tokens = [event for event in listener if isinstance(event, Token)]
    row = [1, 2, 3, *(event.id for event in tokens)]
    logits = jax.jit(model.apply)({"params": params}, np.array([row]))[0]
    expected = np.asarray(jax.nn.log_softmax(logits))[2:-1]
    for event, logprobs in zip(tokens, expected, strict=True):
        assert event.logprob == pytest.approx(logprobs[event.id], abs=1e-4)
        ids, values = zip(*event.top_logprobs, strict=True)
        assert list(ids) == np.argsort(-logprobs)[:4].tolist()
        np.testing.assert_allclose(values, logprobs[list(ids)], atol=1e-4)


def test_the_repetition_penalty_knows_prompt_and_answer(scheduler):
    model, params = MODEL
    prompt, greedy = list(range(0, 60)), SamplingParams(temperature=0, repetition_penalty=1.5)
    tokens = scheduler.generate([Request(prompt, 30, greedy)])[0][0].tokens
    logits = np.array(jax.jit(model.apply)({"params": params}, np.array([prompt + tokens]))[0])
    for i, token in enumerate(tokens):
        expected, seen = logits[59 + i], prompt + tokens[:i]
        expected[seen] *= np.where(expected[seen] > 0, 1 / 1.5, 1.5)
        assert token == int(np.argmax(expected))


# --- one prefill, kept rows, compiled programs ----------------------------------------------------


def test_samples_share_one_prefill(scheduler, monkeypatch):
    calls = []
    monkeypatch.setattr(
        scheduler.engine, "prefill", lambda chunks, run=scheduler.engine.prefill: (
            calls.append(sum(len(chunk.tokens) for chunk in chunks)), run(chunks)
        )
    )  # fmt: skip
    samples = scheduler.generate([Request(list(range(60)), 8, SamplingParams(seed=1), n=4)])[0]
    assert sum(calls) == 60
    assert len({tuple(sample.tokens) for sample in samples}) == 4


def test_more_samples_than_rows(scheduler):
    many = scheduler.generate([Request([1, 2], 6, SamplingParams(seed=1), n=11)])[0]
    few = scheduler.generate([Request([1, 2], 6, SamplingParams(seed=1), n=2)])[0]
    assert tokens_of(many)[:2] == tokens_of(few)
    assert all(len(sample.tokens) == 6 for sample in many)


def test_a_conversation_continues_from_the_row_it_left(scheduler):
    first = list(range(40))
    answer = scheduler.generate([Request(first, 10, GREEDY)])[0][0].tokens
    listener = Listener()
    second = [*first, *answer, 5, 6, 7]
    scheduler.submit(Request(second, 10, GREEDY), listener)
    while scheduler.step():
        pass
    assert listener.finished()[0].cached_tokens == len(first) + len(answer)
    assert scheduler.stats().cached_prompt_tokens == len(first) + len(answer)
    model, params = MODEL
    assert [listener.tokens()] == generate(model, params, [second], 10)


def test_an_edited_conversation_continues_from_what_is_common(scheduler):
    scheduler.generate([Request([*range(40), 50, 51], 10, GREEDY)])
    listener = Listener()
    scheduler.submit(Request([*range(40), 60, 61], 10, GREEDY), listener)
    while scheduler.step():
        pass
    assert listener.finished()[0].cached_tokens == 40


def compiled_programs(engine: Engine) -> int:
    return sum(f._cache_size() for f in (engine._prefill, engine._decode, engine._copy))


def test_no_prompt_length_compiles_anew(engine):
    """One program for each bucket, one to decode, one to copy rows: made by warm_up."""
    engine.warm_up()
    made = compiled_programs(engine)
    assert made == len(engine.buckets) + 2
    scheduler = Scheduler(engine)
    lengths = [*range(1, 40), 63, 64, 65, 100, 128, 150]
    scheduler.generate(
        [Request([1] * n, 3, SamplingParams(seed=n, top_k=n % 7), n=1 + n % 4) for n in lengths]
    )
    assert compiled_programs(engine) == made


@given(st.integers(1, 5000))
def test_a_chunk_is_never_padded_to_more_than_twice_its_tokens(remaining):
    engine = Engine.__new__(Engine)
    engine.buckets = [16, 64, 256, 512]
    size = engine.bucket(remaining)
    assert size in engine.buckets
    assert size <= max(16, 2 * remaining)
    assert size >= min(remaining, 512) // 4


# --- sharing --------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_hold_up_the_others():
    """It is appended in parts, and the other rows keep decoding between them."""
    long_model = random_model(sequence_len=1600)
    scheduler = Scheduler(make_engine(*long_model, n_slots=2, chunk=2))
    chatting, reading = Listener(), Listener()
    scheduler.submit(Request([1, 2], 12, GREEDY), chatting)
    scheduler.step()
    scheduler.submit(Request([3] * 1500, 4, GREEDY), reading)
    scheduler.step()
    assert not reading  # not ready yet …
    assert len(chatting) == 4  # … while the other one has got its next tokens
    while scheduler.step():
        pass
    assert len(reading.tokens()) == 4


def test_requests_are_admitted_in_order(scheduler):
    order = []
    for i in range(9):
        n = 3 if i == 4 else 1
        listener = partial(lambda i, events: order.append(i), i)
        scheduler.submit(Request([i + 1] * (90 if i == 0 else 2), 8, GREEDY, n=n), listener)
    while scheduler.step():
        pass
    firsts = [order.index(i) for i in range(9)]
    assert all(a < b for a, b in pairwise(firsts))


def test_cancelling_frees_the_row_within_one_chunk(scheduler):
    running, waiting = Listener(), Listener()
    states = [scheduler.submit(Request([1], 100, GREEDY), running) for _ in range(4)]
    queued = scheduler.submit(Request([2], 50, GREEDY), waiting)
    scheduler.step()
    assert (scheduler.stats().busy_slots, scheduler.stats().queued) == (4, 1)
    scheduler.cancel(states[0])
    scheduler.step()
    assert [event.reason for event in running.finished()] == ["cancelled"]
    assert scheduler.stats().queued == 0  # the waiting one has taken the row
    for state in [*states, queued]:
        scheduler.cancel(state)
    scheduler.step()
    assert scheduler.stats().busy_slots == 0
    assert not scheduler.step()
    assert [event.reason for event in waiting.finished()] == ["cancelled"]


def test_cancelling_while_waiting_and_while_reading_the_prompt(scheduler):
    long, queued = Listener(), Listener()
    blockers = [scheduler.submit(Request([i], 50, GREEDY), Listener()) for i in range(3)]
    state = scheduler.submit(Request([5] * 100, 20, GREEDY, n=1), long)
    other = scheduler.submit(Request([6], 20, GREEDY, n=4), queued)
    for t in (other, state):
        scheduler.cancel(t)
    scheduler.step()
    assert [e.reason for e in queued.finished()] == ["cancelled"] * 4
    assert [e.reason for e in long.finished()] == ["cancelled"]
    for t in blockers:
        scheduler.cancel(t)
    scheduler.step()
    assert scheduler.stats().busy_slots == scheduler.stats().queued == 0


def test_a_full_queue_says_so(engine):
    scheduler = Scheduler(engine, max_queue=2)
    for _ in range(2):
        scheduler.submit(Request([1], 5), Listener())
    with pytest.raises(Full):
        scheduler.submit(Request([1], 5), Listener())
    while scheduler.step():
        pass
    scheduler.submit(Request([1], 5), Listener())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 5), "at least one token"),
        (Request([100], 5), "vocabulary of 100"),
        (Request([-1], 5), "vocabulary of 100"),
        (Request([1], -5), "max_new_tokens"),
        (Request([1] * 100, 93), "context of 192"),
        (Request([1], 5, n=0), "n must be"),
        (Request([1], 5, stop_ids=tuple(range(9))), "stop_ids"),
        (Request([1], 5, top_logprobs=21), "top_logprobs"),
    ],
)
def test_requests_that_could_never_run_are_refused(scheduler, request_, message):
    with pytest.raises(ValueError, match=message):
        scheduler.submit(request_, Listener())


def test_a_failing_listener_cancels_only_its_request(engine, caplog):
    engine.reset()
    scheduler, stop, done = Scheduler(engine), threading.Event(), threading.Event()
    thread = threading.Thread(target=scheduler.run, args=(stop,))
    thread.start()
    try:

        def broken(events):
            raise RuntimeError("gone")

        def listener(events):
            if any(isinstance(event, Finished) for event in events):
                done.set()

        scheduler.submit(Request([1], 50, GREEDY), broken)
        scheduler.submit(Request([2], 20, GREEDY), listener)
        assert done.wait(60)
    finally:
        stop.set()
        thread.join(60)
    assert "cancelled" in caplog.text
    assert not thread.is_alive()


def test_a_failure_of_the_engine_ends_its_requests_and_the_next_ones_run(engine, monkeypatch):
    engine.reset()
    scheduler, stop = Scheduler(engine), threading.Event()
    ended, after, done = Listener(), Listener(), threading.Event()
    real = engine.decode

    def fails_once(*args, **how):
        monkeypatch.setattr(engine, "decode", real)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "decode", fails_once)
    scheduler.submit(Request([1, 2], 5, GREEDY, n=2), ended)
    thread = threading.Thread(target=scheduler.run, args=(stop,))
    thread.start()
    try:

        def listener(events):
            after(events)
            if after.finished():
                done.set()

        while len(ended.finished()) < 2:
            thread.join(0.01)
        scheduler.submit(Request([1, 2], 5, GREEDY), listener)
        assert done.wait(60)
    finally:
        stop.set()
        thread.join(60)
    assert [event.reason for event in ended.finished()] == ["error", "error"]
    assert len(after.tokens()) == 5


# --- the calculator -------------------------------------------------------------------------------


@struct.dataclass
class Script:
    """A "model" whose next token depends on nothing but the row and how far it is."""

    lengths_R: jax.Array
    last_R: jax.Array
    script_R: jax.Array


LONGEST_SCRIPT = 128


@cache
def scripted_programs(vocab_size: int, slots: int) -> Engine:
    """Compiled once for all scripts: these are its weights."""

    def extend(weights, cache, tokens_RT, counts_R):
        table, prompt_length = weights
        lengths_R = cache.lengths_R + counts_R
        step_R = jnp.clip(lengths_R - prompt_length, 0, LONGEST_SCRIPT - 1)
        tokens_R = table[cache.script_R, step_R]
        new = Script(lengths_R, cache.last_R, cache.script_R)
        return jax.nn.one_hot(tokens_R, vocab_size) * 10.0, new

    def empty(rows):
        zeros = jnp.zeros(rows, jnp.int32)
        return Script(zeros, zeros, jnp.arange(rows, dtype=jnp.int32))

    return Engine(
        extend, partial(jax.tree.map, jnp.asarray), empty, vocab_size=vocab_size, capacity=10**4,
        can_rewind=lambda length, start: False, n_slots=slots, chunk=5,
    )  # fmt: skip


def scripted_engine(scripts, prompt_length: int, vocab_size: int, slots: int) -> Engine:
    """One script a row; after its end it says 0, or the last token of the longest one."""
    longest = max(map(len, scripts))
    table = [[*script, *[0] * (longest - len(script))] for script in scripts]
    engine = scripted_programs(vocab_size, slots)
    edge = ((0, 0), (0, LONGEST_SCRIPT - longest))
    engine.load_weights((np.pad(np.array(table, np.int32), edge, mode="edge"), prompt_length))
    return engine


def golden_tokenizer(golden, name):
    trained = golden.json("tokenizer")["trainings"][name]
    return Tokenizer([base64.b64decode(rank) for rank in trained["mergeable_ranks_b64"]])


@pytest.mark.golden
def test_the_tool_state_machine_of_the_original(golden):
    about = golden.json("engine2026")["tool_use"]
    tokenizer = golden_tokenizer(golden, about["tokenizer"])
    assert {name: tokenizer.special_id(name) for name in SPECIAL_TOKENS} == about["special"]
    stops = (about["special"]["<|assistant_end|>"], about["special"]["<|bos|>"])
    for case in about["cases"]:
        prompt, scripts = case["prompt"], case["scripts"]
        engine = scripted_engine(scripts, len(prompt), tokenizer.vocab_size, len(scripts))
        scheduler = Scheduler(engine, tokenizer)
        request = Request(prompt, case["max_tokens"], GREEDY, stop_ids=stops, use_tools=True)
        # One request a script; the rows are taken in order.
        for samples, tokens, masks in zip(
            scheduler.generate([request] * len(scripts)),
            case["generate_batch_results"],
            case["generate_batch_masks"],
            strict=True,
        ):
            assert samples[0].tokens == tokens[len(prompt) :], case["name"]
            sampled = [int(not forced) for forced in samples[0].forced]
            assert sampled == masks[len(prompt) :], case["name"]


@pytest.mark.parametrize("budget", range(4, 12))
def test_an_answer_ends_where_the_budget_ends(budget):
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])
    tools = Tools(tokenizer)
    script = [tools.python_start, *b"6*7", tools.python_end, 0, 0, 0, 0, *b"ok", 4]
    engine = scripted_engine([script], 1, tokenizer.vocab_size, 1)
    request = Request([tokenizer.bos_id], budget, GREEDY, stop_ids=(4,), use_tools=True)
    sample = Scheduler(engine, tokenizer).generate([request])[0][0]
    whole = [*script[:5], tools.output_start, *b"42", tools.output_end, *b"ok"]
    assert sample.tokens == whole[:budget]
    assert sample.forced == ([False] * 5 + [True] * 4 + [False] * 2)[:budget]
    assert sample.reason == ("length" if budget <= len(whole) else "stop")


def test_a_row_that_waits_for_the_calculator_delays_no_other():
    """Two rows, of which one calls the calculator again and again."""
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])
    tools = Tools(tokenizer)
    call = [tools.python_start, *b"1", tools.python_end, 0, 0, 0]
    engine = scripted_engine([call * 10, [65] * 60], 1, tokenizer.vocab_size, 2)
    requests = [Request([tokenizer.bos_id], 60, GREEDY, use_tools=True)] * 2
    calling, writing = Scheduler(engine, tokenizer).generate(requests)
    assert tokenizer.decode(writing[0].tokens) == "A" * 60
    one_call = "<|python_start|>1<|python_end|><|output_start|>1<|output_end|>"
    assert tokenizer.decode(calling[0].tokens) == one_call * 10

"""The official client, unmodified: what it sends is understood, and what it gets it can read."""

import asyncio
import math

import openai
import pytest
import scripted

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(chat_server):
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def chat(client):
    def create(messages=HELLO, **how):
        return client.chat.completions.create(model="scripted", messages=messages, **how)

    return create


@pytest.fixture(scope="module")
def complete(client):
    def create(prompt, **how):
        return client.completions.create(model="scripted", prompt=prompt, **how)

    return create


def test_a_chat(chat):
    reply = chat(temperature=0)
    assert reply.object == "chat.completion"
    assert reply.model == "scripted"
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == scripted.ANSWER_TEXT
    assert choice.message.parts == scripted.ANSWER_PARTS
    assert choice.finish_reason == "stop"
    assert reply.usage.prompt_tokens == len("hello") + 4  # <|bos|> and three markers
    # The answer, the markers of the call and of its output, but not the end.
    assert reply.usage.completion_tokens == len("Hi 😀1+23.".encode()) + 4
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.dropped_messages == 0


def test_a_streamed_chat_says_the_same_in_chunks(chat):
    chunks = list(chat(temperature=0, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    first, *middle, end, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.dropped_messages == 0
    deltas = [chunk.choices[0].delta for chunk in middle]
    assert "".join(delta.content for delta in deltas) == scripted.ANSWER_TEXT
    called = [delta.part for delta in deltas if hasattr(delta, "part")]
    assert called[0]["type"] == "python"
    assert "".join(part["text"] for part in called) == "1+23"
    assert end.choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in (first, *middle, end))
    assert usage.choices == []
    assert usage.usage == chat(temperature=0).usage.model_copy(
        update={"prompt_tokens_details": usage.usage.prompt_tokens_details}
    )


def test_no_chunk_holds_half_a_character(chat):
    chunks = chat(temperature=0, stream=True)
    texts = [c.choices[0].delta.content or "" for c in chunks]
    assert "😀" in "".join(texts)
    assert not any("\ufffd" in text for text in texts)


def test_the_next_turn_is_answered_from_the_cache(chat):
    question = "a question asked for the first time"
    first = chat([{"role": "user", "content": question}], temperature=0)
    history = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": first.choices[0].message.parts},
        {"role": "user", "content": "and then?"},
    ]
    usage = chat(history, temperature=0).usage
    assert usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_what_openai_calls_by_other_names(chat):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hel"}]},
    ]
    reply = chat(
        messages,
        max_completion_tokens=2,
        temperature=0,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        parallel_tool_calls=True,
        response_format={"type": "text"},
        tools=[],
        presence_penalty=0,
    )
    assert reply.choices[0].message.content == "Hi"
    assert reply.choices[0].finish_reason == "length"


def test_the_same_seed_gives_the_same_text(complete):
    def random(seed=None):
        return complete("?", temperature=1, max_tokens=40, seed=seed).choices[0].text

    assert random(3) == random(3)
    assert len({random(seed) for seed in (1, 2, 3)}) == 3
    assert random() != random()


def test_several_answers(complete):
    reply = complete("?", n=3, temperature=1, max_tokens=20, seed=5)
    texts = [choice.text for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert reply.usage.prompt_tokens == 2
    assert reply.usage.completion_tokens == 60
    assert complete("?", n=1, temperature=1, max_tokens=20, seed=5).choices[0].text == texts[0]

    streamed = ["", "", ""]
    chunks = complete("?", n=3, temperature=1, max_tokens=20, seed=5, stream=True)
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        streamed[choice.index] += choice.text
    assert streamed == texts


def test_several_chats_each_begin_with_their_role(chat):
    roles, ends = [], []
    for choice in (choice for chunk in chat(n=2, stream=True) for choice in chunk.choices):
        roles += [choice.index] * (choice.delta.role is not None)
        ends += [choice.index] * (choice.finish_reason is not None)
    assert roles == [0, 1]
    assert sorted(ends) == [0, 1]


def test_several_prompts(complete):
    reply = complete(["x", "y", "z"], max_tokens=3, temperature=0)
    assert [choice.text for choice in reply.choices] == ["yzx", "zxy", "xyz"]
    assert reply.usage.prompt_tokens == 6
    ids = [[ord("x")], [ord("y")]]
    assert [c.text for c in complete(ids, max_tokens=2, temperature=0).choices] == ["yz", "zx"]


@pytest.mark.parametrize(
    ("stop", "text"),
    [("z", "y"), ("xy", "yz"), (["q", "zx"], "y"), (["xyzxyz", "zxyzxq"], "yz"), ("y", "")],
)
def test_text_ends_before_a_stop_string(complete, stop, text):
    reply = complete("x", stop=stop, temperature=0, max_tokens=100)
    assert reply.choices[0].text == text
    assert reply.choices[0].finish_reason == "stop"
    chunks = complete("x", stop=stop, temperature=0, max_tokens=100, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == text


def test_one_sample_stops_and_the_others_go_on(complete):
    # Enough samples that some meet an "a" and some do not.
    reply = complete("?", n=8, temperature=1, max_tokens=16, seed=1, stop="a")
    reasons = [choice.finish_reason for choice in reply.choices]
    assert set(reasons) == {"stop", "length"}
    for choice in reply.choices:
        assert "a" not in choice.text
        assert (len(choice.text) == 16) == (choice.finish_reason == "length")

    texts, ends = [""] * 8, [[] for _ in range(8)]
    chunks = complete("?", n=8, temperature=1, max_tokens=16, seed=1, stop="a", stream=True)
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
        ends[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.text for choice in reply.choices]
    assert ends == [[reason] for reason in reasons]


def test_what_could_have_been_a_stop_string_is_said_at_the_end(complete):
    reply = complete("x", stop="xyzxq", temperature=0, max_tokens=6)
    assert reply.choices[0].text == "yzxyzx"
    assert reply.choices[0].finish_reason == "length"


def test_logprobs_of_a_chat(chat):
    reply = chat(temperature=0, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in content)
    assert text == scripted.ANSWER.encode()  # without what the calculator said
    # The emoji's four tokens are at one place; its markers and the calculator's 3 count too.
    offsets = [(entry.token, entry.text_offset) for entry in content if entry.bytes]
    assert offsets[:3] == [("H", 0), ("i", 1), (" ", 2)]
    assert [offset for _, offset in offsets[3:]] == [3, 3, 3, 3, 4, 5, 6, 8]
    assert [entry.token for entry in content].count("<|python_start|>") == 1
    for entry in content:
        assert -0.1 < entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob

    streamed = [
        entry
        for chunk in chat(temperature=0, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == content
    without = chat(temperature=0, logprobs=True).choices[0].logprobs.content
    assert without[0].top_logprobs == []


def test_logprobs_of_a_completion(complete):
    reply = complete("?", logprobs=2, temperature=1, max_tokens=5, seed=0)
    logprobs = reply.choices[0].logprobs
    assert "".join(logprobs.tokens) == reply.choices[0].text
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert math.isclose(
        logprobs.token_logprobs[0], math.log(1 / len(scripted.LETTERS)), abs_tol=0.01
    )
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 5


def test_logprobs_end_with_the_text(complete):
    logprobs = complete("x", logprobs=0, stop="xy", temperature=0).choices[0].logprobs
    assert logprobs.tokens == ["y", "z"]
    assert logprobs.top_logprobs is None


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "scripted"
    assert (model.stage, model.step, model.context) == ("chat", 7, scripted.CONTEXT)
    assert model.val_bpb == 1.25
    assert model.limits == {
        **{"max_messages": 500, "max_message_chars": 8000, "max_chars": 32_000, "max_prompts": 16},
        **{"max_n": 8, "max_new_tokens": 4096, "max_temperature": 2, "max_top_k": 200},
    }
    assert client.models.retrieve("scripted") == model


def test_errors_are_the_classes_that_people_catch(client, chat):
    with pytest.raises(openai.NotFoundError) as other:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert other.value.code == "model_not_found"
    assert "scripted" in other.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.BadRequestError) as hot:
        chat(temperature=3)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as tools:
        chat(tools=[{"type": "function", "function": {"name": "f"}}])
    assert tools.value.param == "tools"


def test_the_asynchronous_client(chat_server):
    async def ask() -> str:
        base_url = f"{chat_server.url}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="any") as client:
            stream = await client.chat.completions.create(
                model="scripted", messages=HELLO, temperature=0, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    assert asyncio.run(ask()) == scripted.ANSWER_TEXT

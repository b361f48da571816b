"""The tokenizer: the original's ids, masks and prompts; files; hostile text."""

import base64
import copy
import json
import pickle
import random
import re

import numpy as np
import pytest
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, tokenizer_folder

BOS, USER, USER_END, ASSISTANT, ASSISTANT_END = SPECIAL_TOKENS[:5]


def of_golden(training) -> Tokenizer:
    ranks = [base64.b64decode(token) for token in training["mergeable_ranks_b64"]]
    return Tokenizer(ranks, training["pattern"])


@pytest.fixture(scope="module")
def trainings(golden):
    return golden.json("tokenizer")["trainings"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = (f"The answer to question {i} is {i * i}, isn't it? Café ¿qué?" for i in range(500))
    return Tokenizer.train(texts, vocab_size=350)


# --- encoding, against the original ---------------------------------------------------------------


@pytest.mark.golden
def test_the_recipe_is_that_of_the_original(golden):
    reference = golden.json("tokenizer")
    assert reference["split_pattern"] == SPLIT_PATTERN
    assert tuple(reference["special_tokens_order"]) == SPECIAL_TOKENS


@pytest.mark.golden
def test_training_gives_the_golden_vocabulary(golden, trainings):
    docs = golden.json(golden.json("tokenizer")["docs_file"].removesuffix(".json"))
    for training in trainings.values():
        trained = Tokenizer.train(
            iter(docs),
            vocab_size=training["requested_vocab"],
            pattern=training["pattern"],
            doc_cap=None,
        )
        assert trained.ranks == of_golden(training).ranks
        assert trained.vocab_size == training["vocab_size_total"]
        assert trained.bos_id == training["bos_token_id"]
        for name, expected in training["special_tokens"].items():
            assert trained.special_id(name) == expected
        assert trained.token_bytes().tolist() == training["token_bytes"]


@pytest.mark.golden
def test_golden_encodings(golden, trainings):
    strings = golden.json("tokenizer")["strings"]
    for name, training in trainings.items():
        tok = of_golden(training)
        for text, expected in zip(strings, training["encodings"], strict=True):
            assert tok.encode(text) == expected, (name, text)
            assert tok.decode(expected) == text
        assert tok.encode_batch(strings) == training["encodings"]


@pytest.mark.golden
def test_golden_batches_and_decodes(golden, trainings):
    strings = golden.json("tokenizer")["strings"]
    for training in trainings.values():
        tok = of_golden(training)
        batch = training["batch_prepend_append"]
        rows = tok.encode_batch(strings[slice(*batch["strings_slice"])], prepend_bos=True)
        assert rows == [ids[:-1] for ids in batch["ids"]]  # the original's append has no use here
        for case in training["decodes"]:
            assert tok.decode(case["ids"]) == case["text"]


def test_gpt4s_own_vocabulary_gives_gpt4s_ids(real_data, tmp_path):
    folder = real_data / "tokenizers"
    ranks = (folder / "cl100k_base.tiktoken").read_text()
    (tmp_path / "tokenizer.tiktoken").write_text(ranks)
    description = {
        "pattern": SPLIT_PATTERN.replace("{1,2}", "{1,3}"),
        "mergeable_tokens": ranks.count("\n"),
        "special_tokens": SPECIAL_TOKENS,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tok = Tokenizer.load(tmp_path)
    lines = (folder / "reference_token_ids.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    for case in map(json.loads, lines):
        assert tok.encode(case["text"]) == case["cl100k_base"], case["text"]


# --- encoding, what must always hold --------------------------------------------------------------


@settings(deadline=None)
@given(st.text(max_size=200))
def test_decoding_undoes_encoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert sum(tokenizer.token_bytes()[ids]) == len(text.encode())


def test_the_names_of_special_tokens_are_ordinary_text(tokenizer):
    for name in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"x{name}y")
        assert max(ids) < len(tokenizer.ranks)
        assert tokenizer.decode([tokenizer.special_id(name)]) == name


def test_token_bytes(tokenizer):
    lengths = tokenizer.token_bytes()
    assert lengths.dtype == np.int32
    assert lengths.shape == (350,)
    assert lengths[255] == 1  # the byte 0xff alone is no text
    assert lengths[:341].tolist() == [len(token) for token in tokenizer.ranks]
    assert lengths[341:].tolist() == [0] * 9


@pytest.mark.parametrize("threads", [1, 4])
def test_a_batch_is_its_texts(tokenizer, threads):
    texts = ["", "one", " " * 120_000 + "two", "three"]
    rows = tokenizer.encode_batch(texts, prepend_bos=True, threads=threads)
    assert rows == [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize(
    "text",
    [
        " " * 1_500_000 + "x",  # stops tiktoken's regex engine
        (" " * 49_999 + "x") * 20,
        "\n" + "\t" * 200_000,
        "a" * 300_000,
        "!" * 300_000,
        "가" * 100_000,
    ],
    ids=["spaces", "many-runs", "tabs", "letters", "marks", "hangul"],
)
def test_absurd_runs_are_encoded(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_is_not_unicode_does_not_stop_encoding(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_ids_outside_the_vocabulary(tokenizer):
    for wrong in (350, -1):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside the vocabulary of 350"):
            tokenizer.decode([65, wrong])
    assert tokenizer.decode(np.array([72, 105], np.int32)) == "Hi"


def test_an_unknown_special_token(tokenizer):
    with pytest.raises(ValueError, match=r"no special token '<\|pad\|>'; there are <\|bos\|>"):
        tokenizer.special_id("<|pad|>")


# --- training's own checks ------------------------------------------------------------------------


def test_a_vocabulary_without_room_for_bytes_and_specials():
    with pytest.raises(ValueError, match=r"vocab_size=264 is too small: .* already make 265"):
        Tokenizer.train(["text"], vocab_size=264)
    assert Tokenizer.train(["text"], vocab_size=265).vocab_size == 265


def test_one_string_is_not_a_corpus():
    with pytest.raises(ValueError, match="it is one string"):
        Tokenizer.train("once upon a time", vocab_size=300)


@pytest.mark.parametrize("name", ["doc_cap", "max_chars", "threads"])
def test_limits_are_positive(name):
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"{name}={limit} must be positive"):
            Tokenizer.train(["text"], vocab_size=300, **{name: limit})


def test_documents_are_capped_by_default():
    tok = Tokenizer.train(["ab" * 8000], vocab_size=300)
    assert (tok.provenance["chars"], tok.provenance["documents"]) == (10_000, 1)


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load(tokenizer, tmp_path):
    folder = tmp_path / "new" / "tokenizer"
    tokenizer.save(folder)
    loaded = Tokenizer.load(folder)
    text = "What isn't in the question?"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.ranks, loaded.pattern) == (tokenizer.ranks, tokenizer.pattern)
    assert loaded.provenance == tokenizer.provenance
    assert [loaded.special_id(name) for name in SPECIAL_TOKENS] == list(range(341, 350))


def test_the_files_are_text_that_tiktoken_reads(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    rank_file, description = tmp_path / "tokenizer.tiktoken", tmp_path / "tokenizer.json"
    assert sorted(tmp_path.iterdir()) == [description, rank_file]
    by_bytes = tiktoken.load.load_tiktoken_bpe(str(rank_file))
    assert [token for token, _ in sorted(by_bytes.items(), key=lambda x: x[1])] == tokenizer.ranks
    for path in (rank_file, description):
        with pytest.raises(Exception, match=r"."):
            pickle.loads(path.read_bytes())


def test_saving_twice_writes_the_same_bytes(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    for name in ("tokenizer.tiktoken", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tokenizer.json", None, "there is no tokenizer at .*; train one with"),
        ("tokenizer.json", lambda text: text[:20], "tokenizer.json is damaged"),
        ("tokenizer.json", lambda text: "{}", "tokenizer.json does not describe a nanochat_jax"),
        ("tokenizer.json", lambda text: "[]", "tokenizer.json does not describe a nanochat_jax"),
        ("tokenizer.tiktoken", None, "tokenizer.tiktoken is missing"),
        ("tokenizer.tiktoken", lambda text: text[:1000], "(has .* tokens|is damaged in line)"),
        ("tokenizer.tiktoken", lambda text: text.replace("\n", "\n\n", 1), "damaged in line 2"),
        ("tokenizer.tiktoken", lambda text: "AA== 0\nAQ== 5\n", "line 2 should have rank 1"),
        ("tokenizer.tiktoken", lambda text: "AA== 0\n!! 1\n", "damaged in line 2"),
        ("tokenizer.tiktoken", lambda text: "\x00\xff", "damaged in line 1"),
    ],
)
def test_a_folder_that_is_not_whole(tokenizer, tmp_path, name, damage, message):
    tokenizer.save(tmp_path)
    path = tmp_path / name
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_every_flipped_bit_of_a_saved_tokenizer_is_noticed(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    rng = random.Random(0)
    for name in ("tokenizer.json", "tokenizer.tiktoken"):
        path = tmp_path / name
        good = path.read_bytes()
        for _ in range(150):
            at = rng.randrange(len(good))
            bad = bytearray(good)
            bad[at] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=r".") as error:
                Tokenizer.load(tmp_path)
            assert str(tmp_path) in str(error.value), (name, at)
        path.write_bytes(good)
    assert Tokenizer.load(tmp_path).ranks == tokenizer.ranks


def test_a_tokenizer_from_before_there_were_checksums(tokenizer, tmp_path, caplog):
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).ranks == tokenizer.ranks
    assert not caplog.messages
    path = tmp_path / "tokenizer.json"
    described = json.loads(path.read_text())
    del described["sha256"]
    path.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged"):  # half of them is damage
        Tokenizer.load(tmp_path)
    del described["rank_file_sha256"]
    path.write_text(json.dumps(described))
    assert Tokenizer.load(tmp_path).ranks == tokenizer.ranks
    assert caplog.messages == [
        f"{tmp_path} is not verified: it is from before there were checksums"
    ]


def test_rank_lists_that_cannot_be(tokenizer):
    for ranks in ([*tokenizer.ranks, b"a"], tokenizer.ranks[1:], []):
        with pytest.raises(ValueError, match="all 256 bytes and no token twice"):
            Tokenizer(ranks)


def test_names_and_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert tokenizer_folder("mine") == tmp_path / "tokenizer" / "mine"
    assert tokenizer_folder("./mine").name == "mine"
    assert tokenizer_folder("./mine").parent != tmp_path / "tokenizer"
    assert tokenizer_folder(tmp_path / "x") == tmp_path / "x"


# --- conversations, against the original ----------------------------------------------------------


@pytest.fixture(scope="module")
def chats(golden, trainings):
    """(tokenizer, cases, invalid cases) of each golden vocabulary."""
    rendered = golden.json("chat_render")["tokenizers"]
    return [
        (of_golden(trainings[name]), part["conversations"], part["invalid"])
        for name, part in rendered.items()
    ]


@pytest.mark.golden
def test_golden_renders_and_masks(chats):
    for tok, cases, _ in chats:
        for case in cases:
            before = copy.deepcopy(case["conversation"])
            for render in case["renders"]:
                ids, mask = tok.render_conversation(case["conversation"], render["max_tokens"])
                assert (len(ids), len(mask), sum(mask)) == (
                    render["n"],
                    render["n"],
                    render["mask_sum"],
                )
                if render["ids"] is not None:
                    assert (ids, mask) == (render["ids"], render["mask"]), case["name"]
            whole, _ = tok.render_conversation(case["conversation"], 10**9)
            assert len(whole) == case["untruncated_len"]
            assert case["conversation"] == before, "the caller's conversation was changed"


@pytest.mark.golden
def test_golden_completion_prompts(chats):
    limit = 2048
    for tok, cases, _ in chats:
        for case in cases:
            conversation = case["conversation"]
            if "completion_error" in case:
                with pytest.raises(ValueError, match="last message must be the assistant's"):
                    tok.render_for_completion(conversation)
                continue
            prompt = tok.render_for_completion(conversation, limit)
            if case["completion_len"] <= limit:
                assert prompt == case["completion_ids"], case["name"]
            else:
                # Differs on purpose (recipe, section 12): the original cuts to 2048, maybe the
                # <|user_end|> too, and adds one. Ours is no longer than asked, with all markers.
                assert len(prompt) <= limit
                check_prompt(tok, prompt)
                whole = tok.render_for_completion(conversation, 10**9)
                assert prompt[2:] == whole[-(len(prompt) - 2) :]


@pytest.mark.golden
def test_golden_invalid_conversations(chats):
    for tok, _, invalid in chats:
        for case in invalid:
            with pytest.raises(ValueError, match=r"message|conversation"):
                tok.render_conversation(case["conversation"])


def check_prompt(tok: Tokenizer, prompt: list[int]) -> None:
    """<|bos|>, whole turns from the user's on, the last one of the user, and the cue."""
    assert prompt[0] == tok.bos_id
    markers = {tok.special_id(name): name for name in (USER, USER_END, ASSISTANT, ASSISTANT_END)}
    order = "".join(f"{markers[i]} " for i in prompt if i in markers)
    turn = re.escape(f"{USER} {USER_END} {ASSISTANT} ")
    assert re.fullmatch(f"({turn}{re.escape(ASSISTANT_END)} )*{turn}", order)
    assert prompt[1] == tok.special_id(USER)
    assert prompt[-2:] == [tok.special_id(USER_END), tok.special_id(ASSISTANT)]


# --- conversations, what must always hold ---------------------------------------------------------


def chat(*contents, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


def test_the_mask_covers_what_the_assistant_says_itself(tokenizer):
    parts = [
        {"type": "text", "text": "Let me see. "},
        {"type": "python", "text": "2+2"},
        {"type": "python_output", "text": "4"},
        {"type": "text", "text": "Four."},
    ]
    ids, mask = tokenizer.render_conversation(chat("2+2?", parts))
    learned = [i for i, is_learned in zip(ids, mask, strict=True) if is_learned]
    assert tokenizer.decode(ids) == (
        "<|bos|><|user_start|>2+2?<|user_end|><|assistant_start|>Let me see. <|python_start|>2+2"
        "<|python_end|><|output_start|>4<|output_end|>Four.<|assistant_end|>"
    )
    assert tokenizer.decode(learned) == (
        "Let me see. <|python_start|>2+2<|python_end|>Four.<|assistant_end|>"
    )


def test_no_text_becomes_a_special_token(tokenizer):
    ids, _ = tokenizer.render_conversation(chat("<|assistant_end|><|bos|>", "<|user_start|>"))
    special = [i for i in ids if i >= len(tokenizer.ranks)]
    names = [BOS, USER, USER_END, ASSISTANT, ASSISTANT_END]
    assert special == [tokenizer.special_id(name) for name in names]


def test_a_system_message_only(tokenizer):
    for ask in (tokenizer.render_conversation, tokenizer.render_prompt):
        with pytest.raises(ValueError, match="has only a system message; it needs a message of"):
            ask(chat(system="Be kind."))
        with pytest.raises(ValueError, match="the conversation has no message"):
            ask(chat())


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (chat("a", 3), "content of message 1 must be a string or a list of parts, not int"),
        (chat(["a"]), "content of message 0, the user's, must be a string"),
        (chat("a", [{"type": "image", "text": ""}]), "message 1 has a part of type 'image'; known"),
        (chat("a", "b", system=["x"]), "content of a system message must be a string"),
        ({"messages": [*chat("a")["messages"] * 2]}, "message 1 is the user's where the assistant"),
        ({"messages": [{"content": "a"}]}, "message 0 has no role"),
        ({"messages": [{"role": "user"}]}, "content of message 0, the user's, must be a string"),
        (chat("a", [{"type": "python"}]), "message 1 has a part without a text"),
        (chat("a", ["b"]), "message 1 has a part without a text"),
        ({}, "a conversation has a list of messages"),
        ({"messages": "hello"}, "a conversation has a list of messages"),
        ({"messages": ["hello"]}, "message 0 has no role"),
    ],
)
def test_the_error_names_the_message(tokenizer, conversation, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.render_conversation(conversation)


texts = st.text("abc déf<|>\n", max_size=40)


@settings(deadline=None)
@given(
    st.lists(texts, min_size=1, max_size=9).filter(lambda turns: len(turns) % 2),
    st.none() | texts,
    st.integers(4, 150),
)
def test_a_prompt_keeps_whole_turns_and_fits(tokenizer, turns, system, limit):
    whole = tokenizer.render_prompt(chat(*turns, system=system), 10**9)
    prompt = tokenizer.render_prompt(chat(*turns, system=system), limit)
    check_prompt(tokenizer, prompt)
    assert len(prompt) <= limit
    suffixes = [
        tokenizer.render_prompt(chat(*turns[first:], system=system), 10**9)
        for first in range(0, len(turns), 2)
    ]
    assert suffixes[0] == whole
    fitting = [suffix for suffix in suffixes if len(suffix) <= limit]
    if fitting:
        assert prompt == fitting[0], "the longest suffix of whole turns that fits"
    else:
        assert len(prompt) == limit
        assert prompt[2:] == suffixes[-1][-(limit - 2) :], "the end of the last question"


def test_a_completion_prompt_is_the_prompt_of_what_went_before(tokenizer):
    asked = chat("q", "a", "q2", system="s")
    answered = chat("q", "a", "q2", "the answer", system="s")
    assert tokenizer.render_for_completion(answered) == tokenizer.render_prompt(asked)
    rendered, _ = tokenizer.render_conversation(asked)
    assert tokenizer.render_prompt(asked) == [*rendered, tokenizer.special_id(ASSISTANT)]


def test_a_prompt_ends_with_the_user(tokenizer):
    with pytest.raises(ValueError, match="must end with a message of the user"):
        tokenizer.render_prompt(chat("q", "a"))


def test_a_prompt_without_room_for_its_markers(tokenizer):
    with pytest.raises(ValueError, match="no room for its markers; allow 4"):
        tokenizer.render_prompt(chat("question"), 3)

"""The page in a real Chromium (page_browser.py), against the real server."""

import re

from playwright.sync_api import Locator, Page, expect
from scripted import FIRST_WORDS, HOSTILE, PAGE_SHOWN, PAGE_TEXT

pytest_plugins = ("page_browser",)

WHOLE = re.compile(f"^({'|'.join(FIRST_WORDS)}){re.escape(PAGE_SHOWN)}$")


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def questions(page: Page) -> Locator:
    return page.locator(".question-text")


def answers(page: Page) -> Locator:
    """Those that are complete."""
    return page.locator(".answer:not(.writing) .answer-text")


def button(page: Page | Locator, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


# --- a conversation -------------------------------------------------------------------------------


def test_a_conversation_streams_and_continues(chat):
    ask(chat, "Hello?")
    expect(answers(chat)).to_have_text([WHOLE])
    expect(chat.locator(".answer-text pre")).to_have_text("print(36)")
    expect(chat.locator(".tool.call code")).to_have_text("12*3")
    expect(chat.locator(".tool.result code")).to_have_text("36")
    expect(chat.locator("#announcer")).to_contain_text("Bye.")
    with chat.expect_request("**/v1/chat/completions") as sent:
        ask(chat, "And you?")
    expect(answers(chat)).to_have_text([WHOLE, WHOLE])
    user, assistant, second = sent.value.post_data_json["messages"]
    assert (user["content"], second["content"]) == ("Hello?", "And you?")
    kinds = [part["type"] for part in assistant["content"]]
    assert kinds == ["text", "python", "python_output", "text"]
    texts = [part["text"] for part in assistant["content"] if part["type"] == "text"]
    assert "".join(texts)[4:] == PAGE_TEXT


def test_stop_keeps_what_came_and_frees_the_server(endless, slow_scheduler):
    page, before = endless, slow_scheduler.stats().tokens_generated
    ask(page, "go")
    expect(page.locator(".answer-text")).to_contain_text("on and on and on")
    button(page, "Stop").click()
    expect(page.locator(".remark")).to_have_text("Stopped.")
    kept = answers(page).text_content()
    assert kept.startswith(" on and on and on")
    # There is one slot: it is free long before the end that the answer would have come to.
    ask(page, "Bye")
    expect(answers(page)).to_have_count(2)
    assert slow_scheduler.stats().tokens_generated - before < 4000
    page.reload()
    expect(answers(page).first).to_have_text(kept)
    expect(page.locator(".remark").first).to_have_text("Stopped.")


def test_escape_stops_and_typed_text_stays(endless):
    expect(endless.locator("#model-stage")).to_have_text("base model")
    expect(endless.locator(".notice")).to_contain_text("has not learned to chat")
    ask(endless, "go")
    expect(endless.locator(".answer-text")).to_contain_text("on and on")
    endless.keyboard.type("meanwhile")
    endless.keyboard.press("Enter")
    endless.keyboard.press("Escape")
    expect(endless.locator(".remark")).to_have_text("Stopped.")
    expect(questions(endless)).to_have_text(["go"])
    expect(endless.get_by_label("Message", exact=True)).to_have_value("meanwhile")
    endless.reload()
    expect(endless.get_by_label("Message", exact=True)).to_have_value("meanwhile")


def test_an_answer_continues_while_another_conversation_is_read(endless):
    ask(endless, "go")
    expect(endless.locator(".answer-text")).to_contain_text("on and on")
    button(endless, "New conversation").click()
    expect(answers(endless)).to_have_count(0)
    expect(button(endless, "Send")).to_be_visible()
    endless.locator("#conversations .open").click()
    button(endless, "Stop").click()
    expect(answers(endless)).to_contain_text("on and on and")


def test_a_page_that_is_closed_keeps_what_came(endless):
    ask(endless, "go")
    expect(endless.locator(".answer-text")).to_contain_text("on and on")
    endless.reload()
    expect(answers(endless)).to_contain_text("on and on")
    expect(endless.locator(".remark")).to_have_text("Stopped.")


def test_editing_replaces_a_message_and_what_follows(chat):
    ask(chat, "First")
    expect(answers(chat)).to_have_count(1)
    ask(chat, "Second")
    expect(answers(chat)).to_have_count(2)
    first = chat.locator(".question").first
    first.hover()
    button(first, "Edit").click()
    chat.get_by_label("Your message").fill("Changed")
    chat.keyboard.press("Escape")
    expect(questions(chat)).to_have_text(["First", "Second"])
    first.hover()
    button(first, "Edit").click()
    chat.get_by_label("Your message").fill("Changed")
    with chat.expect_request("**/v1/chat/completions") as sent:
        button(first, "Send").click()
    expect(questions(chat)).to_have_text(["Changed"])
    expect(answers(chat)).to_have_text([WHOLE])
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "Changed"}]


def test_regenerating_asks_the_same_again(chat):
    ask(chat, "Why?")
    expect(answers(chat)).to_have_count(1)
    with chat.expect_request("**/v1/chat/completions") as sent:
        button(chat, "Regenerate").click()
    expect(answers(chat)).to_have_text([WHOLE])
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "Why?"}]


# --- what is kept ---------------------------------------------------------------------------------


def test_conversations_survive_a_reload_and_can_be_deleted(chat):
    ask(chat, "The first one")
    expect(answers(chat)).to_have_count(1)
    button(chat, "New conversation").click()
    expect(answers(chat)).to_have_count(0)
    ask(chat, "The second one")
    expect(answers(chat)).to_have_count(1)
    chat.reload()
    listed = chat.locator("#conversations .open")
    expect(listed).to_have_text(["The second one", "The first one"])
    expect(questions(chat)).to_have_text(["The second one"])
    listed.last.click()
    expect(questions(chat)).to_have_text(["The first one"])
    expect(answers(chat)).to_have_text([WHOLE])
    button(chat, "Delete “The first one”").click()
    expect(listed).to_have_text(["The second one"])
    button(chat, "Undo").click()
    expect(listed).to_have_count(2)
    button(chat, "Delete “The first one”").click()
    chat.reload()
    expect(listed).to_have_text(["The second one"])


def test_damaged_storage_does_not_matter(chat):
    ask(chat, "Kept")
    expect(answers(chat)).to_have_count(1)
    damages = ["{", "null", "[]", '{"id": "c3", "messages": [{"role": "user"}]}']
    chat.evaluate(
        """damages => {
            const keep = (damage, i) => localStorage.setItem("nanochat:conversation:c" + i, damage);
            damages.forEach(keep);
            localStorage.setItem("nanochat:settings", '{"temperature": "hot", "topK": null}');
            localStorage.setItem("nanochat:theme", "purple");
        }""",
        damages,
    )
    chat.reload()
    expect(questions(chat)).to_have_text(["Kept"])
    expect(chat.locator("#conversations .open")).to_have_count(1)
    ask(chat, "Again")
    expect(answers(chat)).to_have_count(2)


def test_full_storage_is_reported_and_the_page_still_works(chat):
    chat.evaluate(
        """() => {
            for (let size = 1 << 23; size >= 1; size >>= 1) {
                try {
                    const filler = localStorage.getItem("filler") ?? "";
                    localStorage.setItem("filler", filler + "x".repeat(size));
                } catch {}
            }
        }"""
    )
    ask(chat, "Hello?")
    expect(answers(chat)).to_have_text([WHOLE])
    expect(chat.locator("#toast")).to_contain_text("its storage is full")


# --- hostile text ---------------------------------------------------------------------------------


def test_html_stays_text(chat):
    ask(chat, HOSTILE)
    expect(questions(chat)).to_have_text([HOSTILE])
    expect(answers(chat)).to_have_text([WHOLE])
    expect(chat.locator("#conversations .open")).to_have_text([HOSTILE])
    expect(chat.locator("#transcript img, .conversations img")).to_have_count(0)
    chat.reload()
    expect(answers(chat)).to_have_text([WHOLE])
    button(chat, f"Delete “{HOSTILE}”").click()
    expect(chat.locator("#toast")).to_contain_text(HOSTILE)
    expect(chat.locator("#toast img")).to_have_count(0)


# --- settings and commands ------------------------------------------------------------------------


def test_slash_commands(chat):
    note = chat.locator(".note").last
    message = chat.get_by_label("Message", exact=True)
    ask(chat, "/help")
    for command in ("/temperature X", "/topk K", "/clear", "/help"):
        expect(note).to_contain_text(command)
    ask(chat, "/temperature 0.3")
    expect(note).to_have_text("Temperature is now 0.3.")
    ask(chat, "/topk 7")
    expect(note).to_have_text("Top-k is now 7.")
    ask(chat, "/topk 2.5")
    expect(note).to_have_text("Top-k must be a whole number from 0 to 200; “2.5” is not.")
    ask(chat, "/temperature hot")
    expect(note).to_contain_text("must be a number from 0 to 2")
    ask(chat, "/explode")
    expect(note).to_contain_text("There is no command /explode.")
    expect(message).to_have_value("/explode")
    with chat.expect_request("**/v1/chat/completions") as sent:
        ask(chat, "Hello?")
    asked = sent.value.post_data_json
    assert (asked["temperature"], asked["top_k"]) == (0.3, 7)
    expect(answers(chat)).to_have_count(1)
    ask(chat, "/clear")
    expect(questions(chat)).to_have_count(0)
    expect(chat.locator("#conversations .open")).to_have_text(["Hello?"])


def test_settings_are_checked_sent_and_kept(chat):
    button(chat, "Settings").click()
    chat.get_by_label("New tokens at most").fill("0")
    button(chat, "Done").click()
    expect(chat.locator("#maxTokens-problem")).to_contain_text("from 1 to 4096")
    chat.get_by_label("New tokens at most").fill("2")
    chat.get_by_label("Temperature").fill("0")
    chat.keyboard.press("Enter")
    expect(chat.get_by_role("dialog")).to_be_hidden()
    chat.reload()
    with chat.expect_request("**/v1/chat/completions") as sent:
        ask(chat, "Hello?")
    asked = sent.value.post_data_json
    assert (asked["temperature"], asked["top_k"], asked["max_tokens"]) == (0, 50, 2)
    expect(answers(chat)).to_have_text(["Good day "])
    expect(chat.locator(".remark")).to_contain_text("2 new tokens")


# --- explain --------------------------------------------------------------------------------------


def test_explain_shows_probabilities_and_alternatives(chat):
    chat.get_by_role("switch", name="Explain").click()
    ask(chat, "Hello?")
    expect(answers(chat)).to_contain_text("Bye.")
    tokens = chat.locator(".answer .token[tabindex]")
    pieces = tokens.all_text_contents()
    assert pieces[0] in FIRST_WORDS
    assert pieces[1:5] == [" day ", HOSTILE, "\n", "12*3"]
    assert pieces[5:8] == [" is it", " ", "😀:\n"]  # of three tokens, of which two cut the emoji
    tokens.first.hover()
    tooltip = chat.get_by_role("tooltip")
    expect(tooltip.locator("li")).to_have_count(5)
    for word in FIRST_WORDS:
        expect(tooltip.locator("li", has_text=word)).to_contain_text("50.0 %")
    expect(tooltip.locator(".chosen")).to_contain_text(pieces[0])
    chat.get_by_label("Message", exact=True).hover()
    expect(tooltip).to_be_hidden()
    chat.reload()
    expect(tokens).to_have_count(len(pieces))
    chat.get_by_role("switch", name="Explain").click()
    expect(tokens).to_have_count(0)
    expect(answers(chat)).to_have_text([WHOLE])


def test_tokens_are_reached_by_arrow_keys(chat):
    chat.get_by_role("switch", name="Explain").click()
    ask(chat, "Hello?")
    expect(answers(chat)).to_have_count(1)
    tokens = chat.locator(".answer .token[tabindex]")
    expect(chat.locator('.answer .token[tabindex="0"]')).to_have_count(1)
    tokens.first.focus()
    chat.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(tokens.nth(1)).to_have_attribute("aria-describedby", "tooltip")
    expect(chat.get_by_role("tooltip")).to_contain_text("100 %")
    chat.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    chat.keyboard.press("Escape")
    expect(chat.get_by_role("tooltip")).to_be_hidden()


# --- when things go wrong -------------------------------------------------------------------------


def test_a_lost_connection_is_reported_and_can_be_retried(visit, chat_url):
    page = visit(chat_url, allow="Failed to load resource")
    page.context.set_offline(True)
    ask(page, "Hello?")
    expect(page.get_by_role("alert")).to_contain_text("connection to the server was lost")
    expect(questions(page)).to_have_text(["Hello?"])
    page.context.set_offline(False)
    button(page, "Try again").click()
    expect(answers(page)).to_have_text([WHOLE])
    expect(page.get_by_role("alert")).to_have_count(0)


def test_an_answer_that_breaks_off_keeps_what_came(visit, start_server):
    server = start_server("pretrain")
    page = visit(server.url)
    page.get_by_role("switch", name="Explain").click()
    ask(page, "go")
    expect(page.locator(".answer-text")).to_contain_text("on and on")
    server.service.draining = True
    server.service.cancel_all()
    expect(page.get_by_role("alert")).to_contain_text(
        "The answer was interrupted. The server was shut down."
    )
    expect(answers(page)).to_contain_text("on and on")


def test_a_busy_server_is_reported(visit, start_server):
    page = visit(start_server("sft", rate_limit=1).url, allow="429")
    ask(page, "Hello?")
    expect(answers(page)).to_have_text([WHOLE])
    ask(page, "Hello again?")
    expect(page.get_by_role("alert")).to_contain_text(
        re.compile(r"busy.* try again in \d+ seconds")
    )
    expect(button(page, "Try again")).to_be_visible()
    expect(questions(page)).to_have_text(["Hello?", "Hello again?"])


def test_a_key_is_asked_for_and_kept_in_the_tab(visit, start_server, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("open sesame\n")
    server = start_server("sft", api_keys_file=str(keys))
    page = visit(server.url, allow="401", model="not connected")
    expect(page.get_by_role("alert")).to_contain_text("asks for an API key")
    button(page, "Enter a key").click()
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("open sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#model-name")).to_have_text("toy")
    page.reload()
    ask(page, "Hello?")
    expect(answers(page)).to_have_text([WHOLE])
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")


def test_the_page_keeps_to_the_limits_of_the_server(visit, start_server):
    """An error of the server would be one in the browser's console, which fails the test."""
    limits = {"max_new_tokens": 4, "max_temperature": 0.25, "max_top_k": 3, "max_messages": 3}
    page = visit(start_server("sft", **limits, max_message_chars=40).url)
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "😀" * 40)
    asked = sent.value.post_data_json
    assert (asked["temperature"], asked["top_k"], asked["max_tokens"]) == (0.25, 3, 4)
    expect(answers(page)).to_have_count(1)
    ask(page, "x" * 41)
    expect(page.get_by_role("alert")).to_contain_text(
        "too long: it has 41 characters, and the server takes at most 40"
    )
    ask(page, "Second?")
    expect(answers(page)).to_have_count(3)
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Third?")
    expect(answers(page)).to_have_count(4)
    assert [m["content"] for m in sent.value.post_data_json["messages"]][::2] == [
        "Second?",
        "Third?",
    ]
    expect(page.locator(".dropped")).to_contain_text("2 oldest messages")
    ask(page, "/topk 4")
    expect(page.locator(".note")).to_contain_text("from 0 to 3; “4” is not.")
    button(page, "Settings").click()
    expect(page.get_by_label("New tokens at most")).to_have_value("4")
    expect(page.locator("#temperature-help")).to_contain_text("from 0 to 0.25.")
    page.get_by_label("Temperature").fill("0.3")
    button(page, "Done").click()
    expect(page.locator("#temperature-problem")).to_contain_text("from 0 to 0.25")
    button(page, "Back to the defaults").click()
    button(page, "Done").click()
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_the_page_keeps_to_the_characters_of_a_request(visit, start_server):
    page = visit(start_server("sft", max_chars=90).url)
    ask(page, "x" * 91)
    expect(page.get_by_role("alert")).to_contain_text("at most 90 characters")
    ask(page, "Hello?")
    expect(answers(page)).to_have_text(["", WHOLE])
    ask(page, "y" * 80)
    expect(answers(page)).to_have_text(["", WHOLE, WHOLE])
    expect(page.locator(".dropped")).to_contain_text("2 oldest messages")


def test_dropped_messages_are_reported(visit, chat_url):
    """Two are more than the server takes, sixteen more than the model can read."""
    page = visit(chat_url)
    page.evaluate(
        """() => {
            const part = {type: "text", text: "y".repeat(3900)};
            const answer = {role: "assistant", parts: [part], finish: "stop"};
            const pair = [{role: "user", text: "x"}, answer];
            const messages = Array.from({length: 9}, () => pair).flat();
            const conversation = {id: "long", changed: 1, messages};
            localStorage.setItem("nanochat:conversation:long", JSON.stringify(conversation));
        }"""
    )
    page.reload()
    ask(page, "Hello?")
    expect(page.locator(".dropped")).to_contain_text("18 oldest messages")


# --- keyboard, screens, themes --------------------------------------------------------------------


def test_everything_by_keyboard(chat):
    message, keys = chat.get_by_label("Message", exact=True), chat.keyboard
    expect(message).to_be_focused()
    keys.type("H")
    keys.press("Shift+Enter")
    keys.type("ello")
    expect(message).to_have_value("H\nello")
    keys.press("Enter")
    expect(answers(chat)).to_have_text([WHOLE])
    keys.press("Shift+Tab")
    expect(button(chat, "Regenerate")).to_be_focused()
    expect(chat.locator(":focus")).to_have_css("outline-style", "solid")
    with chat.expect_request("**/v1/chat/completions"):
        keys.press("Enter")
    expect(answers(chat)).to_have_text([WHOLE])
    expect(message).to_be_focused()
    button(chat, "Settings").focus()
    keys.press("Enter")
    expect(chat.get_by_label("Temperature")).to_be_focused()
    keys.press("Escape")
    expect(button(chat, "Settings")).to_be_focused()
    # The first thing that the Tab key finds leads past the list.
    chat.reload()
    expect(message).to_be_focused()
    skip = chat.get_by_role("link", name="Skip to the message field")
    skip.focus()
    expect(skip).to_be_in_viewport()
    keys.press("Enter")
    expect(message).to_be_focused()


def test_composing_a_character_does_not_send(chat):
    message = chat.get_by_label("Message", exact=True)
    message.fill("にほ")
    message.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(message).to_have_value("にほ")
    expect(questions(chat)).to_have_count(0)


def test_a_phone(visit, chat_url):
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    page = visit(chat_url, **phone)
    page.get_by_role("switch", name="Explain").tap()
    ask(page, "An exceptionallylongword" + "x" * 200)
    expect(answers(page)).to_contain_text("Bye.")
    page.locator(".answer .token[tabindex]").first.tap()
    expect(page.get_by_role("tooltip")).to_contain_text("50.0 %")
    side = page.get_by_role("navigation")
    expect(side).not_to_be_in_viewport()
    button(page, "Open the list of conversations").tap()
    expect(side).to_be_in_viewport()
    button(page, "New conversation").tap()
    expect(side).not_to_be_in_viewport()
    expect(questions(page)).to_have_count(0)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.querySelector('#main').scrollWidth") <= 390


def test_light_and_dark(visit, chat_url):
    page = visit(chat_url, color_scheme="dark")
    body = page.locator("body")
    expect(body).to_have_css("background-color", "rgb(27, 26, 24)")
    button(page, "Use the light theme").click()
    expect(body).to_have_css("background-color", "rgb(251, 250, 247)")
    page.reload()
    expect(body).to_have_css("background-color", "rgb(251, 250, 247)")
    button(page, "Use the dark theme").click()
    page.emulate_media(color_scheme="light")
    expect(body).to_have_css("background-color", "rgb(251, 250, 247)")

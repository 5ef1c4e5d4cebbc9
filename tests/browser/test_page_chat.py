"""A conversation in the browser: send, stream, stop, regenerate, edit, keep, export, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from acting import answer_with, ask, check_idle, get_texts, make_chunk, send, wait_for, wait_for_end
from running import Running, run_fake_server, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Page


def test_a_conversation(page: Page) -> None:
    reply = ask(page, "hello")
    assert reply.locator(".markdown").inner_text() == "You said: hello"
    stats = reply.locator(".stats").inner_text()
    assert "first token after" in stats
    assert "seen here" not in stats
    assert "tokens/s" in stats
    ask(page, "more")
    assert get_texts(page) == ["hello", "You said: hello", "more", "You said: more"]
    assert page.title() == "hello – mlcbuild"


def test_stop_frees_the_engine(page: Page, server: Running) -> None:
    send(page, "slow")
    wait_for(page, "document.querySelector('.markdown')?.innerText.includes('again again')")
    assert server.model.engine.get_stats().running == 1
    page.get_by_role("button", name="Stop").click()
    wait_until(lambda: server.model.engine.get_stats().running == 0)
    wait_for_end(page)
    assert "stopped" in page.locator(".stats").inner_text()
    assert "again again" in get_texts(page)[1]  # what came is kept
    assert ask(page, "on").locator(".markdown").inner_text() == "You said: on"


def test_text_shows_while_it_comes(page: Page) -> None:
    send(page, "slow")
    read = "document.querySelector('.markdown')?.innerText.length ?? 0"
    wait_for(page, f"{read} > 20")
    before = page.evaluate(read)
    wait_for(page, f"{read} > {before} + 20")
    assert page.locator(".assistant").get_attribute("aria-busy") == "true"
    page.keyboard.press("Escape")
    wait_for_end(page)
    assert page.locator(".assistant").get_attribute("aria-busy") == "false"


def test_reading_up_is_not_disturbed(page: Page) -> None:
    """The log follows the reply only for who reads its end."""
    ask(page, "a line\n" * 50)
    send(page, "slow")
    wait_for(page, "document.querySelectorAll('.markdown')[1]?.innerText.length > 10")
    log = "document.getElementById('log')"
    at_end = f"{log}.scrollHeight - {log}.scrollTop - {log}.clientHeight < 80"
    assert page.evaluate(at_end)
    page.evaluate(f"{log}.scrollTop = 5")
    length = page.evaluate("document.querySelectorAll('.markdown')[1].innerText.length")
    wait_for(page, f"document.querySelectorAll('.markdown')[1].innerText.length > {length}")
    assert page.evaluate(f"{log}.scrollTop") == 5
    page.get_by_role("button", name="Newest").click()
    assert page.evaluate(at_end)
    page.keyboard.press("Escape")
    wait_for_end(page)


def test_regenerate(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("1")
    page.get_by_role("button", name="Done").click()
    texts = {ask(page, "random").locator(".markdown").inner_text()}
    for _ in range(3):
        page.get_by_role("button", name="Regenerate this reply").click()
        wait_for_end(page)
        assert len(get_texts(page)) == 2
        texts.add(get_texts(page)[1])
    assert len(texts) > 1


def test_the_seed_gives_the_same_reply(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("1")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Max tokens").fill("9")
    page.get_by_role("button", name="Done").click()
    reply = ask(page, "random")
    first = reply.locator(".markdown").inner_text()
    assert "cut off at the token limit" in reply.locator(".stats").inner_text()
    page.get_by_role("button", name="Regenerate this reply").click()
    wait_for_end(page)
    assert get_texts(page)[1] == first


def test_edit(page: Page) -> None:
    ask(page, "one")
    ask(page, "two")
    page.get_by_role("button", name="Edit this message").first.click()
    field = page.get_by_label("Your message")
    assert field.evaluate("e => e === document.activeElement")
    page.keyboard.press("Escape")
    assert len(get_texts(page)) == 4
    page.get_by_role("button", name="Edit this message").first.click()
    field.fill("three")
    page.get_by_role("button", name="Send again").click()
    wait_for_end(page)
    assert get_texts(page) == ["three", "You said: three"]


def test_the_system_prompt(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief, as a bird.")
    page.keyboard.press("Escape")
    assert "Be brief, as a bird." in ask(page, "prompt").inner_text()
    page.get_by_role("button", name="New conversation").click()
    assert "Be brief, as a bird." in ask(page, "prompt").inner_text()


def test_empty_settings_are_left_out(page: Page) -> None:
    seen = answer_with(page, make_chunk("stop", content="hi"))
    ask(page, "hello")
    page.get_by_role("button", name="Settings").click()
    values = {"Temperature": "0.5", "Top p": "0.9", "Top k": "0", "Min p": "0.1", "Max tokens": "7", "Seed": "-3"}
    for label, value in values.items():
        page.get_by_label(label, exact=True).fill(value)
    page.locator("[name=effort]").select_option("Little")
    page.get_by_role("button", name="Done").click()
    ask(page, "again")
    bare, full = seen
    for sent in seen:
        del sent["headers"]
    assert set(bare) == {"model", "messages", "stream", "stream_options", "timings"}
    assert bare["model"] == "fake"
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": 0.1, "max_tokens": 7, "seed": -3}
    asked["reasoning_effort"] = "low"
    assert {name: full[name] for name in set(full) - set(bare)} == asked
    roles = [message["role"] for message in full["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_an_idea_is_put_into_the_field(page: Page) -> None:
    page.get_by_role("button", name="What is the capital of Norway?").click()
    field = page.get_by_label("Message", exact=True)
    assert field.input_value() == "What is the capital of Norway?"
    assert field.evaluate("e => e === document.activeElement")
    field.press("Enter")
    page.locator(".assistant").wait_for()
    assert page.locator(".empty").count() == 0


def test_conversations_are_kept(page: Page, server: Running) -> None:
    ask(page, "first")
    page.get_by_role("button", name="New conversation").click()
    assert get_texts(page) == []
    ask(page, "second")
    page.reload()
    page.locator("#conversations").get_by_role("button", name="first", exact=True).click()
    assert get_texts(page) == ["first", "You said: first"]
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete first").click()
    assert get_texts(page) == []
    page.reload()
    assert page.locator("#conversations .open").all_inner_texts() == ["second"]


def test_a_reply_goes_on_while_another_conversation_is_read(page: Page) -> None:
    ask(page, "first")
    page.get_by_role("button", name="New conversation").click()
    send(page, "slow")
    wait_for(page, "document.querySelector('.markdown')?.innerText.length > 10")
    page.locator("#conversations").get_by_role("button", name="first", exact=True).click()
    assert get_texts(page) == ["first", "You said: first"]
    page.locator("#conversations").get_by_role("button", name="slow", exact=True).click()
    read = "document.querySelector('.markdown').innerText.length"
    before = page.evaluate(read)
    wait_for(page, f"{read} > {before}")
    page.get_by_role("button", name="Stop").click()
    wait_for_end(page)


def test_a_reload_in_the_middle_of_a_reply(page: Page, server: Running) -> None:
    send(page, "slow")
    wait_for(page, "document.querySelector('.markdown')?.innerText.length > 10")
    page.reload()
    check_idle(server)
    page.locator("#conversations").get_by_role("button", name="slow", exact=True).click()
    assert "again" in get_texts(page)[1]
    assert "stopped" in page.locator(".stats").inner_text()


def test_export(page: Page) -> None:
    ask(page, "hello")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    content = json.loads(download.value.path().read_text())
    assert [(said["role"], said["content"]) for said in content["messages"]] == [
        ("user", "hello"),
        ("assistant", "You said: hello"),
    ]
    assert content["settings"]["model"] == "fake"


def test_errors_in_the_words_of_the_server(page: Page) -> None:
    error = ask(page, "many words " * 400).get_by_role("alert")
    assert error.inner_text().startswith("Error 400: the context holds 512 tokens, and the prompt has ")
    assert ask(page, "unusable").get_by_role("alert").inner_text().startswith("Error")
    page.get_by_role("button", name="Edit this message").first.click()
    page.get_by_label("Your message").fill("short")
    page.get_by_role("button", name="Send again").click()
    wait_for_end(page)
    assert get_texts(page) == ["short", "You said: short"]


@pytest.mark.parametrize("ending", ["", "data: {"])
def test_a_connection_that_ends_early(page: Page, ending: str) -> None:
    answer_with(page, make_chunk(content="half a"), ending=ending)
    reply = ask(page, "hello")
    assert get_texts(page)[1] == "half a"
    assert reply.get_by_role("alert").inner_text() == "Error: The connection ended before the reply did."


def test_a_server_that_is_gone(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    error = ask(page, "hello").get_by_role("alert").inner_text()
    assert error == "Error: The server cannot be reached. Is it still running?"


def test_the_key(open_page: Callable[..., Page], browser: object) -> None:
    """Who came in with a password for the page has it sent for the rest too; a key of the settings goes first."""
    key = "correct-horse-battery"
    with run_fake_server(keys=[key]) as running:
        page = open_page(running.url, http_credentials={"username": "", "password": key})
        assert ask(page, "hello").locator(".markdown").inner_text() == "You said: hello"
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("another-key-that-is-wrong")
        page.get_by_role("button", name="Done").click()
        reply = ask(page, "again")
        assert reply.get_by_role("alert").inner_text().startswith("Error 401: this API key is not known here")
        reply.get_by_role("button", name="Enter an API key").click()
        assert page.get_by_label("API key").evaluate("e => e === document.activeElement")
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        assert ask(page, "again").locator(".markdown").inner_text() == "You said: again"
        assert page.evaluate("JSON.stringify(localStorage)").count(key) == 0


def test_a_full_storage_is_said(page: Page) -> None:
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError') } }")
    ask(page, "hello")
    assert get_texts(page)[1] == "You said: hello"
    assert page.locator("#banner").inner_text().startswith("The browser's storage is full")

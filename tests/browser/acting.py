"""What the tests in this folder do with the page, in a person's words."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from running import Running, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page


def wait_for(page: Page, condition: str) -> None:
    """Until a JavaScript expression is true: from here, for the page's policy lets nobody evaluate text in it."""
    deadline = time.monotonic() + 15
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"it did not come true in time: {condition}"
        page.wait_for_timeout(20)


def check_idle(running: Running) -> None:
    """Fails unless the engine soon has nothing to do."""
    engine = running.model.engine
    wait_until(lambda: engine.get_stats().running + engine.get_stats().waiting == 0)


def send(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def ask(page: Page, text: str) -> Locator:
    """Send, and wait for the end of the reply: its element."""
    replies = page.locator(".assistant").count()
    send(page, text)
    reply = page.locator(".assistant").nth(replies)
    reply.wait_for()
    wait_for_end(page)
    return reply


def wait_for_end(page: Page) -> None:
    wait_for(page, "!document.body.classList.contains('running')")


def get_texts(page: Page) -> list[str]:
    """What was said, by both sides."""
    return [text.strip() for text in page.locator(".own, .markdown").all_inner_texts()]


def answer_with(page: Page, *chunks: dict[str, Any], ending: str = "data: [DONE]\n\n") -> list[dict[str, Any]]:
    """Answer chats with these chunks instead of the server's; the requests are appended to what is returned."""
    seen: list[dict[str, Any]] = []
    body = "".join(f": ping\n\ndata: {json.dumps(chunk)}\n\n" for chunk in chunks) + ending

    def answer(route: Any) -> None:
        seen.append({**route.request.post_data_json, "headers": route.request.headers})
        route.fulfill(status=200, content_type="text/event-stream; charset=utf-8", body=body)

    page.route("**/v1/chat/completions", answer)
    return seen


def make_chunk(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}

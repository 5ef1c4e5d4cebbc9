"""Light and dark, a phone, the keyboard alone, a screen reader's view, and the metrics tab."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from acting import answer_with, ask, get_texts, make_chunk, wait_for, wait_for_end
from running import Running

if TYPE_CHECKING:
    from playwright.sync_api import Page

# The least contrast of texts against what is behind them, by WCAG's formula.
CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility({ visibilityProperty: true })
    && !e.disabled && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  return texts.map((e) => {
    const [a, b] = [parse(getComputedStyle(e).color), behind(e)].map(luminance);
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 80)];
  }).sort((a, b) => a[0] - b[0])[0];
}"""
MARKDOWN = "# Title\n\n> quote\n\n[link](https://example.org) and `code`\n\n```python\nprint()\n```"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(server: Running, open_page: Callable[..., Page], scheme: str) -> None:
    page = open_page(server.url, color_scheme=scheme)
    answer_with(page, make_chunk(reasoning_content="I think"), make_chunk("length", content=MARKDOWN))
    ask(page, "hello")
    page.unroute_all()
    ask(page, "many words " * 400)
    worst, where = page.evaluate(CONTRAST)
    assert worst >= 4.5, where
    page.get_by_role("button", name="Settings").click()
    worst, where = page.evaluate(CONTRAST)
    assert worst >= 4.5, where


def test_dark_by_choice(page: Page) -> None:
    read = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(read)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Appearance").select_option("Dark")
    page.keyboard.press("Escape")
    dark = page.evaluate(read)
    assert light == "rgb(255, 255, 255)"
    assert dark != light
    page.reload()
    assert page.evaluate(read) == dark


def test_a_phone(server: Running, open_page: Callable[..., Page]) -> None:
    """Nothing sticks out, targets are large enough, and the list of conversations comes and goes."""
    page = open_page(server.url, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    wide = "```\n" + "x" * 300 + "\n```\n\n" + "y" * 300 + "\n\n|" + "a long cell|" * 20 + "\n|" + "-|" * 20
    answer_with(page, make_chunk("stop", content=wide))
    ask(page, "z" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    log = "document.getElementById('log')"
    assert page.evaluate(f"{log}.scrollWidth <= {log}.clientWidth")
    buttons = [button for button in page.locator("button, select").all() if button.is_visible()]
    boxes = [button.bounding_box() for button in buttons]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 360 for box in boxes)
    assert min(box["height"] for box in boxes) >= 32
    assert page.get_by_label("Model").bounding_box()["width"] >= 80
    listing = page.get_by_role("navigation", name="Conversations")
    assert not listing.is_visible()
    page.get_by_role("button", name="Conversations").tap()
    listing.wait_for()
    page.get_by_role("button", name="New conversation").tap()
    wait_for(page, "getComputedStyle(document.getElementById('sidebar')).visibility === 'hidden'")
    assert get_texts(page) == []


def test_the_keyboard_alone(page: Page) -> None:
    """Every step of a conversation, without a pointer."""
    focus = "document.activeElement.id || document.activeElement.getAttribute('aria-label') || ''"
    assert page.evaluate(focus) == "message"
    page.keyboard.type("hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("world")
    page.keyboard.press("Enter")
    wait_for_end(page)
    assert get_texts(page)[0] == "hello\nworld"
    assert page.evaluate(focus) == "message"
    order = []
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
        order.append(page.evaluate(focus))
    assert order == ["Regenerate this reply", "Copy this reply", "Edit this message", "Copy this message"]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+a")
    page.keyboard.type("bye")
    page.keyboard.press("Control+Enter")
    wait_for_end(page)
    assert get_texts(page) == ["bye", "You said: bye"]
    page.keyboard.type("slow")
    page.keyboard.press("Enter")
    wait_for(page, "document.querySelectorAll('.markdown')[1]?.innerText.length > 10")
    page.keyboard.press("Escape")
    wait_for_end(page)
    assert page.evaluate(focus) == "message"
    page.locator("#tab-chat").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focus) == "tab-metrics"
    assert page.locator("#metrics").is_visible()


def test_a_screen_reader(page: Page) -> None:
    """Every control has a name; sentences of a reply are announced once."""
    ask(page, "One sentence. And one more. The end")
    unnamed = page.locator("button, input, select, textarea").evaluate_all(
        "all => all.filter(e => !(e.ariaLabel || e.labels?.length || e.innerText?.trim() || e.textContent.trim()))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []
    spoken = page.locator("[aria-live=polite]#announcer").text_content()
    assert spoken.count("One sentence.") == 1
    assert spoken.endswith("The end End of the reply.")


def test_motion_can_be_reduced(server: Running, open_page: Callable[..., Page]) -> None:
    page = open_page(server.url, reduced_motion="reduce")
    moving = "[...document.querySelectorAll('*')].map(e => getComputedStyle(e)).some(s => "
    assert not page.evaluate(f"{moving} parseFloat(s.transitionDuration) > 0 || s.animationName !== 'none')")


def test_metrics(page: Page) -> None:
    text = """# HELP mlcbuild_requests_running Requests in the batch
# TYPE mlcbuild_requests_running gauge
mlcbuild_requests_running 3
# TYPE mlcbuild_build_info gauge
mlcbuild_build_info{artifact="tiny/q4f16_1/here",model_name="tiny",target="here",version="0.1.0"} 1
# TYPE mlcbuild_requests_total counter
mlcbuild_requests_total{route="/v1/chat",finish_reason="a \\"b\\""} 7
# TYPE mlcbuild_time_to_first_token_seconds histogram
mlcbuild_time_to_first_token_seconds_bucket{le="0.1"} 5
mlcbuild_time_to_first_token_seconds_bucket{le="0.2"} 10
mlcbuild_time_to_first_token_seconds_bucket{le="+Inf"} 10
mlcbuild_time_to_first_token_seconds_sum 1.2
mlcbuild_time_to_first_token_seconds_count 10
"""
    page.route("**/metrics", lambda route: route.fulfill(body=text, content_type="text/plain; version=0.0.4"))
    page.get_by_role("tab", name="Metrics").click()
    rows = page.locator("#metrics tbody tr")
    rows.first.wait_for()
    tiles = [" ".join(text.split()) for text in page.locator(".tile").all_inner_texts()]
    assert tiles == ["Running 3", "Answered 7 0 refused", "First token, p50 100 ms p95 190 ms"]
    running, total, first = [" ".join(row.split()) for row in rows.all_inner_texts()]
    assert running == "requests running 3"
    assert total.startswith('requests route=/v1/chat finish_reason=a "b" 7')
    assert first == "time to first token 10 120 ms 100 ms 190 ms 198 ms"
    assert page.locator(".build").inner_text() == "tiny/q4f16_1/here, served by mlcbuild 0.1.0"
    table = page.get_by_role("region", name="Now")
    table.focus()
    page.unroute_all()
    page.route("**/metrics", lambda route: route.fulfill(body=text.replace("running 3", "running 4")))
    page.get_by_role("cell", name="4", exact=True).wait_for()
    assert table.evaluate("e => e === document.activeElement")


def test_metrics_that_are_off(page: Page) -> None:
    page.route("**/metrics", lambda route: route.fulfill(status=404, json={"error": {"message": "nothing"}}))
    page.get_by_role("tab", name="Metrics").click()
    assert page.locator("#metrics .empty").inner_text() == "This server keeps its metrics to itself: /metrics is off."

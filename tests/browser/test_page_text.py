"""Model text in the page: markdown, hostile text, reasoning, tool calls; and a stream cut anywhere."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from acting import answer_with, ask, make_chunk, wait_for_end
from running import Running

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

RENDER = """async (text) => {
  const { renderMarkdown } = await import("./markdown.js");
  const element = document.createElement("div");
  renderMarkdown(element, text);
  for (const bar of element.querySelectorAll(".code-bar")) bar.remove();
  for (const e of element.querySelectorAll("*")) {
    for (const name of ["class", "tabindex", "role", "aria-label", "target", "rel"]) e.removeAttribute(name);
  }
  return element.innerHTML;
}"""
CASES = {
    "plain": ("plain", "<p>plain</p>"),
    "lines": ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    "heading": ("## Two ##\ntext", "<h4>Two</h4><p>text</p>"),
    "emphasis": (
        "**a** *b* __c__ _d_ ~~e~~",
        "<p><strong>a</strong> <em>b</em> <strong>c</strong> <em>d</em> <del>e</del></p>",
    ),
    "nested": ("**a *b***, ***c***", "<p><strong>a <em>b</em></strong>, <strong><em>c</em></strong></p>"),
    "no emphasis": ("snake_case_name, 2 * 3 * 4, **open", "<p>snake_case_name, 2 * 3 * 4, **open</p>"),
    "escapes": (r"\*a\* \_b\_ \\", "<p>*a* _b_ \\</p>"),
    "code": ("`a*b*` ``x ` y`` `open", "<p><code>a*b*</code> <code>x ` y</code> `open</p>"),
    "fence": (
        "```py\nif a:\n    b\n\n```\nend",
        "<div><pre><code><span>if</span> a:\n    b\n</code></pre></div><p>end</p>",
    ),
    "open fence": ("```\n# a\n- b", "<div><pre><code># a\n- b</code></pre></div>"),
    "tildes": ("~~~\n```\n~~~", "<div><pre><code>```</code></pre></div>"),
    "list": ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    "numbers": ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    "loose": ("1. a\n\n2. b", "<ol><li>a</li><li>b</li></ol>"),
    "code in a list": (
        "1. a\n   ```\n   x\n\n\n     y\n   ```\n2. b",
        "<ol><li><p>a</p><div><pre><code>x\n\n\n  y</code></pre></div></li><li>b</li></ol>",
    ),
    "tasks": ("- [x] a", '<ul><li><input type="checkbox" disabled="" checked="">a</li></ul>'),
    "quote": ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    "rule": ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
    "table": (
        "|a|b|\n|-|-:|\n|1|2 \\| 3|",
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>1</td><td>2 | 3</td></tr></tbody></table></div>",
    ),
    "link": ("[a **b**](https://x.org/y_z)", '<p><a href="https://x.org/y_z">a <strong>b</strong></a></p>'),
    "bare link": (
        "see https://x.org/a_b, (http://y.org)",
        '<p>see <a href="https://x.org/a_b">https://x.org/a_b</a>, (<a href="http://y.org">http://y.org</a>)</p>',
    ),
    "image": ("![alt](https://x.org/i.png)", '<p><a href="https://x.org/i.png">alt</a></p>'),
    "no link": ("[a](javascript:alert(1)) [b](data:text/html,x) [c](/admin) [d]", None),
}
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "[x](javascript:window.hacked=1)",
    '[x](https://a" onmouseover="window.hacked=1)',
    "![x](javascript:window.hacked=1)",
    '<https://x.org/" onclick=window.hacked=1>',
    '```"><script>window.hacked = 1</script>\n</code></pre><svg onload=window.hacked=1>\n```',
    "| <iframe srcdoc='<script>parent.hacked=1</script>'> |\n|-|\n| </td><style>*{display:none}</style> |",
    "# <a href='javascript:window.hacked=1'>x</a>",
]


@pytest.fixture(scope="module")
def script_page(browser: Browser, shared_server: Running) -> Iterator[Page]:
    """For tests that only call the page's functions: one page is enough."""
    with contextlib.closing(browser.new_page()) as page:
        page.goto(shared_server.url)
        yield page


@pytest.mark.parametrize("name", CASES)
def test_markdown(script_page: Page, name: str) -> None:
    text, expected = CASES[name]
    shown = script_page.evaluate(RENDER, text)
    if expected is None:
        assert "<a" not in shown
    else:
        assert shown == expected


def test_a_stream_ends_as_the_whole_would(script_page: Page) -> None:
    """Rendering every prefix in turn, keeping the blocks that did not change, ends with the same elements."""
    text = "\n\n".join(text for text, _ in CASES.values())
    same = """async (text) => {
      const { renderMarkdown } = await import("./markdown.js");
      const [grown, whole] = [document.createElement("div"), document.createElement("div")];
      for (let end = 0; end <= text.length; end += 1) renderMarkdown(grown, text.slice(0, end));
      renderMarkdown(whole, text);
      return grown.innerHTML === whole.innerHTML;
    }"""
    assert script_page.evaluate(same, text)


@pytest.mark.parametrize(
    "text",
    [
        "*" * 50_000,
        "**a " * 20_000,
        "[" * 50_000,
        "`a``b```" * 9000,
        "> " * 20_000 + "a",
        "- " * 20_000,
        "_a" * 30_000,
        "\n".join(" " * n + "- a" for n in range(300)),
        "|" * 50_000,
        "![](" * 20_000,
        "<" * 50_000,
        "~~" * 20_000,
    ],
)
def test_no_text_takes_long(script_page: Page, text: str) -> None:
    """A guard against searches that start over at every character, not a clock: linear is far below a second here."""
    assert (
        script_page.evaluate(
            "async (text) => { const start = performance.now();"
            f" await ({RENDER})(text); return performance.now() - start }}",
            text,
        )
        < 5000
    )


def test_hostile_text(page: Page) -> None:
    """Whatever a model says stays text: no element, no address and no event that it names comes to be."""
    text = "\n\n".join(HOSTILE)
    answer_with(
        page,
        make_chunk(reasoning_content=text),
        make_chunk(content=text),
        make_chunk("tool_calls", tool_calls=[{"index": 0, "id": text, "function": {"name": text, "arguments": text}}]),
    )
    reply = ask(page, text)
    found = page.evaluate("""() => {
      const all = [...document.querySelectorAll("#chat *, #conversations *")];
      return all.filter((e) => ["SCRIPT", "IMG", "IFRAME", "STYLE", "svg"].includes(e.tagName)
        || [...e.attributes].some((a) => a.name.startsWith("on") || (a.name === "href" && !a.value.startsWith("http"))))
        .map((e) => e.outerHTML);
    }""")
    assert found == []
    assert "<script>window.hacked = 1</script>" in reply.locator(".markdown").inner_text()
    page.reload()
    page.locator("#conversations .open").click()
    page.mouse.move(600, 300)
    assert page.evaluate("window.hacked") is None


COLOURS = [
    ("python", 'x = "#" # 1', [["", "x = "], ["text", '"#"'], ["", " "], ["comment", "# 1"]]),
    ("python", "def f(): 'open", [["keyword", "def"], ["", " f(): "], ["text", "'open"]]),
    ("Rust", "fn f<'a>() { 0x1F }", [["keyword", "fn"], ["", " f<'a>() { "], ["number", "0x1F"], ["", " }"]]),
    ("sql", "SELECT a -- b", [["keyword", "SELECT"], ["", " a "], ["comment", "-- b"]]),
    ("js", "a // b\n1.5e3", [["", "a "], ["comment", "// b"], ["", "\n"], ["number", "1.5e3"]]),
    ("constructor", "if 1", [["", "if 1"]]),
    ("", "if 1", [["", "if 1"]]),
]
COLOUR = "async ([code, language]) => (await import('./highlight.js')).colour(code, language)"


@pytest.mark.parametrize(("language", "code", "expected"), COLOURS)
def test_colours_of_code(script_page: Page, language: str, code: str, expected: list) -> None:
    assert script_page.evaluate(COLOUR, [code, language]) == expected


def test_colours_lose_nothing(script_page: Page) -> None:
    """Whatever the code, its pieces are the code; and they come fast."""
    codes = ['"' * 9000, "'\\" * 5000, "/*" * 9000, "a1 " * 6000, "#\n" * 6000, '"""' + "x" * 19000, "0x" * 9000]
    for language in ("python", "js", "c", "sh", "yaml", "go", "sql", "json"):
        for code in codes:
            timed = f"async (given) => [await ({COLOUR})(given), performance.now()]"
            before = script_page.evaluate("performance.now()")
            pieces, after = script_page.evaluate(timed, [code, language])
            assert "".join(text for _, text in pieces) == code
            assert after - before < 5000  # as above: a search that starts over would take minutes


def test_copying_code(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer_with(page, make_chunk("stop", content="```c\nint a;\n\tint b;\n```"))
    reply = ask(page, "hello")
    reply.get_by_role("button", name="Copy this code").click()
    reply.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "int a;\n    int b;"


def test_copying_where_browsers_give_no_clipboard(page: Page) -> None:
    """As at http://<address in the network>."""
    page.evaluate("() => { Object.defineProperty(navigator, 'clipboard', { value: undefined }) }")
    ask(page, "hello").get_by_role("button", name="Copy this reply").click()
    page.get_by_text("Copied").wait_for()
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.press("Control+v")
    assert page.get_by_label("Message", exact=True).input_value() == "You said: hello"


def test_reasoning_and_tool_calls(page: Page) -> None:
    def call(index: int, **function: str) -> dict:
        named = {"id": f"call_{index}"} if "name" in function else {}
        return make_chunk(tool_calls=[{"index": index, **named, "function": function}])

    seen = answer_with(
        page,
        make_chunk(role="assistant", content=""),
        make_chunk(reasoning_content="They want "),
        make_chunk(reasoning_content="the weather."),
        make_chunk(content="I look."),
        call(0, name="get_weather", arguments=""),
        call(0, arguments='{"city": '),
        call(0, arguments='"Bern"}'),
        call(1, name="get_time", arguments="{}"),
        call(2, name="get_time", arguments='{"zone": 1}'),
        make_chunk("tool_calls"),
    )
    page.get_by_role("button", name="Settings").click()
    tools = page.get_by_label("Tools")
    tools.fill("[{")
    assert page.locator("#tools-error").inner_text().startswith("The tools are not JSON")
    tools.fill('[{"type": "function", "function": {"name": "get_weather"}}]')
    assert page.locator("#tools-error").text_content() == ""
    page.get_by_role("button", name="Done").click()
    reply = ask(page, "weather?")
    reasoning = reply.locator("details")
    assert reasoning.get_attribute("open") is None
    reasoning.get_by_text("Reasoning").click()
    assert reply.locator(".reasoning-text").inner_text() == "They want the weather."
    assert reply.locator(".call").all_inner_texts() == [
        'Calls get_weather\n{\n  "city": "Bern"\n}',
        "Calls get_time\n{}",
        'Calls get_time\n{\n  "zone": 1\n}',
    ]
    reply.get_by_label("Result of get_weather").fill("rain")
    reply.get_by_label("Result of get_time {}").fill("noon")
    reply.get_by_role("button", name="Send the results").click()
    wait_for_end(page)
    assert [tool["function"]["name"] for tool in seen[1]["tools"]] == ["get_weather"]
    reply.get_by_label('Result of get_time {"zone": 1}').wait_for(state="hidden")  # it is answered
    user, said, weather, time, _ = seen[1]["messages"]
    assert user == {"role": "user", "content": "weather?"}
    assert (said["content"], said["reasoning_content"]) == ("I look.", "They want the weather.")
    assert said["tool_calls"][0] == {
        "id": "call_0",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'},
    }
    assert weather == {"role": "tool", "content": "rain", "tool_call_id": "call_0"}
    assert time == {"role": "tool", "content": "noon", "tool_call_id": "call_1"}


PARSE = """async (pieces) => {
  const { EventParser } = await import("./sse.js");
  const parser = new EventParser();
  return pieces.flatMap((piece) => parser.push(new Uint8Array(piece)));
}"""
STREAM = (
    '\ufeff: ping\n\ndata: {"a": "é€😀"}\n\ndata:two\r\ndata: lines\r\n\r\n'
    "id: 1\rdata\rdata:  x\r\r: end\n\ndata: [DONE]\n\n"
)
EVENTS = ['{"a": "é€😀"}', "two\nlines", "\n x", "[DONE]"]


def test_events_cut_anywhere(script_page: Page) -> None:
    data = list(STREAM.encode())
    whole = [data]
    twos = [[data[:cut], data[cut:]] for cut in range(len(data) + 1)]
    ones = [[byte] for byte in data]
    assert script_page.evaluate(PARSE, whole) == EVENTS
    assert script_page.evaluate(PARSE, ones) == EVENTS
    many = f"(all) => Promise.all(all.map({PARSE}))"
    draw = random.Random(0)
    cuts = [sorted(draw.choices(range(len(data)), k=draw.randrange(1, 9))) for _ in range(200)]
    pieces = [[data[a:b] for a, b in zip([0, *ends], [*ends, None], strict=True)] for ends in cuts]
    assert all(events == EVENTS for events in script_page.evaluate(many, twos + pieces))

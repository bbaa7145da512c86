"""The page at /, in headless Chromium: chat, reasoning, tools, markdown, stop, retry, sizes."""

import json
import shutil

import pytest

from tests.engine.doubles import byte_tokenizer, expected_tokens
from tests.serving.conftest import make_engine, running_server, wait_until
from tests.serving.scripted import scripted_server
from tests.serving.templates import QWEN3

ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SIZES = {"phone": (390, 844), "desk": (1280, 800)}
SECONDS = 30
TOOL = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
MARKED = """# Title

A **bold**, *leaning*, ~~wrong~~ `x < y` [link](https://example.org/a_b)
and [trap](javascript:alert(1)).

- one
- two
  1. inner
- three

| a | b |
|---|---|
| 1 | <i>2</i> |

> quoted

```python
print("<b>")
```
<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("chromium and chromedriver are not on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


class Page:
    """What a user sees and does."""

    def __init__(self, chromium, url, size):
        width, height = SIZES[size]
        # The window's own size counts its frame; this is the page's.
        chromium.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {
                "width": width,
                "height": height,
                "deviceScaleFactor": 1,
                "mobile": size == "phone",
            },
        )
        self.browser = chromium
        chromium.get(url)
        wait_until(lambda: self.one("#model").text not in ("", "…"), seconds=SECONDS)

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        return self.browser.find_element("css selector", selector)

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def set(self, field, value):
        self.one(field).clear()
        self.one(field).send_keys(value)

    def say(self, text):
        self.set("#input", text)
        self.one("#send").click()

    def wait(self, answers=1):
        """Until so many answers are complete."""
        # Every look is work for the browser, which has an answer to draw.
        wait_until(
            lambda: len(self.all(".assistant")) == answers and not self.all(".streaming"),
            seconds=SECONDS,
            pause=0.05,
        )

    def box(self, selector):
        return self.run(
            "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [b.left, b.top, b.right, b.bottom];",
            selector,
        )

    def problems(self):
        return [e for e in self.browser.get_log("browser") if e["level"] == "SEVERE"]


def completed(page, answers=1):
    page.wait(answers)
    assert page.problems() == []


@pytest.fixture
def open_page(chromium):
    return lambda server, size="desk": Page(chromium, server.url, size)


@pytest.mark.parametrize(
    ("text", "most"),
    [(">" * 20_000 + "x", 21), ("1. " * 20_000 + "x", 41), ("`a` " * 20_000, 20_001)],
    ids=["quotes", "lists", "inline"],
)
def test_a_model_that_repeats_itself_does_not_break_the_page(server, open_page, text, most):
    page = open_page(server)
    script = """
        const [text, done] = arguments;
        import("/static/markdown.js")
          .then(({ markdown }) => markdown(text))
          .then((made) => done([made.textContent.trim().at(-1), made.querySelectorAll("*").length]))
          .catch((error) => done([error.message, 0]));
    """
    end, elements = page.browser.execute_async_script(script, text)
    assert end in "xa", end
    assert 20 < elements <= most


def test_chat_and_charts(server, open_page):
    page = open_page(server)
    assert page.one("#hint").is_displayed()
    page.set("#temperature", "0")
    page.set("#max-tokens", "30")
    page.say("hello <b>page</b>")
    completed(page)
    assert not page.one("#hint").is_displayed()
    # What a user writes is text, never markup.
    assert page.one(".user").text == "hello <b>page</b>"
    tokenizer = byte_tokenizer()
    prompt = tokenizer.encode("<user>user: hello <b>page</b>\n<assistant>")
    want = tokenizer.decode(expected_tokens(prompt, 30))
    shown, expected = page.run(
        """
        return import("/static/markdown.js").then(({ markdown }) => {
          const root = document.createElement("div");
          root.append(markdown(arguments[0]));
          return [document.querySelector(".assistant .markdown").innerHTML, root.innerHTML];
        });
        """,
        want,
    )
    assert shown == expected
    ending = page.one(".assistant .end").text
    assert "30 tokens" in ending
    assert "limit of tokens" in ending
    wait_until(lambda: page.one("#kv-now").text.endswith("%"), seconds=SECONDS)
    wait_until(lambda: page.one("#rate-now").text != "", seconds=SECONDS)
    painted = page.run(
        "const c = document.getElementById('rate');"
        "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v);"
    )
    assert painted
    page.one("#clear").click()
    assert page.one("#hint").is_displayed()
    assert page.all(".message") == []


@pytest.fixture(scope="module")
def talker():
    """Thinks, calls a tool if it has any, and writes markdown."""

    def answer(prompt):
        if "get_weather" in prompt and "degrees" not in prompt:
            call = {"name": "get_weather", "arguments": {"city": "Bern"}}
            return f"<think>\nAsk.\n</think>\n\n<tool_call>\n{json.dumps(call)}\n</tool_call>"
        return f"<think>\nMaybe <b>so</b>.\n</think>\n\n{MARKED}"

    special = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    with scripted_server(QWEN3, answer, special=special) as server:
        yield server


def test_reasoning_and_markdown(talker, open_page):
    page = open_page(talker)
    page.set("#max-tokens", "1500")
    page.say("hi")
    completed(page)
    reasoning = page.one(".assistant details.reasoning")
    assert reasoning.get_property("open") is False  # folded when the answer began
    reasoning.find_element("css selector", "summary").click()
    assert "Maybe <b>so</b>." in reasoning.text
    shown = page.one(".assistant .markdown")

    def texts(selector):
        return [e.text for e in shown.find_elements("css selector", selector)]

    assert texts("h1") == ["Title"]
    assert texts("strong") == ["bold"]
    assert texts("em") == ["leaning"]
    assert texts("del") == ["wrong"]
    assert texts("p code") == ["x < y"]
    assert texts("ul > li > ol > li") == ["inner"]
    assert len(texts("ul > li")) == 3
    assert texts("td") == ["1", "<i>2</i>"]
    assert texts("blockquote") == ["quoted"]
    assert texts("pre code") == ['print("<b>")']
    links = shown.find_elements("css selector", "a")
    assert [(a.text, a.get_attribute("href")) for a in links] == [
        ("link", "https://example.org/a_b")
    ]
    assert links[0].get_attribute("rel") == "noopener noreferrer"
    assert "[trap](javascript:alert(1))" in shown.text
    assert "<img src=x onerror=" in shown.text
    assert page.browser.title == "Quatom"
    assert shown.find_elements("css selector", "img, script, b, i") == []


INJECTIONS = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=document.title='owned'>",
    "[a](javascript:document.title='owned')",
    "[a](JaVaScRiPt:document.title='owned')",
    "[a](data:text/html,<script>1</script>)",
    "[<img src=x>](https://a.example/\"onmouseover=\"document.title='owned')",
    "```html\n</code></pre><script>document.title='owned'</script>\n```",
    "`<svg/onload=document.title='owned'>`",
    "| <iframe src=javascript:1> |\n|---|\n| <a onclick=x> |",
    "&lt;script&gt;",
    "**<b onmouseover=x>**",
    "> <object data=x>",
    "1. <style>*{display:none}</style>",
]


def test_nothing_can_be_injected(server, open_page):
    page = open_page(server)
    kinds = page.run(
        """
        return import("/static/markdown.js").then(({ markdown }) => arguments[0].map((text) => {
          const root = document.createElement("div");
          root.append(markdown(text));
          document.body.append(root);
          const nodes = [...root.querySelectorAll("*")];
          const made = {
            names: nodes.map((n) => n.localName),
            attributes: nodes.flatMap((n) => [...n.attributes].map((a) => a.name)),
            addresses: nodes.map((n) => n.href).filter(Boolean),
            text: root.textContent,
          };
          root.remove();
          return made;
        }));
        """,
        INJECTIONS,
    )
    allowed = {"p", "a", "pre", "code", "div", "table", "thead", "tbody", "tr", "th", "td"}
    allowed |= {"strong", "blockquote", "ol", "li"}
    for text, made in zip(INJECTIONS, kinds, strict=True):
        assert set(made["names"]) <= allowed, text
        assert set(made["attributes"]) <= {"href", "target", "rel", "class"}, text
        assert all(a.startswith("https://a.example/") for a in made["addresses"]), text
    assert kinds[9]["text"] == "&lt;script&gt;"
    assert page.browser.title == "Quatom"


def test_a_tool_call_is_shown_and_answered(talker, open_page):
    page = open_page(talker)
    page.set("#max-tokens", "1500")
    page.one("#more summary").click()
    page.set("#tools", json.dumps(TOOL))
    page.say("How is the weather in Bern?")
    completed(page)
    call = page.one(".assistant details.call")
    assert call.find_element("css selector", "summary").text == "Calls get_weather"
    arguments = call.find_element("css selector", "code").text
    assert json.loads(arguments) == {"city": "Bern"}
    assert "\n" in arguments  # indented
    call.find_element("css selector", "input").send_keys("21 degrees\n")
    completed(page, answers=2)
    assert page.all(".assistant")[1].find_elements("css selector", "h1")
    assert "21 degrees" in talker.model.prompts[-1]


def test_stop_and_retry(open_page):
    with running_server(make_engine(step_seconds=0.05)) as server:
        page = open_page(server)
        page.set("#max-tokens", "400")
        page.say("hello")
        wait_until(lambda: len(page.one(".assistant .markdown").text) > 2, seconds=SECONDS)
        assert page.one("#send").text == "Stop"
        page.one("#send").click()
        page.wait()
        assert page.one("#send").text == "Send"
        assert "stopped" in page.one(".assistant .end").text
        engine = server.app.state.async_engine
        wait_until(lambda: engine.num_streams == 0)
        page.set("#max-tokens", "5")
        page.one(".assistant .retry").click()
        completed(page)
        assert "5 tokens" in page.one(".assistant .end").text
        assert len(page.all(".user")) == 1


def test_a_refusal_is_shown_and_can_be_mended(server, open_page):
    page = open_page(server)
    page.set("#max-tokens", "100000")
    page.say("hello")
    wait_until(lambda: page.all(".error"), seconds=SECONDS)
    error = page.one(".error")
    assert "100000" in error.text
    assert error.get_attribute("role") == "alert"
    assert page.all(".assistant") == []
    page.browser.get_log("browser")  # the browser notes the status 400
    page.set("#max-tokens", "4")
    error.find_element("css selector", ".retry").click()
    completed(page)
    assert page.all(".error") == []
    assert len(page.all(".user")) == 1


@pytest.mark.parametrize("size", SIZES)
def test_everything_fits_the_screen(talker, open_page, size, tmp_path):
    page = open_page(talker, size)
    width, height = SIZES[size]
    page.set("#max-tokens", "1500")
    page.say("hi " * 100)  # more than a screen, with the answer
    completed(page)
    assert page.run("const m = document.getElementById('messages');return m.scrollTop") > 0
    below = "const m = document.getElementById('messages');"
    below += "return m.scrollHeight - m.scrollTop - m.clientHeight;"
    wait_until(lambda: page.run(below) < 2)  # the end of what was said is in view
    # The composer is on the screen, whatever has been said, and nothing sticks out to the side.
    for selector in ("#input", "#send", "#max-tokens", "#temperature", "#clear"):
        left, top, right, bottom = page.box(selector)
        assert left >= 0, selector
        assert right <= width, selector
        assert top >= height / 2, selector
        assert bottom <= height, selector
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.run("return document.documentElement.scrollHeight") <= height
    _, top, _, bottom = page.box("#messages")
    assert bottom - top >= height * 0.45
    charts = page.one("#charts")
    if size == "desk":
        assert charts.is_displayed()
        assert not page.one("#toggle-charts").is_displayed()
    else:
        assert not charts.is_displayed()
        page.one("#toggle-charts").click()
        assert charts.is_displayed()
        assert page.box("#send")[3] <= height
        _, top, _, bottom = page.box("#messages")
        assert bottom - top >= height * 0.3
    assert page.browser.save_screenshot(str(tmp_path / f"{size}.png"))

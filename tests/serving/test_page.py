"""The page at /, in headless Chromium: it chats with streaming and draws the server's metrics."""

import shutil

import pytest

from tests.engine.doubles import byte_tokenizer, expected_tokens
from tests.serving.conftest import wait_until

pytestmark = pytest.mark.slow

ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,760",
)


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


def test_chat_and_charts(server, browser):
    browser.get(server.url)
    wait_until(lambda: browser.find_element("id", "model").text == "hash, 512 tokens")
    browser.find_element("id", "temperature").clear()
    browser.find_element("id", "temperature").send_keys("0")
    browser.find_element("id", "max-tokens").clear()
    browser.find_element("id", "max-tokens").send_keys("30")
    browser.find_element("id", "input").send_keys("hello <b>page</b>")
    browser.find_element("id", "send").click()

    def messages():
        return browser.find_elements("css selector", ".message")

    def finished():
        shown = messages()
        return len(shown) == 2 and "streaming" not in shown[1].get_attribute("class")

    wait_until(finished)
    # What a user writes is text, never markup.
    assert messages()[0].text == "hello <b>page</b>"
    tokenizer = byte_tokenizer()
    prompt = tokenizer.encode("<user>user: hello <b>page</b>\n<assistant>")
    want = tokenizer.decode(expected_tokens(prompt, 30))
    assert messages()[1].get_property("textContent") == want

    wait_until(lambda: browser.find_element("id", "kv-now").text.endswith("%"))
    wait_until(lambda: browser.find_element("id", "rate-now").text != "")
    painted = browser.execute_script(
        "const c = document.getElementById('rate');"
        "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v);"
    )
    assert painted
    problems = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert problems == []

"""What the tests of the page share: hostile texts, opening a folder, reading the address."""

from urllib.parse import parse_qs

HOSTILE = {
    "markup": "</script><script>window.pwned = 1; alert(1)</script>",
    "attribute": '"><img src=x onerror="window.pwned = 1"><svg onload=\'window.pwned=1\'>',
    "javascript": "javascript:window.pwned=1",
    "template": "${window.pwned = 1} {{pwned}} `$(touch pwned)` ; rm -rf ~ !! %s '\\'' \\",
    "separators": "a\u2028b\u2029c\nd\re\tf\x1b]0;title\x07\x1b[201~g",
    "reversed": "safe\u202egnp.exe\u202c \u2066x",
    "emoji": "🚀 🏳️‍🌈 नमस्ते عربى ﷽",
    "flag": "--db=elsewhere.db",
    "assignment": "=ls",
    "empty": "",
    "prototype": "__proto__",
    "nul": "a\x00b",
    "surrogate": "a\ud800b",
    "long": "x" * 4_000 + " <b>bold</b> " + "y z " * 1_500,
}


def open_folder(page, folder, hash=""):
    """Open the page over `folder` from disk and wait until it shows images or a message."""
    page.goto("about:blank")  # or another hash would not load the page anew
    page.goto((folder / "samplebrowser.html").as_uri() + hash)
    page.locator("#browser:not([hidden])[data-view], #message:not([hidden])").wait_for()


def state(page) -> dict[str, str]:
    """Return what the address says. `page.url` would be what Playwright was told of it, which comes later."""
    return {name: values[0] for name, values in parse_qs(page.evaluate("location.hash.slice(1)")).items()}


def texts(page, selector) -> list[str]:
    return page.locator(selector).all_inner_texts()

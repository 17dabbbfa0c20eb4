# SPDX-License-Identifier: Apache-2.0
"""Reads HTML pages, and opens them in a browser."""

import base64
import contextlib
import html.parser
import json
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright import sync_api


class Page(html.parser.HTMLParser):
    """The content of a page, and the tags that would load a file from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[bytes] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.unlabelled = 0
        self.data: list[dict] = []
        self.words: list[str] = []
        self._is_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self._is_data = attributes.get("type") == "application/json"
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
            return
        source = attributes.get("src") or attributes.get("href") or ""
        if source.startswith("data:image/png;base64,"):
            self.pictures.append(base64.b64decode(source.partition(",")[2]))
            self.unlabelled += not attributes.get("alt")
        elif (source and tag not in ("use",)) or tag in ("link", "iframe"):
            self.loaded.append(tag)

    def handle_data(self, data: str) -> None:
        if self._is_data:
            self.data.append(json.loads(data))
        self._is_data = False
        self.words.append(data)


CONTRAST = """() => {
    const part = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const light = (rgb) => [0.2126, 0.7152, 0.0722]
        .reduce((sum, w, i) => sum + w * part(rgb[i] / 255), 0);
    const read = (text) => text.match(/[0-9.]+/g).map(Number);
    const behind = (node) => {
        if (!node) return [255, 255, 255];
        const [r, g, b, a = 1] = read(getComputedStyle(node).backgroundColor);
        if (a === 1) return [r, g, b];
        const below = behind(node.parentElement);
        return [r, g, b].map((c, i) => a * c + (1 - a) * below[i]);
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || !node.checkVisibility()) continue;
        if (node.closest("script, svg")) continue;
        const [a, b] = [light(read(getComputedStyle(node).color)), light(behind(node))];
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < 4.5) found.push([node.textContent, contrast]);
    }
    return found.slice(0, 5);
}"""


@contextlib.contextmanager
def opened(
    browser: "sync_api.Browser", path: pathlib.Path
) -> Iterator["sync_api.Page"]:
    """Opens a page from its file in a browser.

    Fails if the page prints to the console, raises an error or requests another URL.
    """
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        page.goto(path.as_uri())
        yield page
        own = ("data:", "blob:", path.as_uri())
        assert [text for text in said if not text.startswith(own)] == []

"""What is wrong with a report's page, and the pictures it carries."""

from __future__ import annotations

import base64
import re
from collections import Counter
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

#: Elements that have no end.
VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}


class Page(HTMLParser):
    """What a test wants to know of a page; ``problems`` says what is wrong with its markup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.problems: list[str] = []
        self.headings: list[int] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def markup_problems(text: str) -> list[str]:
    """Everything that keeps a page from being whole, alone and accessible."""
    page = Page(text)
    problems = list(page.problems)
    everything = [attributes for _, attributes in page.tags]
    ids = Counter(a["id"] for a in everything if a.get("id"))
    problems += [f"id {name} is there {count} times" for name, count in ids.items() if count > 1]
    for attributes in everything:
        for key in ("src", "href", "data", "srcset", "action"):
            target = attributes.get(key)
            if target is None or target.startswith("data:"):
                continue
            if not target.startswith("#") or target[1:] not in ids:
                problems.append(f"{key} leads to {target[:60]}")
        for target in re.findall(r"url\(([^)]*)\)", " ".join(str(value) for value in attributes.values())):
            if target[1:] not in ids:
                problems.append(f"a style leads to {target[:60]}")
    problems += [f"<{tag}>" for tag in ("script", "iframe", "object", "embed", "link", "base") if page.of(tag)]
    problems += [f"a style loads {found}" for found in re.findall(r"@import\b|url\(\s*[\"']?(?!#)[^)]*", text)]
    problems += ["a picture says nothing" for a in page.of("img") if not a.get("alt")]
    problems += ["a figure says nothing" for a in page.of("svg") if a.get("role") != "img" or not a.get("aria-label")]
    problems += ["a table header has no scope" for a in page.of("th") if a.get("scope") not in ("col", "row")]
    levels = page.headings
    if levels[:1] != [1] or levels.count(1) != 1 or any(b > a + 1 for a, b in pairwise(levels)):
        problems.append(f"headings are of levels {levels}")
    return problems


def decode(uri: str) -> Any:
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))

"""Links of the documentation lead somewhere: relative ones to a file of the repository, fragments to a heading."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(page for place in ("docs", "examples") for page in (ROOT / place).rglob("*.md"))]


def blocks(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Where a page's links and pictures lead, HTML's too, in order."""
    found: list[str] = []
    for token in chain.from_iterable(block.children or [block] for block in blocks(page)):
        if token.type == "link_open":
            found.append(str(token.attrs["href"]))
        elif token.type == "image":
            found.append(str(token.attrs["src"]))
        elif token.type in ("html_block", "html_inline"):
            found += re.findall(r"""(?:href|src)=["']([^"']+)["']""", token.content)
    return found


def anchors(page: Path) -> set[str]:
    """The fragments a page answers to, by GitHub's rule: lower case, no punctuation, hyphens for spaces, numbered."""
    found: set[str] = set()
    times: Counter[str] = Counter()
    for opening, heading in pairwise(blocks(page)):
        if opening.type != "heading_open":
            continue
        text = "".join(part.content for part in heading.children or [] if part.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{times[slug]}" if times[slug] else slug)
        times[slug] += 1
    return found


def broken(page: Path, root: Path) -> list[str]:
    """Relative links that lead to no file under ``root``, or to no heading of the page they name."""
    bad = []
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        goal = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        inside = goal.is_relative_to(root) and goal.exists()
        if not inside or (parts.fragment and goal.suffix == ".md" and parts.fragment not in anchors(goal)):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page, ROOT) == []


def test_the_readme_is_among_the_pages_and_links_to_others() -> None:
    assert ROOT / "README.md" in PAGES and "docs/guide.md" in links(ROOT / "README.md")


def test_a_link_that_leads_nowhere_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# `Sizes`: what fits?\n\n## Twice\n\n## Twice\n")
    page = tmp_path / "README.md"
    page.write_text(
        "# Top\n[a](other.md) [b](other.md#sizes-what-fits) [c](#top) [d](other.md#twice-1) [e](https://x.example/y)\n\n"
        "[1](gone.md) [2](other.md#gone) [3](#gone) ![4](gone.png) [5](../outside.md) [6](other.md#twice-2)\n\n"
        '| x |\n| - |\n| [7](cell.md) |\n\n<img src="gone.svg">\n\n```\n[not a link](code.md)\n```\n`[nor](this.md)`\n'
    )
    (tmp_path.parent / "outside.md").touch()
    assert broken(page, tmp_path) == [
        *("gone.md", "other.md#gone", "#gone", "gone.png", "../outside.md", "other.md#twice-2", "cell.md", "gone.svg")
    ]

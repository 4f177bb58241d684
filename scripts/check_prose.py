#!/usr/bin/env python3
"""Count long sentences in the README and the docs.

    python scripts/check_prose.py            # one line per page
    python scripts/check_prose.py --list     # the long sentences themselves

A sentence ends with a period, a question mark or an exclamation mark; colons and semicolons do not
end it. Code blocks, headings and link targets do not count, nor do cells of tables unless they are
as long as a sentence.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_WORDS = 30
MAX_SHARE = 0.10
MIN_CELL_WORDS = 8  # shorter cells are names and numbers

_BLOCK = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+|^>\s?")
_END = re.compile(r"(?<=[.!?])[\"')*_`]*\s+(?=[\"'(*_`\[]*[A-Z0-9`])")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|cf)\.$")


def pages() -> list[Path]:
    """Return the paths of all pages that users and contributors read."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def sentences(markdown: str) -> list[str]:
    """Return the sentences of a page, without markup."""
    text = _BLOCK.sub("\n\n", markdown)
    text = re.sub(r"<!--.*?-->|<[^>\s][^>]*>", " ", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", text)
    found: list[str] = []
    for paragraph in _paragraphs(text):
        parts = _END.split(paragraph)
        while parts:
            sentence = parts.pop(0)
            while parts and _ABBREVIATION.search(sentence):
                sentence += " " + parts.pop(0)
            found.append(sentence)
    return found


def _paragraphs(text: str) -> list[str]:
    """Return runs of prose: paragraphs, list items and long table cells."""
    paragraphs = [""]
    for line in text.splitlines():
        if line.lstrip().startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            paragraphs += [cell.strip() for cell in cells if words(cell) >= MIN_CELL_WORDS]
            paragraphs.append("")
        elif not line.strip() or line.startswith("#"):
            paragraphs.append("")
        elif _ITEM.match(line):
            paragraphs.append(_ITEM.sub("", line).strip())
        else:
            paragraphs[-1] = f"{paragraphs[-1]} {line.strip()}".strip()
    return [paragraph for paragraph in paragraphs if paragraph]


def words(sentence: str) -> int:
    """Return how many words a sentence has."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def long_sentences(markdown: str) -> tuple[list[str], float]:
    """Return the sentences above ``MAX_WORDS`` words, and their share of all sentences."""
    every = sentences(markdown)
    long = [sentence for sentence in every if words(sentence) > MAX_WORDS]
    return long, len(long) / max(len(every), 1)


def main() -> None:
    """Print the share of every page, and exit with 1 if one is too high."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="pages to read (default: all)")
    parser.add_argument("--list", action="store_true", help="print the long sentences")
    args = parser.parse_args()
    too_many = False
    for page in args.pages or pages():
        long, share = long_sentences(page.read_text("utf-8"))
        too_many |= share >= MAX_SHARE
        print(f"{share:6.1%}  {page.resolve().relative_to(ROOT)}")
        for sentence in long if args.list else ():
            print(f"        {words(sentence)}: {sentence}")
    raise SystemExit(too_many)


if __name__ == "__main__":
    main()

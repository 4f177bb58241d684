"""Long sentences are counted, and rare in what users read."""

from __future__ import annotations

import check_prose
import pytest


def sentence(words: int) -> str:
    return " ".join(["Word", *["word"] * (words - 1)]) + "."


def test_a_sentence_is_long_above_thirty_words() -> None:
    page = f"{sentence(30)} {sentence(31)}\n\n{sentence(5)} {sentence(6)}\n"
    assert check_prose.long_sentences(page) == ([sentence(31)], 0.25)


def test_code_headings_and_short_cells_do_not_count() -> None:
    page = f"# {sentence(40)}\n\n```sh\n{sentence(40)}\n```\n\n| a | b |\n|---|---|\n| c | d |\n"
    assert check_prose.sentences(page) == []


def test_list_items_and_long_cells_count_alone() -> None:
    page = f"- {sentence(20)}\n  {sentence(3)}\n- {sentence(20)}\n\n| {sentence(31)} | x |\n"
    assert [check_prose.words(text) for text in check_prose.sentences(page)] == [20, 3, 20, 31]


def test_a_line_break_does_not_end_a_sentence() -> None:
    page = sentence(31).replace("word word", "word\nword")
    assert len(check_prose.long_sentences(page)[0]) == 1


@pytest.mark.parametrize("page", check_prose.pages(), ids=lambda page: page.name)
def test_few_sentences_are_long(page: check_prose.Path) -> None:
    long, share = check_prose.long_sentences(page.read_text("utf-8"))
    assert share < check_prose.MAX_SHARE, long

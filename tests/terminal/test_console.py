from __future__ import annotations

import pytest
from support.terminal import on_a_terminal, screen

from extractor.terminal.console import MAX_OUTPUT_LINES, NAME_COLUMNS, table_lines

BAR = """
import contextlib, os, sys, time
from extractor.terminal.console import Bar
from extractor.report import Progress

with Bar(quiet=False) as bar:
    os.write(2, b"tiff: while loading\\n")
    bar.warn("RANDOM weights")
    time.sleep(0.2)
    for done in range({start}, 11):
        bar.update(Progress(done, 10, 1))
        os.write(2, b"tiff: bad strip %d\\n" % done)
        print("python says", done, file=sys.stderr)
    {more}
    with contextlib.suppress(BlockingIOError):
        os.write(2, b"tiff: the last line\\n")
os.write(2, b"after the bar\\n")
"""


def test_lines_of_libraries_do_not_tear_the_bar() -> None:
    lines = screen(on_a_terminal("-c", BAR.format(start=8, more="")))
    assert set(lines[:2]) == {"tiff: while loading", "extract: warning: RANDOM weights"}
    for done in (8, 9, 10):
        assert f"tiff: bad strip {done}" in lines
        assert f"python says {done}" in lines
    assert "tiff: the last line" in lines
    (bar,) = [line for line in lines if "img/s" in line or "10/10" in line]
    assert "10/10" in bar
    assert "failed=1" in bar
    assert not any("loading the model" in line for line in lines)
    assert lines.index("after the bar") > lines.index(bar)


def test_a_flood_of_lines_is_cut_and_does_not_block() -> None:
    """More than a pipe holds, written while nothing reads it."""
    flood = 'os.write(2, b"flood of lines\\n" * 200_000)'
    lines = screen(on_a_terminal("-c", BAR.format(start=10, more=flood)))
    assert 0 < lines.count("flood of lines") <= MAX_OUTPUT_LINES
    assert any("more messages of libraries not shown" in line for line in lines)


STATUS = """
from extractor.terminal.console import Bar
from extractor.report import Progress

with Bar(quiet=False, status="opening ...", unit="row") as bar:
    bar.warn("first")
    bar.show("training ...")
    bar.update(Progress(3, 10, 0))
    bar.show("measuring ...")
    bar.warn("second")
"""


def test_a_status_stands_in_place_of_the_bar() -> None:
    received = on_a_terminal("-c", STATUS)
    assert "opening ..." in received
    assert "training ..." in received
    assert "measuring ..." in received
    first, bar, second, *rest = screen(received)
    assert (first, second) == ("extract: warning: first", "extract: warning: second")
    assert "3/10" in bar
    assert "row/s" in bar
    assert "failed" not in bar
    assert not any(rest)


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_table_wraps_with_a_hanging_indent(width: int) -> None:
    words = "bound by the model: it embeds 14 images/s, 2 threads could decode 300"
    first, *rest = table_lines("time", words, width)
    assert first.startswith("time" + " " * (NAME_COLUMNS - 4))
    assert all(line.startswith(" " * NAME_COLUMNS) for line in rest)
    assert all(len(line) <= max(width, 40) for line in (first, *rest))
    assert " ".join(line[NAME_COLUMNS:] for line in (first, *rest)) == words


def test_a_long_path_is_not_broken() -> None:
    path = "features/" + "a" * 100
    assert any(path in line for line in table_lines("store", f"at {path}", 60))


def test_a_table_is_not_wrapped_without_a_terminal() -> None:
    (line,) = table_lines("time", "word " * 100, None)
    assert len(line) > 500

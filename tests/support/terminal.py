"""A terminal for a program, and what a person sees on it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading


def on_a_terminal(*words: str) -> str:
    """Return what a terminal receives on standard error of ``python WORDS``."""
    terminal, side = pty.openpty()
    received: list[bytes] = []

    def read() -> None:
        while True:
            try:
                piece = os.read(terminal, 4096)
            except OSError:
                return
            if not piece:
                return
            received.append(piece)

    reader = threading.Thread(target=read)
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=side
    ) as process:
        os.close(side)
        reader.start()
        assert process.wait(60) == 0
    reader.join()
    os.close(terminal)
    return b"".join(received).decode()


def screen(text: str) -> list[str]:
    """Return the lines that a terminal shows after a text, as far as the bar uses its controls."""
    lines = [""]
    column = 0
    text = text.replace("\x1b[A", "\x00").replace("\x1b[K", "\x01")
    row = 0
    for character in text:
        if character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif character == "\x00":
            row -= 1
        elif character == "\x01":
            lines[row] = lines[row][:column]
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + character + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]

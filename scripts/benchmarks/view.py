"""The page over many synthetic rows: first screen, scrolling, neighbors and memory.

python scripts/benchmarks/view.py PHOTOS WORK [--rows 1000000] [--dim 128]

Thumbnails are those of a few photos, decoded as the page would. Needs Playwright and Chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthetic import SyntheticImages, write_store

from extractor.reading.reader import FeatureStore
from extractor.view.collection import Collection, Image
from extractor.view.server import listen, serve
from extractor.view.thumbnails import Thumbnails

LOOK = """() => {
  const box = document.getElementById("grid").getBoundingClientRect();
  return [...document.querySelectorAll(".tile")].filter((tile) => {
    const at = tile.getBoundingClientRect();
    const isShown = at.bottom > box.top + 1 && at.top < box.bottom - 1;
    return isShown && !tile.matches(".ready, .missing");
  }).length;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    out = parsed.work / f"{parsed.rows}x{parsed.dim}"
    if parsed.serve:
        serve_page(parsed.photos, out)
        return
    if not out.exists():
        write_store(SyntheticImages(parsed.rows, parsed.dim, 65_536), out).publish()
    print(json.dumps(measure(parsed, out), indent=1))


def serve_page(photos: Path, out: Path) -> None:
    """Serve the page; each image of the store looks like one of a few photos."""
    from extractor import view_app

    files = sorted(photos.glob("*.JPEG"))[:64]
    decoded = Thumbnails._decoded

    def of_photo(self: Thumbnails, collection: Collection, image: Image, edge: int) -> Any:
        file = files[image.id % len(files)]
        status = file.stat()
        known: dict[str, Any] = {
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": b"",
        }
        shown: Any = _Folder(photos)
        return decoded(self, shown, replace(image, path=file.name, **known), edge)

    def is_unchanged(*_: Any) -> Any:
        os.stat(files[0])  # as the page looks at the file of each thumbnail
        return True

    Thumbnails._decoded = of_photo  # type: ignore[method-assign]
    setattr(Thumbnails, "is_unchanged", is_unchanged)  # noqa: B010
    listener = listen("127.0.0.1", 0)
    app = view_app(FeatureStore.open(out))
    serve(app, listener, lambda: print(listener.getsockname()[1], flush=True))


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def file_of(self, image: Image) -> Path:
        return self._folder / image.path


def measure(parsed: argparse.Namespace, out: Path) -> dict[str, Any]:
    shutil.rmtree(out / "derived" / ".thumbnails", ignore_errors=True)
    started = time.perf_counter()
    words = [sys.executable, __file__, str(parsed.photos), str(parsed.work), "--serve"]
    words += ["--rows", str(parsed.rows), "--dim", str(parsed.dim)]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = f"http://127.0.0.1:{server.stdout.readline().strip()}/"
        ready = time.perf_counter() - started
        found = {"server ready, s": round(ready, 2), **in_browser(address)}
        found = {**found, **memory(server.pid)}
        return {**found, "thumbnails kept": in_browser(address)}
    finally:
        server.terminate()


def in_browser(address: str) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1360, "height": 860})
        started = time.perf_counter()
        page.goto(address)
        page.wait_for_selector("html[data-ready]")
        while page.evaluate(LOOK):
            time.sleep(0.01)
        first = time.perf_counter() - started
        page.mouse.move(600, 500)
        wheel = [longest_hole(page, lambda: page.mouse.wheel(0, 240)) for _ in range(60)]
        back = [longest_hole(page, lambda: page.mouse.wheel(0, -240)) for _ in range(60)]
        height = page.evaluate("document.getElementById('grid').scrollHeight")
        jumps = []
        for part in (0.1, 0.9, 0.35, 0.72, 0.5):
            move = f"document.getElementById('grid').scrollTop = {part * height}"
            jumps.append(longest_hole(page, lambda move=move: page.evaluate(move)))
        page.evaluate(f"document.getElementById('grid').scrollTop = {height}")
        page.wait_for_timeout(600)
        last = page.evaluate(
            "Math.max(...[...document.querySelectorAll('.tile')].map((t) => +t.dataset.index))"
        )
        asked = """async (id) => {
          const start = performance.now();
          await (await fetch(`neighbors/0/${id}?k=24`)).json();
          return performance.now() - start;
        }"""
        neighbors = [page.evaluate(asked, number * 7919) for number in range(12)]
        filtered = page.evaluate(
            """async () => {
              const start = performance.now();
              await (await fetch("rows/0?filter=123*7.jpg")).json();
              return performance.now() - start;
            }"""
        )
        browser.close()
    return {
        "first screen, s": round(first, 2),
        "wheel, longest hole, ms": round(max(wheel)),
        "wheel, median of longest holes, ms": round(statistics.median(wheel)),
        "back, longest hole, ms": round(max(back)),
        "back, median of longest holes, ms": round(statistics.median(back)),
        "jumps, longest holes, ms": [round(jump) for jump in jumps],
        "last image": last,
        "neighbors, first and median, ms": [
            round(neighbors[0]),
            round(statistics.median(neighbors[1:])),
        ],
        "filter, ms": round(filtered),
    }


def longest_hole(page: Any, move: Any) -> float:
    """Return for how long tiles in the window had no picture after a move, in milliseconds."""
    move()
    started = time.perf_counter()
    last = started
    while time.perf_counter() - started < 0.15 or last > time.perf_counter() - 0.03:
        if page.evaluate(LOOK):
            last = time.perf_counter()
        time.sleep(0.004)
        if time.perf_counter() - started > 5:
            break
    return (last - started) * 1000


def memory(process: int) -> dict[str, int]:
    """Return the memory of a process in MB: its own, and with the files that it maps."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "VmRSS"):
                found[f"{name}, MB"] = int(value.split()[0]) // 1024
    return found


if __name__ == "__main__":
    main()

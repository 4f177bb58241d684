"""The page in a real browser: headless Chromium, where it is installed."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from support.pictures import noise

from extractor import export_page, extract

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
playwright = pytest.importorskip("playwright.sync_api")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

IMAGES = 180
SECONDS = 60
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 780}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``images`` in three folders, and the stores ``out`` and ``vit``."""
    folder = tmp_path_factory.mktemp("browser")
    for number in range(IMAGES):
        path = folder / "images" / "abc"[number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number, 60, 80).save(path)
    shutil.copy(folder / "images" / "a" / "000.jpg", folder / "images" / "c" / "copy.jpg")
    (folder / "images" / "broken.jpg").write_bytes(b"no image")
    for model, name in (("test_resnet", "out"), ("test_vit", "vit")):
        extract(folder / "images", model, folder / name, weights="random", device="cpu")
    return folder


@pytest.fixture(scope="module")
def address(shown: Path) -> Iterator[str]:
    words = ["view", shown / "out", shown / "vit", "--no-browser", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "extractor", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A new window; the test fails if the page raises an error or asks anyone else."""
    context = browser.new_context(viewport=WIDE, accept_downloads=True)
    window = context.new_page()
    problems: list[str] = []
    window.on("pageerror", lambda error: problems.append(str(error)))
    window.on(
        "console",
        lambda said: problems.append(said.text) if "Content Security" in said.text else None,
    )
    window.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("http://127.0.0.1:", "file:", "blob:", "data:"))
            else problems.append(request.url)
        ),
    )
    yield window
    context.close()
    assert problems == []


def opened(page: Any, address: str) -> Any:
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    return page


def until(page: Any, expression: str) -> None:
    """Wait until an expression is true. The page itself may evaluate no text."""
    deadline = time.monotonic() + SECONDS
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def shown_paths(page: Any) -> list[str]:
    """Paths of the tiles in the window."""
    paths: list[str] = page.evaluate(
        """() => {
          const box = document.getElementById("grid").getBoundingClientRect();
          return [...document.querySelectorAll(".tile[aria-label]")]
            .filter((tile) => {
              const at = tile.getBoundingClientRect();
              return at.bottom > box.top && at.top < box.bottom;
            })
            .sort((a, b) => a.dataset.index - b.dataset.index)
            .map((tile) => tile.getAttribute("aria-label"));
        }"""
    )
    return paths


def test_first_screen_shows_thumbnails_in_order(page: Any, address: str) -> None:
    opened(page, address)
    until(page, "document.querySelectorAll('.tile.ready').length > 20")
    paths = shown_paths(page)
    assert paths[:3] == ["a/000.jpg", "a/003.jpg", "a/006.jpg"]
    assert paths == sorted(paths)
    assert page.title() == "out · extract view"
    assert f"{IMAGES + 1} images" in page.inner_text("#facts")


def test_scrolling_shows_the_last_image(page: Any, address: str) -> None:
    opened(page, address)
    page.evaluate("document.getElementById('grid').scrollTop = 1e9")
    page.wait_for_selector(".tile[aria-label='c/copy.jpg'].ready")
    assert shown_paths(page)[-1] == "c/copy.jpg"
    assert len(page.query_selector_all(".tile")) < IMAGES - 40  # the others are no elements


def test_click_shows_neighbors_of_both_stores(page: Any, address: str) -> None:
    opened(page, address)
    page.click(".tile[aria-label='a/000.jpg']")
    page.wait_for_selector(".hit")
    assert page.inner_text("#detail h2") == "000.jpg"
    titles = [title.inner_text() for title in page.query_selector_all("#detail h3")]
    assert titles == ["Neighbors in out", "Neighbors in vit"]
    first = page.query_selector(".results section:first-child .hit")
    assert first.get_attribute("aria-label") == "c/copy.jpg, score 1.000, found by both"
    first.click()
    until(page, "document.querySelector('#detail h2').textContent === 'copy.jpg'")
    page.go_back()
    until(page, "document.querySelector('#detail h2').textContent === '000.jpg'")
    page.keyboard.press("Escape")
    assert page.is_hidden("#detail")


def test_keyboard_reaches_and_selects_images(page: Any, address: str, tmp_path: Path) -> None:
    opened(page, address)
    page.focus("#grid")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    active = page.get_attribute("#grid", "aria-activedescendant")
    assert page.get_attribute(f"#{active}", "aria-label") == "a/006.jpg"
    page.keyboard.press("Space")
    assert page.get_attribute(f"#{active}", "aria-selected") == "true"
    page.keyboard.press("Shift+ArrowRight")
    assert page.inner_text("#selected-count") == "2 selected"
    page.keyboard.press("End")
    page.wait_for_selector(".tile.current[aria-label='c/copy.jpg']")
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.wait_for_selector(".hit")
    assert page.evaluate("document.activeElement.textContent") == "000.jpg"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "grid"
    with page.expect_download() as download:
        page.click("#selected-save")
    download.value.save_as(tmp_path / "list.txt")
    names = [os.path.basename(line) for line in (tmp_path / "list.txt").read_text().splitlines()]
    assert names == ["006.jpg", "009.jpg"]


def test_slash_leads_to_the_filter(page: Any, address: str) -> None:
    opened(page, address)
    page.keyboard.press("/")
    page.keyboard.type("b/1*1")
    expected = [f"b/{n:03d}.jpg" for n in range(1, IMAGES, 3) if f"{n:03d}".startswith("1")]
    expected = [path for path in expected if "1" in path[3:-4]]
    # A slow machine asks for parts of the text, too.
    until(page, f"document.getElementById('count').textContent.startsWith('{len(expected)} of ')")
    page.wait_for_selector(f".tile[aria-label='{expected[0]}']")
    assert shown_paths(page) == expected
    page.fill("#filter", "")
    page.wait_for_selector(".tile[aria-label='a/000.jpg']")


def test_dropped_and_pasted_images_are_searched_by(page: Any, address: str, shown: Path) -> None:
    opened(page, address)
    content = (shown / "images" / "b" / "001.jpg").read_bytes()
    for kind in ("drop", "paste"):
        page.evaluate(
            """([kind, bytes]) => {
              const data = new DataTransfer();
              const content = new Uint8Array(bytes);
              data.items.add(new File([content], kind + ".jpg", { type: "image/jpeg" }));
              const event = kind === "drop"
                ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
              document.body.dispatchEvent(event);
            }""",
            [kind, list(content)],
        )
        until(page, f"document.querySelector('#detail h2')?.textContent === '{kind}.jpg'")
        page.wait_for_selector(".hit", timeout=SECONDS * 1000)
        label = page.get_attribute(".hit", "aria-label")
        assert label.startswith("b/001.jpg, score 1.000")
    page.set_input_files("#file", str(shown / "images" / "broken.jpg"))
    page.wait_for_selector(".results .problem")
    assert "no image format matches" in page.inner_text(".results .problem")


def test_map_opens_images_and_a_lasso_selects_them(page: Any, address: str) -> None:
    opened(page, address)
    page.click("#tab-map")
    page.wait_for_selector(".map canvas")
    assert page.inner_text(".legend").split() == ["c", "a", "b"]
    page.wait_for_timeout(300)
    box = page.query_selector(".map canvas").bounding_box()
    left, top, right, bottom = (
        box["x"] + 5,
        box["y"] + 5,
        box["x"] + box["width"] - 5,
        box["y"] + box["height"] - 5,
    )
    page.click("text=Lasso")
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom)):
        page.mouse.move(x, y, steps=4)
    page.mouse.up()
    assert page.inner_text("#selected-count") == f"{IMAGES + 1} selected"
    page.click("#selected-clear")
    page.click("text=Lasso")
    page.focus(".map canvas")
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    page.wait_for_selector(".hit")
    page.keyboard.press("Escape")
    for _ in range(12):
        page.mouse.wheel(0, -300)
    page.wait_for_timeout(200)
    page.click("text=List what is in view")
    page.wait_for_selector("#count button")
    assert len(shown_paths(page)) <= IMAGES


def test_lists_show_duplicates_outliers_and_failures(page: Any, address: str) -> None:
    opened(page, address)
    page.click("#tab-duplicates")
    page.wait_for_selector("#duplicates .group")
    page.select_option("#duplicates select", "100")
    until(page, "document.querySelectorAll('#duplicates .group').length === 1")
    page.click("text=Select all but the first")
    assert page.inner_text("#selected-count") == "1 selected"
    marked = [hit.get_attribute("aria-pressed") for hit in page.query_selector_all(".group .hit")]
    assert marked == ["false", "true"]
    page.focus("#duplicates .group .hit >> nth=1")
    page.keyboard.press("Enter")
    page.wait_for_selector("#detail .hit")
    page.keyboard.press("Escape")  # back to where the keyboard was
    assert page.evaluate("document.activeElement.title") == "c/copy.jpg"
    page.click("#tab-outliers")
    page.wait_for_selector("#outliers .hit")
    page.click("#tab-failures")
    page.wait_for_selector("#failures td")
    assert page.inner_text("#failures td") == "broken.jpg"
    page.focus("#tab-failures")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#tab-images", "aria-selected") == "true"


def test_duplicates_of_the_other_store_are_shown_if_both_have_one_backbone(
    page: Any, address: str
) -> None:
    def comparable(route: Any) -> None:
        state = route.fetch().json()
        for store in state["stores"]:
            store["comparable"] = True
        route.fulfill(json=state)

    opened(page, address)
    page.click("#tab-duplicates")
    page.wait_for_selector("#duplicates .group")
    assert page.query_selector("select[aria-label='Where duplicates are']") is None
    images = [[0, "a/000.jpg", 80, 60, 1.0, False], [1, "a/003.jpg", 80, 60, 0.99, True]]
    near = {"kind": "near", "omitted": 0, "images": images}
    content = {"total": 1, "redundant": 1, "method": "exact", "recall": None, "groups": [near]}
    page.route("**/state", comparable)
    page.route("**/duplicates/0?*against=1", lambda route: route.fulfill(json=content))
    opened(page, address)
    page.click("#tab-duplicates")
    page.select_option("select[aria-label='Where duplicates are']", "yes")
    page.wait_for_selector("#duplicates h3:has-text('Nearly the same as 1 image of vit')")
    assert "1 image of out also in vit" in page.inner_text("#duplicates .facts")
    sources = [picture.get_attribute("src") for picture in page.query_selector_all(".group img")]
    assert sources == ["thumbnail/0/0", "thumbnail/1/1"]
    page.click("text=Select the first of each shown group")
    marked = [hit.get_attribute("aria-pressed") for hit in page.query_selector_all(".group .hit")]
    assert marked == ["true", "false"]
    page.unroute_all(behavior="wait")


def test_stores_are_switched(page: Any, address: str) -> None:
    opened(page, address)
    page.click("#stores button >> nth=1")
    until(page, "document.title.startsWith('vit')")
    assert page.get_attribute("#stores button >> nth=1", "aria-pressed") == "true"
    until(page, "document.querySelectorAll('.tile.ready').length > 10")


def test_an_answer_about_a_store_that_is_no_longer_shown_is_dropped(
    page: Any, address: str
) -> None:
    held: list[Any] = []
    opened(page, address)
    page.route("**/duplicates/0?*", lambda route: held.append(route))
    page.click("#tab-duplicates")
    page.click("#stores button >> nth=1")
    page.wait_for_selector("#duplicates .group")
    images = [[0, "late.jpg", 8, 8, None], [1, "later.jpg", 8, 8, 0.99]]
    late = {"kind": "near", "omitted": 0, "images": images}
    content = {"total": 1, "redundant": 1, "method": "exact", "recall": None, "groups": [late]}
    held[0].fulfill(json=content)
    page.wait_for_timeout(300)
    assert page.query_selector("#duplicates .hit[title='late.jpg']") is None


def test_selection_ends_with_the_store(page: Any, address: str) -> None:
    def anew(route: Any) -> None:
        state = route.fetch().json()
        state["stores"][0]["anew"] += 1
        route.fulfill(json=state)

    opened(page, address)
    page.focus("#grid")
    page.keyboard.press("Space")
    page.wait_for_selector("#selected-count:has-text('1 selected')")
    page.route("**/state", anew)
    until(page, "document.getElementById('selected').hidden")
    page.unroute_all(behavior="wait")


def test_a_range_holds_images_that_were_never_in_the_window(page: Any, address: str) -> None:
    def rows(route: Any) -> None:
        start = int(parse_qs(urlsplit(route.request.url).query)["start"][0])
        images = [[n, f"{n}.jpg", 8, 8] for n in range(start, min(start + 240, 1000))]
        route.fulfill(json={"total": 1000, "start": start, "images": images})

    page.route("**/rows/0?*", rows)
    opened(page, address)
    page.focus("#grid")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+End")
    until(page, "document.getElementById('selected-count').textContent === '999 selected'")


def test_images_that_moved_have_a_placeholder_and_are_counted(
    page: Any, shown: Path, tmp_path: Path
) -> None:
    shutil.copytree(shown / "images", tmp_path / "images")
    shutil.copytree(shown / "out", tmp_path / "out", ignore=shutil.ignore_patterns("derived"))
    for number in (0, 3):
        (tmp_path / "images" / "a" / f"{number:03d}.jpg").unlink()
    words = ["view", tmp_path / "out", "--root", tmp_path / "images", "--no-browser", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "extractor", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        opened(page, process.stdout.readline().strip())
        page.wait_for_selector(".tile.missing")
        until(page, "document.querySelector('#notices p') !== null")
        assert page.inner_text("#notices p").startswith("2 images moved or changed")
        page.click("#notices button")
        page.wait_for_selector("#failures td")
        assert page.inner_text("#failures td") == "a/000.jpg"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(SECONDS)


@pytest.mark.parametrize(
    ("scheme", "size"), [("light", PHONE), ("dark", WIDE)], ids=["light phone", "dark wide"]
)
def test_page_fits_the_window(browser: Any, address: str, scheme: str, size: Any) -> None:
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page = opened(context.new_page(), address)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= size["width"]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    level = sum(int(part) for part in ground[4:-1].split(",")) / 3
    assert (level > 200) is (scheme == "light")
    page.click(".tile[aria-label='a/003.jpg']")
    page.wait_for_selector(".hit")
    panel = page.query_selector("#detail").bounding_box()
    assert panel["x"] >= 0
    assert panel["x"] + panel["width"] <= size["width"] + 1
    context.close()


@pytest.mark.parametrize("by", ["file", "server"])
def test_exported_page_works_without_the_program(
    page: Any, shown: Path, tmp_path: Path, by: str
) -> None:
    export_page(shown / "out", tmp_path / "site", shown / "vit")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "site")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    http_address = f"http://127.0.0.1:{server.server_port}/index.html"
    file_address = (tmp_path / "site" / "index.html").as_uri()
    opened(page, file_address if by == "file" else http_address)
    until(page, "document.querySelectorAll('.tile.ready').length > 20")
    page.click(".tile[aria-label='a/000.jpg']")
    page.wait_for_selector(".hit")
    assert page.get_attribute(".hit", "aria-label").startswith("c/copy.jpg, score 1.000")
    assert page.is_hidden("#choose")
    page.keyboard.press("Escape")
    page.fill("#filter", "COPY")
    page.wait_for_selector(".tile[aria-label='c/copy.jpg']")
    page.click("#tab-map")
    page.wait_for_selector(".map canvas")
    page.click("#tab-duplicates")
    page.wait_for_selector("#duplicates .group")
    page.click("text=Select all but the first")
    with page.expect_download() as download:
        page.click("#selected-save")
    download.value.save_as(tmp_path / "list.txt")
    assert "c/copy.jpg" in (tmp_path / "list.txt").read_text().splitlines()
    server.shutdown()

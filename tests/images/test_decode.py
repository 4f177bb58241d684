"""Every image comes out as people see it, or fails with a reason."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from support.images import (
    EXIF_KINDS,
    MEAN,
    STD,
    decode_into,
    encoded,
    furthest,
    photo,
    pixels,
    png,
    reason,
    turned,
    unresized,
)

from extractor.errors import DecodeError
from extractor.images import decode, files
from extractor.images.budget import PixelBudget
from extractor.images.jpeg import JPEG_END
from extractor.images.types import EncodedImage, ImageInfo
from extractor.preprocess import Preprocess


@pytest.mark.parametrize("scale", [1, 8])
def test_jpeg_without_end_marker_is_decoded_despite_trailing_data(
    tmp_path: Path, scale: int
) -> None:
    content = encoded(photo(400 * scale, 300 * scale), "JPEG", quality=90)
    assert content.endswith(JPEG_END)
    noise = np.random.default_rng(0).integers(0, 256, 2**16, np.uint8).tobytes()
    path = tmp_path / "a.jpg"
    path.write_bytes(content[:-2] + bytes(2**16) + noise)
    expected, preprocess = np.empty((64, 64, 3), np.uint8), Preprocess.standard(64)
    decode_into(EncodedImage(content), preprocess, expected)
    for source in (path, EncodedImage(path.read_bytes())):
        out = np.zeros_like(expected)
        decode_into(source, preprocess, out)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_only_the_budget_limits_pixels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data, out = EncodedImage(encoded(photo(24, 16), kind)), np.zeros((8, 8, 3), np.uint8)
    assert decode_into(data, unresized(8, 8), out).width == 24
    decode.decode_into(data, [unresized(8, 8)], [out], PixelBudget(24 * 16))
    with pytest.raises(DecodeError, match=r"exceeds limit|the limit is") as caught:
        decode.decode_into(data, [unresized(8, 8)], [out], PixelBudget(24 * 16 - 1))
    assert caught.value.reason == "too-large"
    assert Image.MAX_IMAGE_PIXELS == 10


class TestAnimation:
    COLORS = ((250, 10, 20), (10, 250, 20), (10, 20, 250))

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
    def test_animations_give_their_first_frame(self, kind: str) -> None:
        first, *others = (Image.new("RGB", (16, 16), color) for color in self.COLORS)
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(first, kind, save_all=True, append_images=others, **options)
        with Image.open(io.BytesIO(data)) as image:
            assert getattr(image, "n_frames", 1) == 3
        out = pixels(EncodedImage(data), 16, 16)
        tolerance = 3 if kind == "MPO" else 0  # its frames are JPEG
        assert furthest(out, np.broadcast_to(self.COLORS[0], out.shape)) <= tolerance


class TestSources:
    """The source of an image does not change its pixels."""

    RGB = np.asarray(photo(20, 12, seed=4))

    def test_gray_arrays_become_rgb(self) -> None:
        gray = self.RGB[:, :, 0]
        expected = np.repeat(gray[:, :, None], 3, axis=2)
        assert np.array_equal(pixels(gray, 20, 12), expected)
        assert np.array_equal(pixels(gray[:, :, None], 20, 12), expected)

    def test_color_arrays_keep_their_colors(self) -> None:
        assert np.array_equal(pixels(self.RGB, 20, 12), self.RGB)
        alpha = np.full((12, 20, 1), 9, np.uint8)
        assert np.array_equal(pixels(np.concatenate([self.RGB, alpha], 2), 20, 12), self.RGB)

    def test_memory_layout_of_arrays_is_ignored(self) -> None:
        assert np.array_equal(
            pixels(self.RGB[::-1, ::-1, ::-1], 20, 12), self.RGB[::-1, ::-1, ::-1]
        )
        channels_first = np.ascontiguousarray(self.RGB.transpose(2, 0, 1)).transpose(1, 2, 0)
        assert np.array_equal(pixels(channels_first, 20, 12), self.RGB)

    def test_arrays_are_not_modified(self) -> None:
        array = self.RGB.copy()
        array.flags.writeable = False
        pixels(array, 20, 12)
        assert np.array_equal(array, self.RGB)

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((4, 4, 3), np.float32),
            np.zeros((4, 4, 3), np.int64),
            np.zeros((4, 4, 3), bool),
            np.zeros((4, 4, 2), np.uint8),
            np.zeros((3, 4, 4, 3), np.uint8),
            np.zeros((3, 4, 5), np.uint8),
            np.zeros(4, np.uint8),
            np.zeros((0, 4, 3), np.uint8),
            np.zeros((4, 0), np.uint8),
            np.zeros((), np.uint8),
        ],
        ids=lambda array: f"{array.dtype}-{array.shape}",
    )
    def test_other_arrays_are_refused(self, array: Any) -> None:
        with pytest.raises(DecodeError, match=r"expected .* got ") as caught:
            decode_into(array, unresized(4, 4), np.zeros((4, 4, 3), np.uint8))
        assert caught.value.reason == "not-an-image"

    def test_all_kinds_of_sources_give_the_same_pixels(self, tmp_path: Path) -> None:
        data = encoded(Image.fromarray(self.RGB), "PNG")
        path = tmp_path / "a.png"
        path.write_bytes(data)
        opened = Image.open(io.BytesIO(data))  # not loaded yet
        for source in (path, str(path), os.fsencode(path), EncodedImage(data), opened, self.RGB):
            assert np.array_equal(pixels(source, 20, 12), self.RGB)

    def test_file_names_need_not_be_text(self, tmp_path: Path) -> None:
        path = os.fsencode(tmp_path) + b"/\xff\xfe \n.png"
        try:
            with open(path, "wb") as file:
                file.write(encoded(Image.fromarray(self.RGB), "PNG"))
        except OSError:
            pytest.skip("the file system takes only UTF-8 names")
        assert np.array_equal(pixels(path, 20, 12), self.RGB)
        assert np.array_equal(pixels(os.fsdecode(path), 20, 12), self.RGB)

    def test_content_decides_the_format_not_the_suffix(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(encoded(Image.fromarray(self.RGB), "PNG"))
        assert np.array_equal(pixels(path, 20, 12), self.RGB)

    def test_pil_images_are_not_modified(self) -> None:
        image = Image.fromarray(self.RGB).convert("L")
        image.getexif()[0x0112] = 6
        before = image.tobytes()
        assert pixels(image, 12, 20).any()  # turned
        assert (image.mode, image.size, image.tobytes()) == ("L", (20, 12), before)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
    def test_large_files_give_the_same_pixels(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        path = tmp_path / "a"
        path.write_bytes(encoded(Image.fromarray(self.RGB), kind))
        expected = pixels(path, 20, 12)
        monkeypatch.setattr(files, "READ_WHOLE_BYTES", 0)
        assert np.array_equal(pixels(path, 20, 12), expected)

    def test_rows_of_a_batch_are_written_in_place(self) -> None:
        batch = np.full((3, 12, 20, 3), 7, np.uint8)
        decode_into(self.RGB, unresized(20, 12), batch[1])
        assert np.array_equal(batch[1], self.RGB)
        assert (batch[[0, 2]] == 7).all()


class TestInfo:
    def test_paths_give_size_time_and_digest(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(encoded(photo(30, 20), "PNG"))
        os.utime(path, ns=(1, 1_600_000_000_123_456_789))
        status = path.stat()
        out = np.zeros((8, 8, 3), np.uint8)
        info = decode_into(path, unresized(8, 8), out)
        digest = hashlib.sha256(path.read_bytes()).digest()
        assert info == ImageInfo(status.st_size, status.st_mtime_ns, 30, 20, digest)

    def test_links_give_size_and_time_of_their_target(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(encoded(photo(30, 20), "PNG"))
        (tmp_path / "link.png").symlink_to(path)
        info = decode_into(tmp_path / "link.png", unresized(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert (info.size, info.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)

    def test_encoded_images_have_a_size_and_no_time(self) -> None:
        data = encoded(photo(30, 20), "PNG")
        info = decode_into(EncodedImage(data), unresized(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert info == ImageInfo(len(data), -1, 30, 20)

    def test_decoded_images_have_no_size_and_no_time(self) -> None:
        for source in (photo(30, 20), np.asarray(photo(30, 20))):
            info = decode_into(source, unresized(8, 8), np.zeros((8, 8, 3), np.uint8))
            assert info == ImageInfo(-1, -1, 30, 20)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", EXIF_KINDS)
    def test_width_and_height_are_those_of_the_upright_image(
        self, kind: str, orientation: int
    ) -> None:
        data = turned(photo(30, 20), kind, orientation)
        info = decode_into(EncodedImage(data), unresized(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert (info.width, info.height) == ((30, 20) if orientation < 5 else (20, 30))


class TestPadding:
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_padding_overwrites_the_previous_picture(self, orientation: int) -> None:
        preprocess = Preprocess((40, 40), "contain", (40, 40), "bicubic", MEAN, STD, (12, 200, 77))
        data = turned(Image.new("RGB", (80, 40), (1, 2, 3)), "PNG", orientation)
        out = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
        decode_into(EncodedImage(data), preprocess, out)
        expected = np.empty((40, 40, 3), np.uint8)
        expected[:] = (12, 200, 77)
        expected[10:30] = (1, 2, 3)
        assert np.array_equal(out, expected if orientation == 1 else expected.swapaxes(0, 1))


class TestFailures:
    @pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99])
    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    def test_cut_files_are_truncated(self, tmp_path: Path, kind: str, share: float) -> None:
        grain = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        data = encoded(Image.fromarray(grain), kind)
        path = tmp_path / "a"
        path.write_bytes(data[: int(len(data) * share)])
        assert reason(path) == "truncated"
        assert reason(EncodedImage(path.read_bytes())) == "truncated"

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
    def test_files_cut_anywhere_fail(self, kind: str) -> None:
        grain = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
        data = encoded(Image.fromarray(grain), kind)
        for length in np.linspace(0, len(data) * 0.9, 40).astype(int):
            assert reason(EncodedImage(data[:length])) in {
                "empty",
                "not-an-image",
                "truncated",
                "corrupt",
            }

    @pytest.mark.parametrize(
        "content", [b"some text\n", b"<html>not found</html>", b"\0" * 100, b"x", b"\xff\xd8"]
    )
    def test_other_content_is_not_an_image(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(content)
        assert reason(path) == "not-an-image"
        assert reason(EncodedImage(content)) == "not-an-image"

    def test_message_shows_the_first_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(b"<html>not found</html>")
        with pytest.raises(DecodeError, match=r"no image format .* starts with b'<html>not"):
            decode_into(path, unresized(8, 8), np.zeros((8, 8, 3), np.uint8))

    def test_empty_files_are_empty(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.touch()
        assert reason(path) == "empty"
        assert reason(EncodedImage(b"")) == "empty"

    def test_missing_files_are_unreadable(self, tmp_path: Path) -> None:
        for path in (tmp_path / "gone.jpg", str(tmp_path / "gone.jpg"), b"/no/such/file.jpg", ""):
            with pytest.raises(DecodeError, match="No such file or directory") as caught:
                decode_into(path, unresized(8, 8), np.zeros((8, 8, 3), np.uint8))
            assert caught.value.reason == "unreadable"

    def test_circular_and_dangling_links_are_unreadable(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").symlink_to("a.jpg")
        (tmp_path / "b.jpg").symlink_to("gone.jpg")
        assert reason(tmp_path / "a.jpg") == "unreadable"
        assert reason(tmp_path / "b.jpg") == "unreadable"

    def test_impossible_paths_are_unreadable(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").touch()
        assert reason(tmp_path / "a.jpg/b.jpg") == "unreadable"
        assert reason(tmp_path / ("a" * 300)) == "unreadable"

    def test_paths_with_a_zero_byte_are_unreadable(self, tmp_path: Path) -> None:
        assert reason(os.fsencode(tmp_path) + b"/a\0.jpg") == "unreadable"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_forbidden_files_are_unreadable(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        path.write_bytes(encoded(photo(8, 8), "JPEG"))
        path.chmod(0)
        with pytest.raises(DecodeError, match="Permission denied") as caught:
            decode_into(path, unresized(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert caught.value.reason == "unreadable"

    @pytest.mark.usefixtures("fail_if_stuck")
    def test_pipes_are_not_a_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.jpg")
        assert reason(tmp_path / "a.jpg") == "not-a-file"
        (tmp_path / "b.jpg").symlink_to("a.jpg")
        with pytest.raises(DecodeError, match="expected a regular file, got a pipe"):
            decode_into(tmp_path / "b.jpg", unresized(8, 8), np.zeros((8, 8, 3), np.uint8))

    @pytest.mark.usefixtures("fail_if_stuck")
    def test_devices_are_not_a_file(self) -> None:
        with pytest.raises(DecodeError, match="expected a regular file, got a device") as caught:
            decode_into("/dev/null", unresized(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert caught.value.reason == "not-a-file"

    def test_folders_are_not_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(DecodeError, match="expected a regular file, got a folder") as caught:
            decode_into(tmp_path, unresized(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert caught.value.reason == "not-a-file"

    @pytest.mark.usefixtures("fail_if_stuck")
    def test_sockets_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)  # names of sockets must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("a.jpg")
            assert reason("a.jpg") in {"not-a-file", "unreadable"}

    def test_eps_is_refused_without_starting_a_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started: list[object] = []

        def start(*args: object, **_: object) -> None:
            started.append(args)
            raise OSError("not started")

        monkeypatch.setattr(subprocess, "Popen", start)
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
        data = encoded(photo(16, 16), "EPS")
        with Image.open(io.BytesIO(data)) as image, pytest.raises(OSError, match="not started"):
            image.load()  # this is what Pillow would do
        assert started
        started.clear()
        for name in ("a.eps", "a.jpg"):
            (tmp_path / name).write_bytes(data)
            assert reason(tmp_path / name) == "not-an-image"
        assert reason(EncodedImage(data)) == "not-an-image"
        assert not started

    @pytest.mark.filterwarnings("ignore")
    def test_too_many_pixels_are_too_large(self) -> None:
        assert reason(EncodedImage(png((60_000, 60_000), b""))) == "too-large"

    def test_lack_of_memory_has_its_own_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object, **__: object) -> None:
            raise MemoryError

        image = photo(9, 9)
        monkeypatch.setattr("extractor.images.resize.resize", full)
        assert reason(image) == "out-of-memory"

    def test_disk_errors_are_unreadable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Failing(io.FileIO):
            def read(self, *_: object) -> bytes:
                raise OSError(5, "Input/output error")

        path = tmp_path / "a.jpg"
        path.write_bytes(encoded(photo(8, 8), "JPEG"))
        monkeypatch.setattr(os, "fdopen", lambda descriptor, mode: Failing(descriptor, mode))
        with pytest.raises(DecodeError, match="Input/output error") as caught:
            decode_into(path, unresized(8, 8), np.zeros((8, 8, 3), np.uint8))
        assert caught.value.reason == "unreadable"

    @pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of open files")
    def test_files_are_closed(self, tmp_path: Path) -> None:
        good, bad, cut = (tmp_path / name for name in ("good", "bad", "cut"))
        data = encoded(photo(40, 40), "JPEG")
        good.write_bytes(data)
        bad.write_bytes(b"text")
        cut.write_bytes(data[: len(data) // 2])
        out = np.zeros((8, 8, 3), np.uint8)
        before = os.listdir("/proc/self/fd")
        caught = []  # an error that is kept must not keep its file
        for path in (good, bad, cut, tmp_path):
            try:
                decode_into(path, unresized(8, 8), out)
            except DecodeError as error:
                caught.append(error)
        assert len(caught) == 3
        assert len(os.listdir("/proc/self/fd")) == len(before)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
    def test_random_changes_raise_only_decode_errors(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
        budget = PixelBudget(500_000)  # broken sizes cost no time
        good = encoded(photo(24, 17), kind)
        random = np.random.default_rng(0)
        out = np.zeros((8, 8, 3), np.uint8)
        errors = []
        for _ in range(120):
            data = bytearray(good)
            # Half of the changes go to the head, where sizes and offsets are.
            head = int(random.choice([min(64, len(data)), len(data)]))
            for index in random.integers(0, head, random.integers(1, 5)):
                data[index] = random.integers(256)
            if random.random() < 0.2:
                del data[random.integers(len(data)) :]
            try:
                decode.decode_into(EncodedImage(bytes(data)), [unresized(8, 8)], [out], budget)
            except DecodeError as error:
                errors.append(error)
        assert len(errors) > 10  # else the changes were too kind to show anything
        assert all(error.reason and str(error) for error in errors)


class TestCallers:
    @pytest.mark.parametrize("shape", [(5, 5, 3), (8, 6), (6, 8, 3), (8, 6, 4)])
    def test_out_of_the_wrong_shape_is_a_value_error(self, shape: tuple[int, ...]) -> None:
        preprocess = Preprocess((8, 6), "squash", (8, 6), "box", (0, 0, 0), (1, 1, 1))
        with pytest.raises(ValueError, match=r"out: got uint8 .* expected uint8 \(8, 6, 3\)"):
            decode_into(np.zeros((4, 4), np.uint8), preprocess, np.zeros(shape, np.uint8))

    def test_source_of_another_type_is_a_type_error(self) -> None:
        preprocess = Preprocess((8, 6), "squash", (8, 6), "box", (0, 0, 0), (1, 1, 1))
        with pytest.raises(TypeError, match="source: got NoneType"):
            decode_into(None, preprocess, np.zeros((8, 6, 3), np.uint8))  # type: ignore[arg-type]

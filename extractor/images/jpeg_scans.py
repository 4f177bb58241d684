"""JPEGs whose scans end early: libjpeg fills the rest with gray, and Pillow hides its warning.

A JPEG stores its picture in one or more scans of Huffman codes (ITU-T T.81). The decoder of this
module gives libjpeg one scan after the other, without the marker that follows. If libjpeg then
waits for the next scan, this scan was whole. If it waits for more codes, data are missing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, _imaging

from extractor.errors import DecodeError

__all__ = ["FRAMES", "SEQUENTIAL_FRAMES", "check_scans", "find_scans"]

# Markers (ITU-T T.81, table B.1).
FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
SEQUENTIAL_FRAMES, PROGRESSIVE_FRAME = frozenset({0xC0, 0xC1}), 0xC2
HUFFMAN_FRAMES = SEQUENTIAL_FRAMES | {PROGRESSIVE_FRAME}
RESTART, IMAGE_START, IMAGE_END, SCAN, RESTART_INTERVAL = 0xD0, 0xD8, 0xD9, 0xDA, 0xDD
# Codes behind 0xff that start no segment.
NO_MARKERS = frozenset({0x00, 0x01, 0xFF, *range(RESTART, RESTART + 8)})
SHORTEST_SCAN = 16  # bytes, with its header and the end marker
NO_SINGLE_SCAN = FRAMES | NO_MARKERS | {IMAGE_START, IMAGE_END, RESTART_INTERVAL}
END = bytes((0xFF, IMAGE_END))
MARKER = re.compile(rb"\xff[^\x00\xff]")
COEFFICIENTS = 64  # of a block

# A stuffed 0xff: eight 1 bits inside a scan, nothing between two scans. libjpeg fetches up to eight
# bytes in advance. No Huffman code has 1 bits only.
STUFFED = b"\xff\x00"
AHEAD = STUFFED * 8

# Data that cannot be codes, if no marker follows: text, as of a web page, and a hole in the file.
NO_CODES = re.compile(rb"[\t\n\r\x20-\x7e]{64}|\0{512}")
MIN_TEXT_CHARACTERS = 12  # different ones; a flat area repeats fewer bytes

# Largest part of a file that is read, beyond these bytes per pixel. Trailing data stay unread.
MAX_BYTES, MAX_BYTES_PER_PIXEL = 64 * 2**20, 4


class Scan(NamedTuple):
    """End of the codes of a scan in the file, and number of restart markers among them.

    ``restarts`` is None if the scan has no restart interval.
    """

    end: int
    restarts: int | None


@dataclass
class Scans:
    """The scans of a JPEG in the order of the file.

    Attributes:
        ends: Where each of them ends.
        is_ended: Whether an end marker follows, or other data.
        is_in_order: Whether no restart interval is left out.
        missing_bits: For each component ``(64,)``, the low bits of each coefficient that no scan
            has; 255 if no scan has the coefficient.
    """

    ends: list[Scan] = field(default_factory=list)
    is_ended: bool = False
    is_in_order: bool = True
    missing_bits: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether no scan is missing, as far as the markers tell."""
        has_all = not any(bits.any() for bits in self.missing_bits.values())
        return bool(self.ends) and self.is_ended and self.is_in_order and has_all


def check_scans(image: Image.Image) -> None:
    """Let an image that libjpeg decodes raise ``DecodeError`` on loading if its data end early."""
    if isinstance(image, ImageFile.ImageFile):
        image.tile = [
            ImageFile._Tile(CODEC, *tile[1:]) if tile[0] == "jpeg" else tile for tile in image.tile
        ]


def has_single_scan(content: bytes) -> bool:
    """Return whether a JPEG seems to be one sequential scan from its header to its last marker.

    Codes are not read, so another marker may still end the scan early.
    """
    if not content.endswith(END):
        return False
    components, offset = 0, 2
    while offset < len(content) - SHORTEST_SCAN and content[offset] == 0xFF:
        marker, start = content[offset + 1], offset + 2
        if marker == SCAN:
            return content[start + 2] == components
        if marker in SEQUENTIAL_FRAMES:
            components = content[start + 7]
        elif marker in NO_SINGLE_SCAN:
            return False
        offset = start + (content[start] << 8 | content[start + 1])
    return False


def find_scans(content: bytes) -> Scans | None:
    """Return the scans of a JPEG, or None if they are not made of Huffman codes.

    Args:
        content: The file from its first marker on.
    """
    finder = _ScanFinder(content)
    with contextlib.suppress(IndexError, KeyError, ValueError):  # a broken segment ends the walk
        finder.walk()
    scans = finder.scans
    if not scans.missing_bits:
        return None
    if scans.ends and not scans.is_ended:
        finder.leave_out_other_data()
        scans.is_ended = scans.ends[-1].end < len(content)
    return scans


class _ScanFinder:
    """Walks over the markers of a JPEG; see :func:`find_scans`."""

    def __init__(self, content: bytes) -> None:
        self.scans = Scans()
        self._content = content
        self._interval = 0
        self._is_progressive = False
        self._start = 0  # of the codes of the last scan
        self._markers: npt.NDArray[np.intp] | None = None

    def walk(self) -> None:
        """Walk to the end marker, or until something follows that is no part of the picture."""
        content, offset, is_in_scan = self._content, 2, True
        while is_in_scan:
            is_in_scan = False
            for marker, start in _segments(content, offset):
                if marker == IMAGE_END:
                    self.scans.is_ended = True
                elif marker in HUFFMAN_FRAMES and not self.scans.missing_bits:
                    self._read_frame(start)
                    self._is_progressive = marker == PROGRESSIVE_FRAME
                elif marker in FRAMES or marker == IMAGE_START:
                    return
                elif marker == RESTART_INTERVAL:
                    self._interval = _number(content, start + 2)
                elif marker == SCAN:
                    self._read_scan(start)
                    offset = self._skip_codes(start + _number(content, start))
                    is_in_scan = True

    def leave_out_other_data(self) -> None:
        """End the last scan before data that cannot be codes."""
        end, restarts = self.scans.ends[-1]
        for found in NO_CODES.finditer(self._content, self._start, end):
            if len(set(found[0])) not in range(2, MIN_TEXT_CHARACTERS):
                # The last bytes of the codes may look like the other data.
                self.scans.ends[-1] = Scan(min(found.start() + len(AHEAD) // 2, end), restarts)
                return

    def _read_frame(self, offset: int) -> None:
        first = offset + 8
        for component in self._content[first : first + 3 * self._content[first - 1] : 3]:
            self.scans.missing_bits[component] = np.full(COEFFICIENTS, 255, np.uint8)

    def _read_scan(self, offset: int) -> None:
        """Note which bits of which coefficients a scan has."""
        first, count = offset + 3, self._content[offset + 2]
        low, high, bits = self._content[first + 2 * count : first + 2 * count + 3]
        for component in self._content[first : first + 2 * count : 2]:
            missing = self.scans.missing_bits[component]
            if self._is_progressive:
                missing[low : high + 1] = bits & 15
            else:
                missing[:] = 0

    def _skip_codes(self, start: int) -> int:
        """Add the scan whose codes start at an offset, and return their end."""
        values = np.frombuffer(self._content, np.uint8)
        if self._markers is None:  # offsets of all markers, also those that restart
            offsets = np.flatnonzero(values[start:-1] == 0xFF) + start
            codes = values[offsets + 1]
            self._markers = offsets[(codes != 0) & (codes != 0xFF)]
        markers = self._markers[np.searchsorted(self._markers, start) :]
        codes = values[markers + 1]
        ends = np.flatnonzero(codes & 0xF8 != RESTART) if self._interval else np.arange(len(codes))
        restarts = int(ends[0]) if len(ends) else len(codes)
        end = int(markers[ends[0]]) if len(ends) else len(values)
        if restarts:
            expected = RESTART + np.arange(restarts) % 8
            self.scans.is_in_order &= bool((codes[:restarts] == expected).all())
        self.scans.ends.append(Scan(end, restarts if self._interval else None))
        self._start = start
        return end


def _segments(content: bytes, offset: int) -> Iterator[tuple[int, int]]:
    """Yield the next markers and the offsets behind them, up to a scan or the end of the image."""
    while True:
        offset = content.find(b"\xff", offset) + 1
        marker = content[offset : offset + 1]
        if not offset or not marker:
            return
        code, start = marker[0], offset + 1
        if code in NO_MARKERS:
            offset += code != 0xFF
            continue
        end = start + _number(content, start)
        if code in (IMAGE_START, IMAGE_END) or end < len(content):
            yield code, start
        if code in (IMAGE_START, IMAGE_END, SCAN) or end >= len(content):
            return
        offset = end


def _number(content: bytes, offset: int) -> int:
    """Return a number of two bytes."""
    return int.from_bytes(content[offset : offset + 2], "big")


class _JpegDecoder(ImageFile.PyDecoder):
    """Pillow's decoder of JPEGs, which also notices that data are missing."""

    _pulls_fd = True

    def setimage(self, im: Any, extents: tuple[int, int, int, int] | None = None) -> None:
        """Set the image to decode into."""
        self.im = im
        self._extents = extents
        self._libjpeg = self._new_libjpeg()

    def cleanup(self) -> None:
        """Free libjpeg's memory."""
        self._libjpeg.cleanup()

    def decode(self, _: object) -> tuple[int, int]:
        """Decode the whole file.

        Returns:
            -1, and 0 or a negative code of ``ImageFile.ERRORS``.

        Raises:
            DecodeError: Data are missing.
        """
        if self.fd is None or self.im is None:
            raise ValueError("no file or no image")
        width, height = self.im.size
        max_bytes = MAX_BYTES_PER_PIXEL * width * height
        content = self.fd.read(max(max_bytes, MAX_BYTES))
        if has_single_scan(content):
            error = self._decode_single_scan(content)
            if error is not None:
                return -1, error
            self._libjpeg.cleanup()
            self._libjpeg = self._new_libjpeg()
        return -1, self._decode_scans(content)

    def _new_libjpeg(self) -> Any:
        libjpeg = _imaging.jpeg_decoder(self.mode, *self.args)
        libjpeg.setimage(self.im, self._extents)
        return libjpeg

    def _decode_single_scan(self, content: bytes) -> int | None:
        """Decode a file of one scan. Searching it for markers would cost more than all the rest.

        Returns:
            0 or a negative code of ``ImageFile.ERRORS``; None if another marker ends the scan.

        Raises:
            DecodeError: Data of the scan are missing.
        """
        end = len(content) - len(END)
        consumed, _ = self._libjpeg.decode(memoryview(content)[: end - len(AHEAD)])
        # Without its last bytes, the scan is not finished, unless libjpeg met a marker.
        if consumed < 0 or MARKER.search(content, consumed, end):
            return None
        return self._end_scan(content[consumed:end], None)

    def _decode_scans(self, content: bytes) -> int:
        """Decode a file scan by scan.

        Returns:
            0 or a negative code of ``ImageFile.ERRORS``.

        Raises:
            DecodeError: Data of the picture are missing.
        """
        scans = find_scans(content)
        if scans is None:
            consumed, error = self._libjpeg.decode(content)
            if consumed >= 0:
                raise _truncated()
            return int(error)
        if not scans.is_whole:
            raise _truncated()
        start = 0
        for end, restarts in scans.ends:
            consumed, error = self._libjpeg.decode(memoryview(content)[start:end])
            if consumed < 0:
                return int(error)
            finished = self._end_scan(content[start + consumed : end], restarts)
            if finished is not None:
                return finished
            start = end
        return int(self._libjpeg.decode(END)[1])

    def _end_scan(self, rest: bytes, restarts: int | None) -> int | None:
        """Decode the last codes of a scan.

        Args:
            rest: What libjpeg left of the codes. It decodes the last block only if it can fetch
                some bytes beyond it.
            restarts: Number of restart markers in the scan, None if it has no interval.

        Returns:
            None, 0 if the picture is finished, or a negative code of ``ImageFile.ERRORS``.

        Raises:
            DecodeError: Data of the scan are missing.
        """
        probes = [rest + AHEAD, STUFFED]
        if restarts is not None:  # it may wait for a restart marker
            probes += [bytes((0xFF, RESTART + restarts % 8)), STUFFED]
        for probe in probes:
            consumed, error = self._libjpeg.decode(probe)
            if consumed < 0:
                return int(error)
            if consumed < len(probe):  # it waits for the rest of a block
                raise _truncated()
        return None


def _truncated() -> DecodeError:
    return DecodeError("truncated", "image file is truncated: data of its picture are missing")


CODEC = "checked-jpeg"
Image.register_decoder(CODEC, _JpegDecoder)

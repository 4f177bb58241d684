"""Image formats that Pillow does not decode by itself, told by the first bytes of a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["AVIF", "HEAD_BYTES", "HEIF", "JXL", "KINDS", "RAW", "Kind", "kind_of"]

HEAD_BYTES = 512  # first bytes that tell the format


@dataclass(frozen=True)
class Kind:
    """A format of images beyond Pillow's own.

    Attributes:
        name: Name in messages and in the documentation.
        suffixes: Suffixes that stand for it and nothing else, in lower case with the dot.
        extra: Extra of this package that installs its decoder, empty if there is none.
        package: Package that decodes it, empty if there is none.
        module: Module of that package.
        result: What is decoded of such a file.
    """

    name: str
    suffixes: tuple[str, ...]
    extra: str = ""
    package: str = ""
    module: str = ""
    result: str = ""


HEIF = Kind(
    "HEIC",
    (".heic", ".heics", ".heif", ".heifs", ".hif", ".avci", ".avcs"),
    "heif",
    "pillow-heif",
    "pillow_heif",
    "the primary image, 8 bits, rotated and mirrored as the file says; EXIF orientation is ignored",
)
JXL = Kind(
    "JPEG XL",
    (".jxl",),
    "jxl",
    "pillow-jxl-plugin",
    "pillow_jxl",
    "the image, turned as the codestream says; EXIF orientation is ignored; no animations",
)
# fmt: off
# Left out as they name other files too: .raw, .bay, .cap, .dcs, .fff, .mdc, .mos, .ori, .ptx, .pxn.
RAW_SUFFIXES = (
    ".3fr", ".arq", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".gpr", ".iiq", ".kdc",
    ".mef", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf",
    ".srw", ".x3f",
)
# fmt: on
RAW = Kind(
    "camera raw",
    RAW_SUFFIXES,
    "raw",
    "rawpy",
    "rawpy",
    "the full picture at the camera's white balance, turned upright; never a preview",
)
AVIF = Kind("AVIF", (".avif", ".avifs"))
JPEG_XR = Kind("JPEG XR", (".jxr", ".wdp", ".hdp"))
PSB = Kind("PSB", (".psb",))
EXR = Kind("OpenEXR", (".exr",))
RADIANCE = Kind("Radiance HDR", ())  # .hdr names many other files
DICOM = Kind("DICOM", (".dcm", ".dicom"))
XCF = Kind("GIMP XCF", (".xcf",))
JPEG_LS = Kind("JPEG-LS", (".jls",))
BPG = Kind("BPG", (".bpg",))
FLIF = Kind("FLIF", (".flif",))

KINDS = (HEIF, JXL, RAW, JPEG_XR, PSB, EXR, RADIANCE, DICOM, XCF, JPEG_LS, BPG, FLIF)
"""All formats beyond Pillow's own. AVIF is Pillow's, unless Pillow was built without it."""

# Offset and bytes that tell a format.
_SIGNATURES = (
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", JXL),
    (0, b"\xff\x0a", JXL),
    (0, b"FUJIFILMCCD-RAW", RAW),  # RAF
    (0, b"FOVb", RAW),  # X3F
    (0, b"IIRO", RAW),  # ORF
    (0, b"IIRS", RAW),
    (0, b"MMOR", RAW),
    (0, b"IIU\0", RAW),  # RW2, RWL
    (0, b"\0MRM", RAW),  # MRW
    (6, b"HEAPCCDR", RAW),  # CRW
    (0, b"II\xbc\0", JPEG_XR),
    (0, b"II\xbc\x01", JPEG_XR),
    (0, b"8BPS\0\2", PSB),
    (0, b"v/1\x01", EXR),
    (0, b"#?RADIANCE", RADIANCE),
    (0, b"#?RGBE", RADIANCE),
    (128, b"DICM", DICOM),
    (0, b"gimp xcf ", XCF),
    (0, b"\xff\xd8\xff\xf7", JPEG_LS),
    (0, b"BPG\xfb", BPG),
    (0, b"FLIF", FLIF),
)

# Brands of ISO/IEC 14496-12 files (ISO/IEC 23008-12, annexes B to G). Others are videos.
_HEIF_BRANDS = frozenset(
    b"heic heix heim heis hevc hevx hevm hevs mif1 mif2 mif3 msf1 avci avcs jpeg jpgs j2ki j2is"
    b" vvic vvis".split()
)
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_VIDEO_BRANDS = frozenset({b"qt  ", b"isom", b"iso2", b"mp41", b"mp42", b"M4V ", b"avc1"})


def kind_of(head: bytes) -> Kind | None:
    """Return the format that the first :data:`HEAD_BYTES` of a file tell, or None.

    Raw files that are TIFFs are told by :mod:`extractor.images.containers.tiff`.
    """
    if head[4:8] == b"ftyp":
        return _kind_of_brands(*_brands(head))
    for offset, signature, kind in _SIGNATURES:
        if head.startswith(signature, offset):
            return kind
    return None


def _brands(head: bytes) -> Iterator[bytes]:
    """Yield the major brand and the compatible ones."""
    size = int.from_bytes(head[:4], "big")
    yield head[8:12]
    for start in range(16, min(size, len(head)) - 3, 4):
        yield head[start : start + 4]


def _kind_of_brands(major: bytes, *others: bytes) -> Kind | None:
    if major == b"crx ":
        return RAW  # CR3
    if major in _VIDEO_BRANDS:
        return None
    brands = {major, *others}
    if major in _AVIF_BRANDS or (brands & _AVIF_BRANDS and b"heic" not in brands):
        return AVIF
    return HEIF if brands & _HEIF_BRANDS else None

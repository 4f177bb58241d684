"""Checks of correctness on a GPU, one function each; in a rehearsal on the CPU.

Each function yields results. What it raises fails the check as well.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from setting import ROOT, Result, Setting
from torch import nn

from extractor import Backbone, FeatureStore, Preprocess, extract, load_backbone
from extractor.images.decode import decode_into
from extractor.images.files import read_file
from extractor.loading.batch import Batch
from extractor.loading.loader import BatchLoader
from extractor.loading.nvjpeg import NvjpegDecoder
from extractor.report import Progress
from extractor.system.float32 import full_float32

FIXED: dict[str, Any] = {"weights": "random", "compile": "off"}
POISON = 201  # a level that no image has
SLEEP_CYCLES = 3_000_000  # one to two milliseconds

MAX_RELATIVE_ERROR = 1e-5
SCALES = (1.0, 0.71)
LEAST_COSINE = 0.9999  # of rows that differ by rounding only
LEAST_COSINE_OF_JPEGS = 0.99  # of those whose colors two decoders upsample each in its way


def rows_of(out: Path) -> npt.NDArray[np.float64]:
    """Return all rows of a store, checked to be finite and unequal to zero."""
    rows = FeatureStore.open(out).features[:].astype(np.float64)
    assert len(rows), "the store has no rows"
    assert np.isfinite(rows).all(), "a row is not finite"
    assert np.linalg.norm(rows, axis=1).min() > 0, "a row is zero"
    return rows


def cosines(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the cosine of each pair of rows."""
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# ---------------------------------------------------------------------------------------------


def versions(setting: Setting) -> Iterator[Result]:
    """The device computes, and what it is."""
    import timm
    import torchvision

    device = torch.device(setting.device)
    total = float((torch.arange(8.0, device=device) * 2).sum())
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        driver = "no driver"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    figures = {
        "card": card,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "commit": commit.stdout.strip(),
    }
    detail = ", ".join(f"{key} {value}" for key, value in figures.items() if value)
    yield Result("device", total == 56, detail, figures)


def tests(setting: Setting) -> Iterator[Result]:
    """``pytest -m cuda``: all pass and none is skipped, but for files that need what is missing."""
    if importlib.util.find_spec("pytest") is None:
        yield Result("pytest -m cuda", None, "needs pytest, which is not installed")
        return
    files, left_out = cuda_test_files()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not setting.is_rehearsal:
        environment["EXTRACTOR_REQUIRE_CUDA"] = "1"
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    command += ["--durations=10", *files]
    log = Path(setting.out, "pytest.log")  # says how far the tests came if there is no time left
    with log.open("wb") as output:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    (summary,) = log.read_text("utf-8", "replace").splitlines()[-1:] or ["no output"]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", summary)}
    wanted = "skipped" if setting.is_rehearsal else "passed"
    others = ("failed", "errors", "error", "passed" if setting.is_rehearsal else "skipped")
    is_right = done.returncode == 0 and counts.get(wanted, 0) > 0
    is_right = is_right and not any(counts.get(word) for word in others)
    detail = summary.strip("= ")
    if left_out:
        detail += f"; left out for want of a package: {', '.join(left_out)}"
    yield Result("pytest -m cuda", is_right, detail, counts)


def cuda_test_files() -> tuple[list[str], list[str]]:
    """Return the files with tests that need CUDA, and those that need a missing package."""
    found: list[str] = []
    left_out: list[str] = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text("utf-8")
        if not re.search(r"mark\.cuda|[(,]\s*device: str", text):
            continue
        packages = re.findall(r"^(?:from|import) (hypothesis|fastapi|httpx)\b", text, re.M)
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        (left_out if missing else found).append(str(path.relative_to(ROOT)))
    return found, left_out


def float64(setting: Setting) -> Iterator[Result]:
    """float32 rows of the device equal those of float64 on the CPU."""
    torch.backends.cudnn.allow_tf32 = True  # as torch comes, whatever the program does about it
    names = setting.pick(("resnet18", "vit_tiny_patch16_224"), ("test_resnet", "test_vit"))
    torch.set_num_threads(setting.pick(4, 1))  # other checks run beside this one
    with setting.links("float64", setting.pick(24, 6)) as images:
        for name in names:
            out = setting.scratch / f"float64-{name}"
            settings = {**FIXED, "precision": "float32", "decode": "exact"}
            extract(images, name, out, device=setting.device, batch_size=16, **settings)
            rows, exact = rows_of(out), _exact_rows(images, name)
            error = relative_error(rows, exact)
            is_right = error < MAX_RELATIVE_ERROR and len(np.unique(rows.round(9), axis=0)) > 1
            yield Result(f"float32 against float64, {name}", is_right, f"{error:.1e}", {"e": error})


def relative_error(rows: npt.NDArray[np.float64], exact: npt.NDArray[np.float64]) -> float:
    """Return the largest distance of two rows, as a share of their length."""
    distances = np.linalg.norm(rows - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return float(distances.max())


def views(setting: Setting) -> Iterator[Result]:
    """float32 rows of a mirror image and two sizes equal their mean in float64 on the CPU."""
    torch.backends.cudnn.allow_tf32 = True
    torch.set_num_threads(setting.pick(4, 1))
    name = setting.network
    with setting.links("views", setting.pick(24, 6)) as images:
        out = setting.scratch / "views"
        settings = {**FIXED, "precision": "float32", "decode": "exact", "batch_size": 16}
        settings |= {"augment": "flip", "scales": SCALES}
        extract(images, name, out, device=setting.device, **settings)
        rows, exact = rows_of(out), _exact_rows(images, name, flip=True, scales=SCALES)
        error, alone = (relative_error(rows, each) for each in (exact, _exact_rows(images, name)))
    is_right = error < MAX_RELATIVE_ERROR < alone / 100
    detail = f"{error:.1e}; {alone:.1e} from the picture alone"
    yield Result(f"float32 views against float64, {name}", is_right, detail, {"e": error})


@torch.inference_mode()
def _exact_rows(
    images: Path, name: str, *, flip: bool = False, scales: Sequence[float] = (1.0,)
) -> npt.NDArray[np.float64]:
    backbone = load_backbone(name, weights="random", device="cpu")
    module, preprocess = backbone.module.double(), backbone.preprocess
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (preprocess.mean, preprocess.std))
    rows = []
    for path in sorted(path for path in images.rglob("*") if path.is_symlink()):
        picture = np.empty((*preprocess.input_size, 3), np.uint8)
        decode_into(read_file(os.fsencode(path), 2**30), [preprocess], [picture], None, "exact")
        pixels = (torch.from_numpy(picture).double() / 255 - mean) / std
        seen = []
        for scale in scales:
            size = [round(scale * edge) for edge in preprocess.input_size]
            view = pixels.permute(2, 0, 1)[None]
            if scale != 1:
                view = nn.functional.interpolate(view, size, mode="bilinear", antialias=True)
            seen += [view, view.flip(3)] if flip else [view]
        rows.append(torch.stack([module(view)[0].flatten() for view in seen]).mean(0))
    return torch.stack(rows).numpy()


# ---------------------------------------------------------------------------------------------
# Buffers


class Extremes(nn.Module):
    """Least and largest value of each channel, after a sleep of the device."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.is_cuda:
            torch.cuda._sleep(SLEEP_CYCLES)
        return torch.cat([pixels.amin((2, 3)), pixels.amax((2, 3))], 1)


class Slow(tuple):  # type: ignore[type-arg]
    """Pictures of a batch; copying them waits for a sleep on the stream that copies."""

    copied = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        Slow.copied += 1
        if torch.cuda.is_available():
            torch.cuda._sleep(SLEEP_CYCLES)
        return super().__iter__()


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Overwrite buffers the moment they are released, and delay the copies from them."""
    release, iterate = BatchLoader.release, BatchLoader.__iter__

    def poisoned(loader: BatchLoader, batch: Batch) -> None:
        for index in range(len(batch.pictures)):
            batch.pictures[index].fill_(POISON)
        release(loader, batch)

    def slowed(loader: BatchLoader) -> Iterator[Batch]:
        for batch in iterate(loader):
            batch.pictures = Slow(tuple.__iter__(batch.pictures))
            yield batch

    Slow.copied = 0
    with (
        mock.patch.object(BatchLoader, "release", poisoned),
        mock.patch.object(BatchLoader, "__iter__", slowed),
    ):
        yield


def poison(setting: Setting) -> Iterator[Result]:
    """No pixel of a buffer is read after its release: every pixel has the color of its image."""
    batches, size, batch_size = setting.pick((64, 224, 64), (24, 48, 4))
    count = batches * batch_size
    colors = np.array([(i % 199, i // 199 % 199, 3 * i % 199) for i in range(count)], np.uint8)
    folder = setting.scratch / "colors"
    folder.mkdir()
    for index, color in enumerate(colors.tolist()):
        Image.new("RGB", (8, 8), tuple(color)).save(folder / f"{index:06d}.png")
    preprocess = Preprocess((size, size), "squash", (size, size), "bilinear", (0,) * 3, (1,) * 3)
    backbone = Backbone.from_module(
        Extremes(), head=None, preprocess=preprocess, device=setting.device
    )
    out = setting.scratch / "poison"
    with poisoned_buffers():
        extract(folder, backbone, out, batch_size=batch_size, workers=16, precision="float32")
    levels = FeatureStore.open(out).features[:].astype(np.float64) * 255
    wrong = int((np.abs(levels - np.hstack([colors, colors])).max(1) > 0.01).sum())
    is_right = not wrong and len(levels) == count and Slow.copied >= batches
    detail = f"{wrong} of {len(levels)} rows are wrong; {Slow.copied} delayed copies"
    yield Result("released buffers are not read", is_right, detail, {"wrong": wrong})


# ---------------------------------------------------------------------------------------------
# Stores


def stores(setting: Setting) -> Iterator[Result]:
    """The same bytes twice, with blocking launches, and after three interruptions.

    Each run is a process of its own. All but workers and the command are forked: to import torch
    again and again took most of the time. Nothing here may use the device before.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a fork may ask whether there is a device
    count = setting.pick(2048, 96)
    with setting.links("stores", count) as images:
        common: dict[str, Any] = {
            **FIXED,
            "images": str(images),
            "model": setting.network,
            "device": setting.device,
            "precision": setting.pick("float16", "float32"),
            "batch_size": setting.pick(32, 8),
            "shard_images": setting.pick(512, 32),
        }
        common |= setting.pick({}, {"image_size": 64})
        blocking = {"CUDA_LAUNCH_BLOCKING": "1"}
        runs = {
            "first": _Run(setting, common, "first"),
            "again": _Run(setting, common, "again"),
            "blocking": _Run(setting, common, "blocking", environment=blocking),
            "several": _Run(setting, {**common, "processes": 2}, "several"),
        }
        killed = setting.scratch / "store-killed"
        chain = _fork(lambda: _interrupt(setting, common, count))
        expected = runs["first"].end()
        yield same_bytes("run twice", expected, runs["again"].end())
        yield same_bytes("CUDA_LAUNCH_BLOCKING=1", expected, runs["blocking"].end())
        several = runs["several"].end(workers=2)
        yield same_bytes("two processes on the device", expected, several)
        code = _exit_code(chain)
        assert code == 0, f"interrupted runs: exit code {code}, see the log"
        yield same_bytes("killed twice, SIGTERM, resumed", expected, killed)


def _interrupt(setting: Setting, settings: Mapping[str, Any], count: int) -> None:
    """Make a store that is interrupted three times."""
    for kill_at in (count // 3, count * 2 // 3):
        _Run(setting, settings, "killed", kill_at=kill_at).end(code=-signal.SIGKILL)
    code = _terminate(settings, setting.scratch / "store-killed")
    assert code == 143, f"SIGTERM: exit code {code}"
    _Run(setting, settings, "killed").end(wants_resumed=True)


class _Run:
    """A run of ``extract`` in a process of its own.

    Args:
        setting: Setting of the check.
        settings: Arguments of ``extract``.
        name: Name of the store.
        kill_at: Number of images after which the process is killed; 0 for never.
        environment: Further variables of the process.
    """

    def __init__(
        self,
        setting: Setting,
        settings: Mapping[str, Any],
        name: str,
        *,
        kill_at: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._name = name
        self._settings = settings
        self._kill_at = kill_at
        self._environment = environment or {}
        self._out = setting.scratch / f"store-{name}"
        self._report = setting.scratch / f"report-{name}.json"
        self._process = _fork(self._extract)

    def _extract(self) -> None:
        os.environ.update(self._environment)

        def progress(now: Progress) -> None:
            if self._kill_at and now.phase == "computing" and now.done >= self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        report = extract(out=str(self._out), progress=progress, **self._settings)
        self._report.write_text(json.dumps([report.resumed, len(report.workers)]))

    def end(self, *, code: int = 0, wants_resumed: bool = False, workers: int = 0) -> Path:
        """Wait until the run ends as it should, and return its store."""
        found = _exit_code(self._process)
        assert found == code, f"{self._name}: exit code {found}, expected {code}"
        if code == 0:
            resumed, started = json.loads(self._report.read_text())
            assert resumed > 0 or not wants_resumed, f"{self._name}: nothing was resumed"
            assert started == workers, f"{self._name}: {started} workers, expected {workers}"
        return self._out


def _fork(work: Callable[[], None]) -> int:
    """Start a function in a copy of this process, and return its number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # the copy must not go on with the work of the original
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _terminate(settings: Mapping[str, Any], out: Path) -> int:
    """Send SIGTERM to the command once it computes, and return its exit code."""
    flags = [settings["images"], "--out", str(out), "--log-json"]
    for name, value in settings.items():
        if name != "images":
            flags += [f"--{name.replace('_', '-')}", str(value)]
    command = [sys.executable, "-m", "extractor", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if '"event": "progress"' in line and '"computing"' in line:
            process.send_signal(signal.SIGTERM)
            break
    lines += process.stderr.readlines()
    print("".join(lines))
    return process.wait()


def same_bytes(name: str, expected: Path, out: Path) -> Result:
    """Return whether two stores have the same rows, byte for byte, and whether there are any."""
    shards = {path.name: path.read_bytes() for path in expected.rglob("*.npy")}
    others = {path.name: path.read_bytes() for path in out.rglob("*.npy")}
    wrong = sorted(
        name for name in shards.keys() | others.keys() if shards.get(name) != others.get(name)
    )
    rows_of(expected)
    is_right = bool(shards) and not wrong
    detail = f"{len(shards)} shards" if is_right else f"of {len(shards)} shards differ {wrong}"
    return Result(f"equal bytes: {name}", is_right, detail)


# ---------------------------------------------------------------------------------------------
# Errors


def memory(setting: Setting) -> Iterator[Result]:
    """A device without memory computes the same rows in parts."""
    batch_size = setting.pick(512, 8)
    backbone = load_backbone(setting.network, weights="random", device=setting.device)
    settings: dict[str, Any] = {"batch_size": batch_size, "precision": "float32", "compile": "off"}
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("extractor").addHandler(handler)
    with setting.links("memory", 2 * batch_size) as images:
        whole = setting.scratch / "memory-whole"
        extract(images, backbone, whole, **settings)
        parts = setting.scratch / "memory-parts"
        with little_memory(setting, backbone.module, batch_size // 2):
            extract(images, backbone, parts, **settings)
    cosine = float(cosines(rows_of(whole), rows_of(parts)).min())
    is_warned = any("out of memory" in message for message in warned)
    detail = f"least cosine {cosine:.6f}; warned: {'; '.join(warned) or 'no'}"
    yield Result("out of memory", is_warned and cosine > LEAST_COSINE, detail)


@contextmanager
def little_memory(setting: Setting, module: nn.Module, fitting: int) -> Iterator[None]:
    """Leave memory for a part of a batch."""
    if setting.device == "cuda":
        peak = torch.cuda.max_memory_reserved()
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
        return
    forward = module.forward

    def limited(pixels: torch.Tensor) -> Any:
        if len(pixels) > fitting:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 GiB")
        return forward(pixels)

    with mock.patch.object(module, "forward", limited):
        yield


class StopError(Exception):
    """Raised in the middle of a run."""


def error(setting: Setting) -> Iterator[Result]:
    """After an exception in the third batch, memory and flags are as before."""
    backbone = load_backbone(setting.network, weights="random", device=setting.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    batch_size = setting.pick(64, 4)
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "precision": "float32",
        "compile": "off",
    }
    calls = 0

    def stop(_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise StopError

    with setting.links("error", 8 * batch_size) as images:
        # Libraries keep what they allocate at first.
        extract(images, backbone, setting.scratch / "error-first", **settings)
        before = _allocated(setting)
        has_stopped = False
        try:
            extract(images, backbone, setting.scratch / "error", progress=stop, **settings)
        except StopError:
            has_stopped = True
        after = _allocated(setting)
        flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        report = extract(images, backbone, setting.scratch / "error", **settings)
    is_right = has_stopped and after <= before + 2**20 and flags == (True, True)
    is_right = is_right and report.rows == 8 * batch_size
    detail = f"memory {before / 2**20:.1f} and {after / 2**20:.1f} MiB, TF32 flags {flags}"
    yield Result("exception in the third batch", is_right, detail)


def _allocated(setting: Setting) -> int:
    gc.collect()
    if setting.device == "cpu":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


# ---------------------------------------------------------------------------------------------
# Embeddings


def folding(setting: Setting) -> Iterator[Result]:
    """The same layers are folded on the device and on the CPU, and embeddings stay."""
    folded = {}
    for device in ("cpu", setting.device):
        backbone = load_backbone(setting.network, weights="random", device=device)
        pixels = torch.rand(4, 3, *backbone.preprocess.input_size, device=device)
        with full_float32():
            before = backbone(pixels).double().cpu().numpy()
            folded[device] = backbone.fold().folded
            change = relative_error(backbone(pixels).double().cpu().numpy(), before)
    names = [[name for name in folded[device] if "bn" in name] for device in folded]
    is_right = bool(names[0]) and names[0] == names[-1] and 0 < change < 1e-3
    detail = f"{len(names[0])} on the CPU, {len(names[-1])} on the device, change {change:.1e}"
    yield Result("folded normalizations", is_right, detail)


def fidelity(setting: Setting) -> Iterator[Result]:
    """A default run keeps a cosine of 0.999 to float32, with real weights if there are any."""
    script = ROOT / "scripts" / "benchmarks" / "fidelity.py"
    models = [(setting.network, "random")]
    if setting.weights:
        models = [
            (name, str(next(Path(setting.weights).glob(pattern))))
            for name, pattern in (
                ("torchvision:squeezenet1_0", "squeezenet1_0*.pth"),
                ("timm:mobilenetv2_035", "mobilenetv2_035*.safetensors"),
            )
        ]
    for model, weights in models:
        command = [sys.executable, str(script), setting.photos, "--model", model, "--weights"]
        command += [weights, "--device", setting.device, "--json", "-"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        figures = json.loads(done.stdout)
        kind = "random weights" if weights == "random" else "real weights"
        detail = (
            f"{figures['precision']}, least cosine {figures['least_cosine']:.5f}, "
            f"{figures['images']} images, {kind}"
        )
        yield Result(f"default run, {model}", done.returncode == 0, detail, figures)


def nvjpeg(setting: Setting) -> Iterator[Result]:
    """``--decode gpu`` is right on 4:2:0 photos, or refuses itself."""
    folder = setting.scratch / "sampled"
    folder.mkdir()
    photos = sorted(path for path in Path(setting.photos).rglob("*") if path.is_file())
    # Two batches, so that the device decodes the second one after the trial.
    for index in range(setting.pick(400, 144)):
        target = folder / f"{index:04d}.jpg"
        if index < len(photos):
            with Image.open(photos[index]) as image:
                image.convert("RGB").save(target, quality=90, subsampling=2)
        else:
            target.symlink_to(folder / f"{index % len(photos):04d}.jpg")
    settings = {**FIXED, "precision": "float32", "device": setting.device, "batch_size": 72}
    settings |= setting.pick({}, {"image_size": 64})
    decoders: list[NvjpegDecoder] = []
    decode_batch = NvjpegDecoder.decode_batch

    def seen(decoder: NvjpegDecoder, *args: Any) -> None:
        decoders.append(decoder)
        decode_batch(decoder, *args)

    with mock.patch.object(NvjpegDecoder, "decode_batch", seen), _stand_in_decoder(setting):
        on_gpu = setting.scratch / "decode-gpu"
        extract(folder, setting.network, on_gpu, decode="gpu", **settings)
    exact = setting.scratch / "decode-exact"
    extract(folder, setting.network, exact, decode="exact", **settings)
    found = cosines(rows_of(on_gpu), rows_of(exact))
    is_trusted = bool(decoders and decoders[-1].is_trusted)
    verdict = "trusted" if is_trusted else f"refused: {decoders[-1].objection if decoders else '?'}"
    detail = f"{verdict}; least cosine {found.min():.5f}, mean {found.mean():.5f}"
    is_decided = bool(decoders) and decoders[-1].is_trusted is not None
    is_right = is_decided and float(found.min()) >= LEAST_COSINE_OF_JPEGS
    yield Result("--decode gpu on 4:2:0 photos", is_right, detail, {"is_trusted": is_trusted})


@contextmanager
def _stand_in_decoder(setting: Setting) -> Iterator[None]:
    """In a rehearsal, let Pillow decode instead of nvJPEG."""
    if not setting.is_rehearsal:
        yield
        return
    import io

    from extractor.run import session

    def decode(_: NvjpegDecoder, encoded: list[torch.Tensor]) -> list[torch.Tensor]:
        images = [Image.open(io.BytesIO(content.numpy().tobytes())) for content in encoded]
        arrays = [np.array(image.convert("RGB")) for image in images]
        return [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]

    check: Callable[..., None] = lambda *_: None  # noqa: E731
    with (
        mock.patch.object(NvjpegDecoder, "_nvjpeg", decode),
        mock.patch.object(session, "check_decode_device", check),
    ):
        yield

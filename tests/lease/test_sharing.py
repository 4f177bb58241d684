"""Devices, processes and cores: who gets what."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extractor.errors import DeviceError, UsageError
from extractor.lease.sharing import Machine, Sharing, processes_per_gpu, share_out
from extractor.loading.options import MAX_DEFAULT_READERS, MAX_DEFAULT_WORKERS
from extractor.options import Options

MANY = 1_000_000


def shared(
    cores: int = 16,
    gpus: int = 0,
    device: str = "",
    images: int = MANY,
    shards: int = 999,
    **options: Any,
) -> Sharing:
    device = device or ("cuda:0" if gpus else "cpu")
    machine = Machine(cores, gpus, device, threads=cores, gpu_bytes=80 * 2**30)
    return share_out(Options(**options), machine, images=images, shards=shards)


@pytest.mark.parametrize(
    ("cores", "gpus", "images", "processes"),
    [
        (1, 0, MANY, 1),
        (16, 0, MANY, 1),
        (31, 0, MANY, 1),
        (32, 0, MANY, 2),
        (96, 0, MANY, 6),
        (96, 0, 9_999, 1),
        (96, 0, 10_000, 6),
        (1, 1, MANY, 1),
        (3, 1, MANY, 1),
        (4, 1, MANY, 2),
        (16, 1, MANY, 8),
        (128, 1, MANY, 8),
        (16, 1, 9_999, 1),
    ],
)
def test_default_number_of_processes(cores: int, gpus: int, images: int, processes: int) -> None:
    assert len(shared(cores, gpus, images=images).slots) == processes


def test_apples_gpu_has_one_process_by_default() -> None:
    (slot,) = shared(32, device="mps").slots
    assert (slot.device, slot.workers) == ("mps", MAX_DEFAULT_WORKERS)


def test_each_of_several_gpus_counts_its_own_cores() -> None:
    slots = shared(32, 8, devices="all").slots
    assert len(slots) == 16  # 4 cores each are worth 2 processes
    assert [slot.device for slot in slots[:9]] == [*(f"cuda:{n}" for n in range(8)), "cuda:0"]


def test_named_devices_are_used_and_no_others() -> None:
    slots = shared(4, 4, devices="3,1", processes=2).slots
    assert [slot.device for slot in slots] == ["cuda:3", "cuda:1", "cuda:3", "cuda:1"]


def test_devices_cpu_leaves_gpus_alone() -> None:
    assert {slot.device for slot in shared(64, 8, devices="cpu").slots} == {"cpu"}


def test_processes_apply_to_the_device_that_was_named() -> None:
    slots = shared(4, 2, device="cuda:1", processes=2).slots
    assert [slot.device for slot in slots] == ["cuda:1", "cuda:1"]


@pytest.mark.parametrize(
    ("gib", "processes"), [(0, 4), (4, 1), (15, 2), (24, 4), (47, 7), (48, 8), (141, 8)]
)
def test_processes_fit_into_the_memory_of_the_gpu(gib: int, processes: int) -> None:
    assert processes_per_gpu(96, gib * 2**30) == processes
    assert processes_per_gpu(3, gib * 2**30) == 1


def test_large_weights_leave_room_for_fewer_processes() -> None:
    machine = Machine(96, 1, "cuda:0", threads=96, gpu_bytes=80 * 2**30, weight_bytes=7 * 2**30)
    slots = share_out(Options(), machine, images=MANY, shards=999).slots
    assert len(slots) == 4  # 6 GiB and twice 7 GiB each


@pytest.mark.parametrize(("processes", "expected"), [(None, 1), (3, 3)])
def test_a_gpu_for_one_process_has_one_by_default(processes: int | None, expected: int) -> None:
    machine = Machine(96, 1, "cuda:0", threads=96, gpu_bytes=80 * 2**30, is_exclusive=True)
    sharing = share_out(Options(processes=processes), machine, images=MANY, shards=999)
    assert len(sharing.slots) == expected


@pytest.mark.parametrize(
    ("gib", "gpus", "weights_gib", "processes"),
    [(2, 1, 0, 1), (16, 1, 0, 5), (32, 1, 0, 8), (32, 4, 0, 8), (32, 1, 5, 4), (100, 4, 0, 32)],
)
def test_processes_on_gpus_fit_into_the_memory_of_the_machine(
    gib: int, gpus: int, weights_gib: int, processes: int
) -> None:
    """Each takes 3 GiB and its weights, and every GPU has as many."""
    machine = Machine(
        *(16 * gpus, gpus, "cuda:0"),
        threads=16,
        gpu_bytes=400 * 2**30,
        weight_bytes=weights_gib * 2**30,
        free_bytes=gib * 2**30,
    )
    slots = share_out(Options(devices="all"), machine, images=MANY, shards=999).slots
    assert len(slots) == processes
    asked = share_out(Options(processes=8), machine, images=MANY, shards=999).slots
    assert len(asked) == 8  # what is asked for is not questioned


def test_the_cores_of_a_gpu_decode() -> None:
    assert [slot.workers for slot in shared(16, 1).slots] == [2] * 8
    assert [slot.workers for slot in shared(2, 2, devices="all").slots] == [1, 1]


def test_a_process_has_few_decoding_threads() -> None:
    assert [slot.workers for slot in shared(64, 1, processes=1).slots] == [MAX_DEFAULT_WORKERS]
    (slot,) = shared(64, 1, processes=1, decode="gpu").slots
    assert slot.workers == MAX_DEFAULT_READERS
    (slot,) = shared(64, 1, processes=1, decode="gpu", workers=20).slots
    assert slot.workers == 20


def test_cores_are_shared_out_and_compute_threads_are_equal() -> None:
    slots = shared(7, processes=3).slots
    assert [slot.workers for slot in slots] == [3, 2, 2]
    assert [slot.threads for slot in slots] == [2, 2, 2]  # rows depend on them


def test_compute_threads_follow_torchs_own_number() -> None:
    hyperthreaded = Machine(cores=32, gpus=0, device="cpu", threads=16)
    sharing = share_out(Options(processes=2), hyperthreaded, images=MANY, shards=99)
    assert [(slot.workers, slot.threads) for slot in sharing.slots] == [
        (MAX_DEFAULT_WORKERS, 8)
    ] * 2


def test_explicit_threads_are_per_process() -> None:
    slots = shared(16, processes=4, workers=9, threads=5).slots
    assert {(slot.workers, slot.threads) for slot in slots} == {(9, 5)}


def test_workers_share_the_limit_on_pixels() -> None:
    assert {slot.max_pixels_share for slot in shared(processes=4, max_pixels=1002).slots} == {250}
    assert {slot.max_pixels_share for slot in shared(processes=4, max_pixels=2).slots} == {1}


def test_more_processes_than_shards_are_not_started() -> None:
    sharing = shared(8, processes=4, shards=3)
    assert [slot.workers for slot in sharing.slots] == [3, 3, 2]
    assert sharing.note == (
        "3 processes instead of 4: there are only 3 shards to compute; a smaller --shard-images "
        "makes more of them"
    )
    assert shared(8, processes=4, shards=1).note.startswith("1 process instead of 4: there is only")


@pytest.mark.parametrize("given", [{"cores": 96, "shards": 2}, {"processes": 4, "shards": 0}])
def test_there_is_no_note_on_what_nobody_asked_for(given: dict[str, Any]) -> None:
    assert not shared(**given).note


@pytest.mark.parametrize(
    ("gpus", "devices", "match"),
    [
        (0, "all", "devices: got all, and torch sees no GPU; .* use --devices cpu"),
        (0, "0", "devices: got 0, and torch sees no GPU"),
        (1, "0,1", "devices: there is no GPU 1; only GPU 0 is visible"),
        (4, "0,7", "devices: there is no GPU 7; only GPUs 0 to 3 are visible"),
    ],
)
def test_a_device_that_does_not_exist_is_refused(gpus: int, devices: str, match: str) -> None:
    with pytest.raises(DeviceError, match=match):
        shared(8, gpus, devices=devices)


def test_a_run_that_cannot_leave_its_process_has_one() -> None:
    machine = Machine(64, 1, "cuda:0", threads=64)
    reason = "a Backbone cannot move to another process"
    sharing = share_out(Options(), machine, images=MANY, shards=99, only_here=reason)
    assert len(sharing.slots) == 1
    with pytest.raises(UsageError, match=f"got 2 processes, expected 1: {reason}; try --processes"):
        share_out(Options(processes=2), machine, images=MANY, shards=99, only_here=reason)


def test_a_profile_is_of_one_process() -> None:
    assert len(shared(64, 1, profile="trace.json").slots) == 1
    with pytest.raises(UsageError, match="got 2 processes, expected 1: --profile traces one"):
        shared(64, 2, profile="trace.json", devices="all")


@given(
    cores=st.integers(1, 300),
    gpus=st.integers(0, 16),
    processes=st.none() | st.integers(1, 50),
    images=st.integers(0, 100_000),
    shards=st.integers(0, 100),
)
def test_no_core_is_shared_out_twice(
    cores: int, gpus: int, processes: int | None, images: int, shards: int
) -> None:
    devices = "all" if gpus else "cpu"
    slots = shared(cores, gpus, "", images, shards, devices=devices, processes=processes).slots

    assert [slot.worker for slot in slots] == list(range(len(slots)))
    assert 1 <= len(slots) <= max(shards, 1)
    assert sum(slot.workers for slot in slots) <= max(cores, len(slots))
    assert sum(slot.threads for slot in slots) <= max(cores, len(slots))
    counts = [sum(slot.device == d for slot in slots) for d in {slot.device for slot in slots}]
    assert max(counts) - min(counts) <= 1

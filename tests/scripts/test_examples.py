"""The batch examples do what they say, and the guide to them tells of what there is."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from extractor.cli.main import VERBS
from extractor.lease.parts import COUNT_VARIABLE, Part, part_from_environment
from extractor.terminal.parser import build_parser

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "scripts" / "examples"
GUIDE = ROOT / "docs" / "batch-jobs.md"
CLUSTER_GUIDE = ROOT / "docs" / "cluster.md"
EVENTS = ("start", "progress", "warning", "output", "shard", "interrupted", "error", "end")

# A stub of `extract` that waits for a signal as the program does: the first one ends it with 143.
WAITS = """
trap 'echo USR1 >> "$HERE/signals"; exit 143' USR1
trap 'echo TERM >> "$HERE/signals"; exit 143' TERM
touch "$HERE/ready"
while :; do sleep 0.02; done
"""
# One that takes its time to end the batch.
ENDS_LATER = """
ending=
trap 'echo USR1 >> "$HERE/signals"; ending=1' USR1
touch "$HERE/ready"
while [ -z "$ending" ]; do sleep 0.02; done
for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 0.05; done
exit 143
"""


class Job:
    """The Slurm script in a folder of its own, with stubs of `extract` and `scontrol`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def stub(self, name: str, content: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{content}")
        path.chmod(0o755)

    def start(self, extract: str, *, scontrol: int = 0) -> subprocess.Popen[str]:
        self.stub("extract", f'printf "%s\\n" "$@" > "$HERE/words"\n{extract}')
        self.stub("scontrol", f'echo "$@" >> "$HERE/scontrol"\nexit {scontrol}\n')
        here = {"HERE": str(self.folder), "VENV": str(self.folder), "SLURM_JOB_ID": "42"}
        asked = {"MODEL": "resnet18", "IMAGES": "my images", "OUT": "my store"}
        self.process = subprocess.Popen(
            ["bash", str(EXAMPLES / "slurm.sbatch")],
            env={**os.environ, **here, **asked},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self.process

    def end(self, extract: str, *, scontrol: int = 0) -> tuple[int, str]:
        process = self.start(extract, scontrol=scontrol)
        _, output = process.communicate(timeout=60)
        return process.returncode, output

    def ready(self) -> None:
        eventually((self.folder / "ready").exists)

    def read(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    job = Job(tmp_path)
    yield job
    if job.process is not None and job.process.poll() is None:
        os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()


@pytest.mark.parametrize(
    ("code", "ends_with", "queued_again", "message"),
    [
        (0, 0, False, "done"),
        (1, 1, False, "failed with exit code 1"),
        (2, 2, False, "failed with exit code 2"),
        (3, 0, False, "some images failed, my store/failures.jsonl lists them"),
        (130, 130, True, "goes back into the queue"),
        (137, 137, False, "failed with exit code 137"),
        (138, 138, True, "goes back into the queue"),
        (143, 143, True, "goes back into the queue"),
    ],
)
def test_slurm_job_requeues_only_interrupted_runs(
    job: Job, code: int, ends_with: int, queued_again: bool, message: str
) -> None:
    ended, output = job.end(f"exit {code}\n")
    assert ended == ends_with
    assert job.read("scontrol") == (["requeue 42"] if queued_again else [])
    assert message in output


def test_slurm_job_passes_its_variables_to_extract(job: Job) -> None:
    job.end("exit 0\n")
    words = job.read("words")
    asked = ["--model", "resnet18", "--out", "my store", "my images"]
    assert words == ["--log-json", "--part", "auto", *asked]
    parsed = build_parser().parse_args(words)
    assert (parsed.model, parsed.out, parsed.inputs) == (["resnet18"], "my store", ["my images"])
    assert parsed.part == "auto"


def test_slurm_job_forwards_sigusr1_and_requeues(job: Job) -> None:
    process = job.start(WAITS)
    job.ready()
    sent = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    eventually(lambda: bool(job.read("signals")))
    assert time.monotonic() - sent < 5
    _, output = process.communicate(timeout=60)
    assert process.returncode == 143
    assert job.read("signals") == ["USR1"]
    assert job.read("scontrol") == ["requeue 42"]
    assert "interrupted with exit code 143" in output


def test_slurm_job_waits_for_the_batch_despite_more_signals(job: Job) -> None:
    process = job.start(ENDS_LATER)
    job.ready()
    for count in (1, 2, 3):
        process.send_signal(signal.SIGUSR1)
        eventually(lambda count=count: len(job.read("signals")) >= count)  # type: ignore[misc]
    assert process.wait(timeout=60) == 143
    assert job.read("scontrol") == ["requeue 42"]


def test_slurm_job_does_not_requeue_finished_run(job: Job) -> None:
    process = job.start(ENDS_LATER.replace("exit 143", "exit 0"))
    job.ready()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert job.read("scontrol") == []


def test_canceled_slurm_job_ends_extract_without_requeue(job: Job) -> None:
    process = job.start(WAITS)
    job.ready()
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 143
    assert job.read("signals") == ["TERM"]
    assert job.read("scontrol") == []
    assert "ended by SIGTERM" in output


def test_slurm_job_fails_if_requeue_fails(job: Job) -> None:
    ended, output = job.end("exit 143\n", scontrol=1)
    assert ended == 143
    assert "scontrol requeue failed" in output


def test_slurm_directives_ask_for_warning_and_requeue() -> None:
    text = (EXAMPLES / "slurm.sbatch").read_text("utf-8")
    asked = re.findall(r"^#SBATCH (--[\w-]+)(?:=(\S+))?$", text, re.MULTILINE)
    assert (
        dict(asked).items()
        >= {
            "--signal": "B:USR1@120",
            "--requeue": "",
            "--open-mode": "append",
            "--gres": "gpu:1",
        }.items()
    )
    # Slurm reads no #SBATCH line behind the first command.
    head = text[: text.index("set -uo pipefail")]
    assert len(asked) == head.count("#SBATCH")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_slurm_script_passes_shellcheck() -> None:
    script = EXAMPLES / "slurm.sbatch"
    command = ["shellcheck", "--shell=bash", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


class Several(dict[str, Any]):
    """Sections of a unit; a key that stands there twice keeps all its values, one a line."""

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, list) and key in self:
            value = [*self[key], *value]
        super().__setitem__(key, value)


def unit(name: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(
        dict_type=Several, strict=False, delimiters=("=",), comment_prefixes=("#", ";")
    )
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read_string((EXAMPLES / name).read_text("utf-8"))
    return parser


def test_service_accepts_failed_images_and_restarts_on_failure() -> None:
    service = unit("extract.service")["Service"]
    assert service["Type"] == "oneshot"
    assert service["SuccessExitStatus"] == "3"
    # always and on-success are refused for a oneshot service
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2"
    assert service["KillSignal"] == "SIGTERM"
    assert int(service["TimeoutStopSec"]) > 4  # that a batch may take to end
    binary, *words = shlex.split(service["ExecStart"])
    assert Path(binary).is_absolute()
    assert Path(binary).name == "extract"
    assert build_parser().parse_args(words).inputs == ["${IMAGES}"]


def test_service_may_write_its_store_and_caches() -> None:
    text = (EXAMPLES / "extract.service").read_text("utf-8")
    out = re.search(r"EXTRACTOR_OUT=(\S+)", text)
    assert out is not None
    service = unit("extract.service")["Service"]
    assert Path(service["ReadWritePaths"]) in Path(out[1]).parents
    for cache in re.findall(r"(?:HF_HOME|TORCH_HOME)=(\S+)", service["Environment"]):
        assert Path("/var/cache", service["CacheDirectory"]) in Path(cache).parents


def test_timer_starts_the_service_every_night() -> None:
    timer = unit("extract.timer")
    assert re.fullmatch(r"\*-\*-\* \d\d:\d\d:\d\d", timer["Timer"]["OnCalendar"])
    assert timer["Timer"]["Persistent"] == "yes"
    assert timer["Install"]["WantedBy"] == "timers.target"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for name in ("extract.service", "extract.timer"):
        text = (EXAMPLES / name).read_text("utf-8")
        text = text.replace("/opt/extractor/bin/extract", str(shutil.which("true")))
        (tmp_path / name).write_text(text)
    names = [str(tmp_path / name) for name in ("extract.service", "extract.timer")]
    command = ["systemd-analyze", "verify", "--man=no", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Failed to" in done.stderr and "manager" in done.stderr:
        pytest.skip(done.stderr.strip())  # a container without what systemd needs
    assert done.returncode == 0, done.stderr
    assert "extract.service:" not in done.stderr
    assert "extract.timer:" not in done.stderr


@pytest.fixture
def kubernetes() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    loaded: dict[str, Any] = yaml.safe_load((EXAMPLES / "kubernetes-job.yaml").read_text("utf-8"))
    return loaded


def test_kubernetes_job_fails_at_once_on_permanent_errors(
    kubernetes: dict[str, Any],
) -> None:
    assert (kubernetes["apiVersion"], kubernetes["kind"]) == ("batch/v1", "Job")
    job, pod = kubernetes["spec"], kubernetes["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    usage, failures, ignore = job["podFailurePolicy"]["rules"]
    for rule, action, code in ((usage, "FailJob", 2), (failures, "FailIndex", 3)):
        assert rule["action"] == action
        assert rule["onExitCodes"] == {
            "containerName": container["name"],
            "operator": "In",
            "values": [code],
        }
    assert ignore["action"] == "Ignore"
    assert ignore["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    # What a podFailurePolicy demands.
    assert pod["restartPolicy"] == "Never"
    assert job["podReplacementPolicy"] == "Failed"
    assert job["backoffLimitPerIndex"] > 0
    assert pod["terminationGracePeriodSeconds"] > 4  # that a batch may take to end


def test_kubernetes_job_tells_each_pod_its_part(kubernetes: dict[str, Any]) -> None:
    job = kubernetes["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert job["completionMode"] == "Indexed"  # sets JOB_COMPLETION_INDEX
    assert int(environment[COUNT_VARIABLE]) == job["completions"] >= job["parallelism"]
    words = container["command"][1:]
    assert build_parser().parse_args(words).part == "auto"
    parts = [
        part_from_environment({**environment, "JOB_COMPLETION_INDEX": str(index)})
        for index in range(job["completions"])
    ]
    assert parts == [Part(index, job["completions"]) for index in range(job["completions"])]


def test_kubernetes_job_mounts_its_paths_and_one_gpu(
    kubernetes: dict[str, Any],
) -> None:
    pod = kubernetes["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == volumes.keys()
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())
    program, *words = container["command"]
    assert program == "extract"  # no shell, which would keep the signals to itself
    assert build_parser().parse_args(words).inputs == ["/images"]
    assert mounts["/images"]["readOnly"]
    assert not mounts["/" + environment["EXTRACTOR_OUT"].split("/")[1]].get("readOnly")
    for cache in ("HF_HOME", "TORCH_HOME"):
        assert "/" + environment[cache].split("/")[1] in mounts
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(
    "path", [GUIDE, *sorted(EXAMPLES.iterdir())], ids=lambda path: str(path.name)
)
def test_every_variable_in_guide_and_examples_is_a_flag(path: Path) -> None:
    flags = {
        option.removeprefix("--").upper().replace("-", "_")
        for action in build_parser()._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    named = set(re.findall(r"EXTRACTOR_([A-Z_]*[A-Z])\b", path.read_text("utf-8")))
    assert named <= flags


def blocks(language: str) -> list[str]:
    """The fenced blocks of the guide in a language."""
    pattern = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [text for name, text in pattern.findall(GUIDE.read_text("utf-8")) if name == language]


def test_every_command_of_the_guide_parses() -> None:
    shown = re.findall(r"^\$ (.*)$", "".join(blocks("")), re.MULTILINE)
    main = 0
    for line in [*"".join(blocks("sh")).splitlines(), *shown]:
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=|sudo$|-u$|extractor$", words[0]):
            words = words[1:]
        if not words or Path(words[0]).name != "extract":
            continue
        words = words[1 : words.index("|") if "|" in words else None]
        if words[0] not in VERBS:
            assert build_parser().parse_args(words).inputs
            main += 1
    assert main >= 5


def test_guide_shows_every_event() -> None:
    lines = [json.loads(line) for line in "".join(blocks("json")).splitlines() if '"event"' in line]
    assert tuple(line["event"] for line in lines) == EVENTS
    source = (ROOT / "extractor" / "terminal" / "json_log.py").read_text("utf-8")
    source += (ROOT / "extractor" / "cli" / "main.py").read_text("utf-8")
    written = set(re.findall(r'\.write\(\s*"(\w+)"', source))
    assert written == set(EVENTS)


def test_guides_name_every_example() -> None:
    text = GUIDE.read_text("utf-8") + CLUSTER_GUIDE.read_text("utf-8")
    for path in EXAMPLES.iterdir():
        assert f"../scripts/examples/{path.name}" in text
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (GUIDE.parent / link).exists(), link

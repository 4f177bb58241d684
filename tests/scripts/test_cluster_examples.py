"""The examples for clusters fit the command, and what KubeRay, Slurm and Docker document."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from extractor.cli.main import VERBS
from extractor.options import Options
from extractor.terminal.parser import build_parser

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "scripts" / "examples"
GUIDE = ROOT / "docs" / "cluster.md"

# Fields that the API reference of ray.io/v1 documents.
JOB_FIELDS = {
    *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint"),
    *("entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy"),
    *("metadata", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes"),
    *("submissionMode", "submitterConfig", "submitterPodTemplate", "suspend"),
    "ttlSecondsAfterFinished",
}
CLUSTER_FIELDS = {
    *("autoscalerOptions", "enableInTreeAutoscaling", "headGroupSpec", "rayVersion", "suspend"),
    *("gcsFaultToleranceOptions", "headServiceAnnotations", "managedBy", "workerGroupSpecs"),
}
HEAD_FIELDS = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
WORKER_FIELDS = {
    *("groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "replicas"),
    *("rayStartParams", "scaleStrategy", "suspend", "template"),
}


@pytest.fixture
def ray_job() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    loaded: dict[str, Any] = yaml.safe_load((EXAMPLES / "rayjob.yaml").read_text("utf-8"))
    return loaded


def pods(ray_job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_ray_job_has_only_fields_that_kuberay_documents(ray_job: dict[str, Any]) -> None:
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    job, cluster = ray_job["spec"], ray_job["spec"]["rayClusterSpec"]
    assert job.keys() <= JOB_FIELDS
    assert cluster.keys() <= CLUSTER_FIELDS
    assert cluster["headGroupSpec"].keys() <= HEAD_FIELDS
    (group,) = cluster["workerGroupSpecs"]
    assert group.keys() <= WORKER_FIELDS
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for each in (cluster["headGroupSpec"], group):
        # KubeRay takes strings only.
        assert all(isinstance(value, str) for value in each["rayStartParams"].values())


def test_ray_job_calls_the_command_on_the_cluster(ray_job: dict[str, Any]) -> None:
    program, *words = shlex.split(ray_job["spec"]["entrypoint"])
    assert program == "extract"
    parsed = build_parser().parse_args(words)
    assert (parsed.engine, parsed.address, parsed.inputs) == ("ray", "auto", ["/images"])


def test_every_ray_node_has_the_same_image_folders_and_user(ray_job: dict[str, Any]) -> None:
    head, worker = pods(ray_job)
    (head_container,), (container,) = head["containers"], worker["containers"]
    for key in ("image", "env", "volumeMounts", "securityContext"):
        assert head_container[key] == container[key]
    assert head["volumes"] == worker["volumes"]
    assert head["securityContext"] == worker["securityContext"]
    assert head["securityContext"]["runAsNonRoot"]
    assert f"\nUSER {head['securityContext']['runAsUser']}\n" in dockerfile()
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == {v["name"] for v in head["volumes"]}
    out = next(each["value"] for each in container["env"] if each["name"] == "EXTRACTOR_OUT")
    assert mounts["/images"]["readOnly"]
    assert not mounts["/" + out.split("/")[1]].get("readOnly")
    assert container["resources"]["limits"].keys() == {"cpu", "memory", "nvidia.com/gpu"}


def dockerfile() -> str:
    return (EXAMPLES / "Dockerfile").read_text("utf-8")


def test_image_runs_as_no_root_with_weights_and_without_the_hub() -> None:
    commands = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", dockerfile())).splitlines()
    commands = [line for line in commands if line.strip()]
    words = {line.split()[0] for line in commands}
    assert words <= {"ARG", "FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "CMD"}
    users = [i for i, line in enumerate(commands) if line.startswith("USER")]
    download = next(i for i, line in enumerate(commands) if "extract download" in line)
    offline = next(i for i, line in enumerate(commands) if "HF_HUB_OFFLINE=1" in line)
    assert len(users) == 1
    assert users[0] < download < offline
    assert "runtime" in commands[0]
    for source in re.findall(r"^COPY (.*) \S+$", "\n".join(commands), re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


def test_image_calls_verbs_that_exist() -> None:
    called = re.findall(r"extract[\" ,]+([a-z]+)", dockerfile().partition("FROM")[2])
    assert set(called) >= {"download", "doctor"}
    assert set(called) & VERBS.keys() == {"download", "doctor"}


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint")
def test_dockerfile_passes_hadolint() -> None:
    command = ["hadolint", str(EXAMPLES / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_ray_script_passes_shellcheck() -> None:
    command = ["shellcheck", "--shell=bash", str(EXAMPLES / "ray.sbatch")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_command_of_the_cluster_guide_parses() -> None:
    text = re.sub(r"\\\n", " ", GUIDE.read_text("utf-8"))
    lines = re.findall(r"^extract .*$", text, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        assert build_parser().parse_args(shlex.split(line, comments=True)[1:]).inputs


def test_cluster_guide_names_its_examples() -> None:
    text = GUIDE.read_text("utf-8")
    for name in ("Dockerfile", "ray.sbatch", "rayjob.yaml", "ray_data.py", "daft_udf.py"):
        assert f"](../scripts/examples/{name})" in text


STUBS = {
    # A step that stays until it is ended, as `ray start --block` does.
    "srun": 'printf "%s " "$@" >> "$HERE/srun"; echo >> "$HERE/srun"\nexec sleep 60\n',
    "ray": 'echo "$@" >> "$HERE/ray"\n[ -z "$RAY_FAILS" ] && [ -e "$HERE/srun" ]\n',
    "scontrol": '[ "$1" = show ] && printf "n1\\nn2\\nn3\\n" || echo "$@" > "$HERE/sc"\n',
    "hostname": "echo 10.0.0.1 10.0.0.2\n",
}


def run_script(folder: Path, extract: str, **environ: str) -> subprocess.Popen[str]:
    (folder / "bin").mkdir()
    words = 'printf "%s\\n" "$@" > "$HERE/words"\n'
    for name, content in {**STUBS, "extract": words + extract}.items():
        path = folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{content}")
        path.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "16", "SLURM_JOB_NODELIST": "n[1-3]"}
    asked = {"HERE": str(folder), "VENV": str(folder), "OUT": "my store", "IMAGES": "my images"}
    return subprocess.Popen(
        ["bash", str(EXAMPLES / "ray.sbatch")],
        env={**os.environ, **slurm, **asked, "SLURM_JOB_NUM_NODES": "3", **environ},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_ray_script_starts_a_head_and_workers_and_passes_the_address(tmp_path: Path) -> None:
    # The steps begin in the background, and end with the script.
    waits = 'until [ "$(wc -l < "$HERE/srun")" = 2 ]; do sleep 0.02; done\n'
    process = run_script(tmp_path, f"{waits}exit 3\n", GPUS="2")
    _, output = process.communicate(timeout=60)
    assert (process.returncode, "some images failed" in output) == (0, True)
    address = "10.0.0.1:20042"
    parsed = build_parser().parse_args((tmp_path / "words").read_text().splitlines())
    assert (parsed.engine, parsed.address, parsed.inputs) == ("ray", address, ["my images"])
    assert parsed.out == "my store"
    head, workers = (tmp_path / "srun").read_text().splitlines()
    assert "--nodelist=n1 ray start --head --node-ip-address=10.0.0.1 --port=20042" in head
    assert f"--nodes=2 --ntasks=2 --exclude=n1 ray start --address={address}" in workers
    for step in (head, workers):
        assert step.rstrip().endswith("--num-cpus=16 --num-gpus=2 --block")


def test_ray_script_on_one_node_starts_only_a_head(tmp_path: Path) -> None:
    process = run_script(tmp_path, "exit 0\n", SLURM_JOB_NUM_NODES="1")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len((tmp_path / "srun").read_text().splitlines()) == 1


def test_ray_script_requeues_an_interrupted_run_and_ends_its_steps(tmp_path: Path) -> None:
    waits = "trap 'exit 143' USR1\ntouch \"$HERE/ready\"\nwhile :; do sleep 0.02; done\n"
    process = run_script(tmp_path, waits)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=30) == 143
        assert (tmp_path / "sc").read_text() == "requeue 42\n"
        with pytest.raises(ProcessLookupError, match="No such process"):
            os.killpg(process.pid, 0)  # no step is left
    finally:
        process.kill()


def test_ray_script_fails_if_the_head_does_not_answer(tmp_path: Path) -> None:
    process = run_script(tmp_path, "exit 0\n", START_SECONDS="0", RAY_FAILS="1")
    _, output = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Ray did not start on n1" in output
    assert not (tmp_path / "words").exists()


@pytest.mark.parametrize("name", ["daft_udf", "ray_data"])
def test_example_takes_the_default_weights(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert f'add_argument("--weights", default="{Options().weights}")' in text

"""Files that run `emt` on clusters: the Slurm script, the Kubernetes manifest and the Dockerfile."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from emt_cli.commands.group import app

ROOT = Path(__file__).parents[1]


def run_script(folder: Path, code: int = 0, **environment: str) -> tuple[int, str]:
    """The Slurm script with a stand-in for `emt`; returns its exit code, and what it called."""
    for name, text in {"emt": f'echo "$@"\nexit {code}', "scontrol": 'echo "scontrol $@"'}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **environment}
    done = subprocess.run([ROOT / "examples" / "slurm.sh", "--json"], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout


def parse(command: str) -> dict[str, object]:
    """Options of a command line of `emt`, as its own parser reads them."""
    _, name, *words = shlex.split(command)
    main = typer.main.get_command(app)
    with main.make_context("emt", [name]) as root:
        return main.get_command(root, name).make_context(name, words, parent=root).params


@pytest.mark.parametrize(
    ("task", "shard"),
    [
        ({}, "0/1"),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "8"}, "3/8"),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"}, "3/4"),
    ],
)
def test_each_task_of_a_slurm_array_does_its_part(tmp_path, task, shard):
    code, called = run_script(tmp_path, **task)
    assert code == 0
    options = parse(f"emt {called}")
    assert (options["shard"], options["json"]) == (shard, True)


def test_a_task_that_was_interrupted_is_queued_again_and_a_failure_is_not(tmp_path):
    code, called = run_script(tmp_path, 130, SLURM_JOB_ID="77")
    assert (code, called.splitlines()[-1]) == (130, "scontrol requeue 77")
    code, called = run_script(tmp_path, 1, SLURM_JOB_ID="77")
    assert (code, "scontrol" in called) == (1, False)


def test_the_kubernetes_job_is_a_command_line_of_emt_on_gpus():
    job = yaml.safe_load((ROOT / "examples" / "kuberay.yaml").read_text())
    assert (job["kind"], job["apiVersion"]) == ("RayJob", "ray.io/v1")
    assert parse(job["spec"]["entrypoint"])["ray"] == "auto"
    cluster = job["spec"]["rayClusterSpec"]
    version = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert cluster["rayVersion"] == version.removeprefix("ray==")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    assert [("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]) for pod in pods] == [False, True]
    for pod in pods:
        assert pod["containers"][0]["securityContext"]["runAsNonRoot"]
        assert pod["volumes"]
        assert pod["containers"][0]["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]


def test_the_image_runs_emt_as_an_ordinary_user_and_copies_what_is_there():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert [text for step, text in steps if step == "USER"] == ["1000:1000"]
    assert steps[-2:] == [["ENTRYPOINT", '["emt"]'], ["CMD", '["--help"]']]
    copied = [name for step, text in steps if step == "COPY" for name in text.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    packages = {"emt", "emt_cli", "kernels", "engines", "pyproject.toml"}
    assert packages <= set(copied), "what pyproject.toml installs"

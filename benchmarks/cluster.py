"""Run `emt transfer --ray` on a cluster of several machines, take one away in mid-run, and check what is there after.

    sudo python benchmarks/cluster.py [--nodes 2] [--loss kill|cable] [--store]

The machines are namespaces of Linux, on one host: each has a network of its own with an address of its own, on a
bridge with the others, and its own processes, host name, /tmp and /dev/shm; what is on disk beside these is shared, as
by NFS. The first is the head, which computes nothing, and on which the driver runs; the others are nodes with a CPU
each. When a third of the clips are done, the last node goes: all its processes at once, or its cable, so that it lives
on, reaches the disk, and nobody reaches it: what it ends then, two journals may name. With --store references and OUT
are in an S3 store (moto's server, on the head) and nothing but the model is shared. Ends with exit code 1 if the run
does, or if a clip is missing, broken, or there twice. Linux only; needs root, and the extras `ray` and `test`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kill_test import check, check_complete, expect, prepare

NETWORK, BRIDGE = "10.203.45", f"emt{os.getpid()}b"
STORE = f"http://{NETWORK}.1:5000"
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "OMP_NUM_THREADS": "1",
    "AWS_ENDPOINT_URL": STORE,
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
_PRIVATE = (
    "mount -t tmpfs none /tmp && mount -t tmpfs -o size=1g none /dev/shm && hostname {name} && exec sleep infinity"
)


class Machine:
    """A machine of namespaces.

    Args:
        number: From 1; of its address.
    """

    def __init__(self, number: int) -> None:
        self.address, self._cable = f"{NETWORK}.{number}", f"emt{os.getpid()}c{number}"
        words = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        self._process = subprocess.Popen([*words, "bash", "-c", _PRIVATE.format(name=f"machine{number}")])
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while not (found := children.read_text().split()):
            time.sleep(0.02)
        self._first = found[0]
        self.network = f"/proc/{self._first}/ns/net"
        inner = f"{self._cable}n"
        _ip(f"link add {self._cable} type veth peer name {inner} netns {self._first}")
        _ip(f"link set {self._cable} master {BRIDGE} up")
        for words_of_ip in (f"addr add {self.address}/24 dev {inner}", f"link set {inner} up", "link set lo up"):
            subprocess.run(["nsenter", "-t", self._first, "-n", "ip", *words_of_ip.split()], check=True)
        while Path(f"/proc/{self._first}/comm").read_text() != "sleep\n":
            time.sleep(0.02)

    def start(self, words: Sequence[str], folder: Path, **options: object) -> subprocess.Popen[str]:
        """Start a program here."""
        inside = ["nsenter", "-t", self._first, "-n", "-m", "-p", "-u", f"--wd={folder}"]
        environment = os.environ | _ENVIRONMENT | {"XDG_CACHE_HOME": f"/tmp/cache-{self.address}"}
        return subprocess.Popen([*inside, *words], env=environment, text=True, **options)  # type: ignore[call-overload]

    def pull_cable(self) -> None:
        """Nobody reaches it any more."""
        _ip(f"link set {self._cable} down")

    def kill(self) -> None:
        """End all its processes at once."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


@contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """Context manager: machines on a bridge."""
    _ip(f"link add {BRIDGE} type bridge")
    found: list[Machine] = []
    try:
        _ip(f"link set {BRIDGE} up")
        for number in range(1, count + 1):
            found.append(Machine(number))
        yield found
    finally:
        for machine in found:
            machine.kill()
        _ip(f"link del {BRIDGE}")


def ray_start(machine: Machine, folder: Path, *words: str) -> None:
    """Start Ray on a machine."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={machine.address}"]
    ended = machine.start(
        [*command, "--object-store-memory=80000000", *words], folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = ended.communicate()[0]
    expect(ended.returncode == 0, f"ray start: {output}")


_MOTO = """
import sys, threading, time
from moto.server import ThreadedMotoServer
ThreadedMotoServer(ip_address=sys.argv[1], port=5000, verbose=False).start()
import boto3, pathlib
client = boto3.client("s3", endpoint_url=f"http://{sys.argv[1]}:5000")
client.create_bucket(Bucket="work")
for path in pathlib.Path("clips").iterdir():
    client.put_object(Bucket="work", Key=f"clips/{path.name}", Body=path.read_bytes())
print("ready", flush=True)
for line in sys.stdin:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="work", Prefix="out/"):
        for entry in page.get("Contents", []):
            copy = pathlib.Path(line.strip(), entry["Key"].removeprefix("out/"))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(client.get_object(Bucket="work", Key=entry["Key"])["Body"].read())
    print("copied", flush=True)
"""


def drop_second_lines(out: Path) -> int:
    """Remove what a second journal says of clips that are done; returns of how many."""
    named: set[str] = set()
    count = 0
    for journal in sorted(out.glob("journal*.jsonl")):
        lines = journal.read_text().splitlines(keepends=True)
        facts = map(json.loads, lines)
        done = [line["id"] if line.get("state") == "done" else "" for line in facts]
        journal.write_text("".join(line for line, name in zip(lines, done, strict=True) if name not in named))
        count += sum(name in named for name in done)
        named |= {name for name in done if name}
    return count


def main(command_line: list[str] | None = None) -> None:
    """Run the test."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--nodes", type=int, default=2, help="beside the head")
    arguments.add_argument("--loss", choices=("none", "kill", "cable"), default="kill", help="of the last node")
    arguments.add_argument("--seeds", type=int, default=10, help="jobs: 3 references × 2 prompts × SEEDS")
    arguments.add_argument("--store", action="store_true", help="references and OUT in an S3 store")
    given = arguments.parse_args(command_line)
    with tempfile.TemporaryDirectory(prefix="emt-cluster-", dir="/var/tmp") as name, machines(given.nodes + 1) as found:
        work, (head, *nodes) = Path(name), found
        prepare(work)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        store = head.start([sys.executable, "-c", _MOTO, head.address], work, **pipes)
        assert store.stdin is not None
        assert store.stdout is not None
        expect(store.stdout.readline() == "ready\n", "the store does not start")
        ray_start(head, work, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")
        for node in nodes:
            ray_start(node, work, f"--address={head.address}:6379", "--num-cpus=1")
        references, out = ("s3://work/clips", "s3://work/out") if given.store else ("clips", "out")
        words = [sys.executable, "-m", "emt_cli.app", "transfer", references, "--prompt", "a red star", "--prompt", "b"]
        words += ["--seeds", f"0-{given.seeds - 1}", "--model", "model", "--device", "cpu", "--json", "-o", out]
        jobs, done, begun = 6 * given.seeds, 0, time.monotonic()
        with (work / "errors").open("w") as errors:
            run = head.start([*words, "--ray", f"{head.address}:6379"], work, stdout=subprocess.PIPE, stderr=errors)
            assert run.stdout is not None
            first = lost = 0.0
            for line in run.stdout:
                done += json.loads(line).get("state") == "done"
                first = first or time.monotonic()
                if given.loss != "none" and not lost and done >= jobs // 3:
                    lost = time.monotonic()
                    (nodes[-1].kill if given.loss == "kill" else nodes[-1].pull_cable)()
            code, ended = run.wait(), time.monotonic()
        said = (work / "errors").read_text()
        print(said.strip()[-1500:], file=sys.stderr)
        expect(code == 0 and "Traceback" not in said, f"the run ended with {code}")
        copy = work / "out"
        if given.store:
            copy = work / "copy"
            print(copy, file=store.stdin, flush=True)
            expect(store.stdout.readline() == "copied\n", "what was made cannot be read")
        twice = drop_second_lines(copy) if given.loss == "cable" else 0
        check(copy, {})
        check_complete(copy, jobs)
        journals = {file.stem: list(map(json.loads, file.read_bytes().splitlines())) for file in copy.glob("*.jsonl")}
        made = {name: sum(line.get("state") == "done" for line in lines) for name, lines in sorted(journals.items())}
        lost_for = f", {ended - lost:.0f} s after the last machine was lost ({given.loss})" if lost else ""
        print(
            f"{jobs} jobs on {given.nodes} machines and a head in {ended - begun:.0f} s, {first - begun:.0f} s to the"
            f" first clip{lost_for}; {'an S3 store' if given.store else 'a shared folder'}: every clip is there once"
            f" and decodes; {twice} are named by two journals. Made by: {made}"
        )


if __name__ == "__main__":
    main()

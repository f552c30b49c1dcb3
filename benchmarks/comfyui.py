"""Queue workflows of the nodes in a ComfyUI that runs, and compare the clip with the library's.

    python main.py --cpu --port 8188                                    # in ComfyUI, set up as docs/comfyui.md says
    python benchmarks/comfyui.py --server http://127.0.0.1:8188 --comfyui ComfyUI

With the demo model: the clip that ComfyUI's own node saves as an animated WebP, without loss, is the library's to the
bit; queued again, nothing is computed; Cancel ends a clip and a batch; a file that is not there, a word that the model
does not know and an option that the program lacks are said in words. Ends with exit code 1 at the first violation.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

import emt

REFERENCE = Path(__file__).parents[1] / "examples" / "references" / "spin.mp4"
PROMPT = "a yellow penguin in the desert"
_LONG = 900.0  # seconds that a workflow may take on a busy CPU


class Server:
    """ComfyUI's HTTP interface."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def send(self, path: str, body: Any = None) -> Any:
        """Answer of a GET request, or of a POST request with a body; of a refused one as well."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else None

    def wait(self, seconds: float = 180.0) -> None:
        """Wait until it answers, for it takes a while to start."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.send("/system_stats")
                return
            except urllib.error.URLError as error:
                if time.monotonic() > end:
                    raise SystemExit(f"nothing answers at {self.address}: {error.reason}") from error
                time.sleep(1)

    def run(self, workflow: dict[str, Any], cancel_after: float | None = None) -> dict[str, Any]:
        """Queue a workflow and wait for its end: its entry in the history, or why it was refused."""
        queued = self.send("/prompt", {"prompt": workflow})
        if "prompt_id" not in queued:
            return dict(queued)
        if cancel_after is not None:
            time.sleep(cancel_after)
            self.send("/interrupt", {})
        end = time.monotonic() + _LONG
        while time.monotonic() < end:
            if entry := self.send(f"/history/{queued['prompt_id']}").get(queued["prompt_id"]):
                return dict(entry)
            time.sleep(0.2)
        raise SystemExit(f"a workflow has not ended after {_LONG:.0f} s")


def workflow(reference: str, prompt: str, **more: Any) -> dict[str, Any]:
    """Nodes by number, as ComfyUI's interface takes them."""
    clip = {"model": ["1", 0], "reference": ["2", 0], "prompt": prompt, "seed": 0, **more}
    saved = {"images": ["3", 0], "filename_prefix": "emt", "fps": 8.0, "lossless": True, "quality": 100}
    side = {"frames": 16, "width": 128, "height": 128, "fit": "crop"}
    return {
        "1": {"class_type": "EMTLoadModel", "inputs": {"model": "demo", "device": "cpu", "precision": "auto"}},
        "2": {"class_type": "EMTLoadReference", "inputs": {"path": reference, **side}},
        "3": {"class_type": "EMTTransferMotion", "inputs": clip},
        "4": {"class_type": "SaveAnimatedWEBP", "inputs": {**saved, "method": "default"}},
    }


def batch(out: Path, **more: Any) -> dict[str, Any]:
    """A workflow of the batch node alone."""
    inputs = {"references": str(REFERENCE), "prompts": PROMPT, "out": str(out), "model": "demo", **more}
    return {"1": {"class_type": "EMTRunBatch", "inputs": inputs}}


def events(entry: dict[str, Any]) -> dict[str, Any]:
    """Execution messages of a workflow, by their names."""
    return dict(entry["status"]["messages"])


def expect(holds: bool, what: str, found: Any) -> None:
    """Print what was checked; end at the first violation."""
    print(f"{'ok' if holds else 'VIOLATION'}: {what}", flush=True)
    if not holds:
        sys.exit(f"found: {json.dumps(found, default=str)[:2000]}")


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder, for its output")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    server, steps = Server(options.server), options.steps
    server.wait()
    nodes = server.send("/object_info")
    print("ComfyUI", server.send("/system_stats")["system"]["comfyui_version"], flush=True)
    names = {name for name in nodes if nodes[name]["category"] == "emt"}
    expect(len(names) == 4, "four nodes are loaded", sorted(names))

    made = server.run(workflow(str(REFERENCE), PROMPT, steps=steps))
    expect(made["status"]["status_str"] == "success", "a workflow ends well", made["status"])
    [file] = made["outputs"]["4"]["images"]
    with Image.open(options.comfyui / "output" / file["subfolder"] / file["filename"]) as picture:
        found = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)])
    pipe = emt.load_pipeline(emt.demo.path())
    clip = emt.read_clip(REFERENCE, frames=16, size=(128, 128))
    [wanted] = pipe.generate(PROMPT, pipe.extract_motion(clip), seed=0, steps=steps)
    expect(np.array_equal(found, wanted), "its clip is the library's to the bit", [found.shape, wanted.shape])

    again = events(server.run(workflow(str(REFERENCE), PROMPT, steps=steps)))
    expect(len(again["execution_cached"]["nodes"]) == 4, "queued again, nothing is computed", again)
    cancelled = events(server.run(workflow(str(REFERENCE), PROMPT, steps=500), cancel_after=10))
    expect("execution_interrupted" in cancelled, "Cancel ends a clip", cancelled)

    refused = server.run(workflow("/nowhere.mp4", PROMPT))
    expect("there is no file or folder" in json.dumps(refused), "a file that is not there is refused", refused)
    unknown = events(server.run(workflow(str(REFERENCE), "a dragon in the desert")))
    said = unknown.get("execution_error", {}).get("exception_message", "")
    expect("words that the model does not know: dragon" in said, "a word that the model does not know", unknown)

    out = options.comfyui / "output" / "emt-batch"
    done = server.run(batch(out, options=f"--steps {steps} --device cpu"))
    expect(done["status"]["status_str"] == "success", "a batch ends well", done["status"])
    expect(len(list(out.glob("*/*.mp4"))) == 1, "its clip is there", str(out))
    for typed, words in (("--stepz 2", "did you mean --steps?"), ("--steps '2", "No closing quotation")):
        said = events(server.run(batch(out, options=typed))).get("execution_error", {}).get("exception_message", "")
        expect(words in said, f"options {typed}: {said.strip()}", said)
    cancelled = events(server.run(batch(out, options="--steps 500 --device cpu", seeds="1-3"), cancel_after=20))
    expect("execution_interrupted" in cancelled, "Cancel ends a batch", cancelled)


if __name__ == "__main__":
    main()

"""`emt transfer --best-of N`: which candidate is kept, the scores of the others, and that it can be made again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from program import FRAMES, SIDE, clip, emt, environment, journal, lines, model, transfer
from safetensors.torch import load_file, save_file

from emt.errors import EmtError
from emt.evaluate.motion import tracklet_fidelity
from emt.evaluate.tracks import track
from emt.video import read_clip
from emt_cli.batch.best_of import BestOf, Candidate
from emt_cli.batch.jobs import Job
from emt_cli.batch.options import MAX_SEED, Settings

pytest.importorskip("cv2")


def frames_of(path: Path) -> np.ndarray:
    return read_clip(path, frames=FRAMES).frames


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Seeds 3 to 5 of one job, each for itself and as candidates of one."""
    folder = tmp_path_factory.mktemp("best-of")
    clip(folder / "a.mp4", 1)
    job = ["a.mp4", "--prompt", "x", "--format", "png", "--batch-size", 3, "--json"]
    alone = sorted(lines(transfer(folder, *job, "--seeds", "3-5", "-o", "alone")), key=lambda line: line["seed"])
    ended = transfer(folder, *job, "--seeds", "3", "--best-of", 3, "-o", "best", "--report")
    assert ended.code == 0, ended.err
    return folder, alone, lines(ended), ended.err


def test_the_truest_candidate_is_kept_under_the_jobs_name(made):
    folder, alone, [best], _ = made
    reference = read_clip(folder / "a.mp4", frames=FRAMES, size=(SIDE, SIDE)).frames
    wanted = track(reference)
    scores = {line["seed"]: tracklet_fidelity(wanted, track(frames_of(folder / line["path"]))) for line in alone}
    kept = max(scores, key=scores.__getitem__)
    assert best["seed"] == kept
    assert best["output"] == alone[0]["output"], "the job's own seed names it, whichever candidate is kept"
    [same] = [line for line in alone if line["seed"] == kept]
    assert np.array_equal(frames_of(folder / same["path"]), frames_of(folder / best["path"]))
    reported = {c["seed"]: c["motion_fidelity"] for c in best["best_of"]["candidates"]}
    assert reported == {seed: pytest.approx(score, abs=1e-4) for seed, score in scores.items()}
    assert len([path for path in (folder / "best").glob("*/*") if path.is_dir()]) == 1, "the others are not kept"


def test_the_choice_is_reported_everywhere(made):
    folder, _, [best], err = made
    [line] = journal(folder / "best")
    record = json.loads((folder / f"{best['path']}.json").read_bytes())
    assert line["best_of"] == record["best_of"] == best["best_of"]
    assert record["best_of"]["first_seed"] == 3
    score = {c["seed"]: c["motion_fidelity"] for c in record["best_of"]["candidates"]}[record["seed"]]
    assert f"best of 3: seed {record['seed']}, motion fidelity {score:.3f}" in err
    assert line["timings"]["measure"] > 0
    page = (folder / "best" / "report.html").read_text()
    assert '"first_seed": 3' in page


def test_rerun_makes_the_kept_clip_again(made):
    """Candidates share a batch; the record knows the seed and the place."""
    folder, _, [best], _ = made
    assert best["batch"]["size"] == 3
    ended = emt("rerun", best["path"], "-o", "again", folder=folder, environment=environment(folder))
    assert ended.code == 0, ended.err
    assert np.array_equal(frames_of(folder / best["path"]), frames_of(folder / "again"))
    assert json.loads((folder / "again.json").read_bytes())["best_of"] == best["best_of"]


def test_another_number_of_candidates_is_another_job(tmp_path):
    clip(tmp_path / "a.mp4")
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"prompt": "y", "best_of": 2}))

    def run(*arguments: object) -> list[dict]:
        return lines(transfer(tmp_path, "a.mp4", "--prompt", "x", "--json", *arguments))

    [one] = run()
    assert "best_of" not in one
    [two] = run("--best-of", 2)
    assert two["state"] == "done"
    assert two["output"].startswith(one["output"].removesuffix(".mp4") + "_"), "the finished clip stays"
    assert two["id"] != one["id"]
    [again, own] = run("--best-of", 2, "--prompts", "jobs.jsonl")
    assert (again["state"], again["best_of"]) == ("skipped", two["best_of"]), "it still says which was kept"
    assert (own["state"], len(own["best_of"]["candidates"])) == ("done", 2), "a job's own line may set it"


def test_a_job_whose_candidates_all_fail_fails_once(tmp_path):
    clip(tmp_path / "a.mp4")
    broken = shutil.copytree(model(), tmp_path / "model")
    [weights] = (broken / "unet").glob("*.safetensors")
    state = load_file(weights)
    state["conv_out.bias"] = state["conv_out.bias"] * float("nan")
    save_file(state, weights, {"format": "pt"})
    ended = transfer(tmp_path, "a.mp4", "--prompt", "x", "--best-of", 3, "--batch-size", 2, "--json", "--model", broken)
    assert ended.code == 1
    [line] = lines(ended)
    assert (line["state"], line["seed"]) == ("failed", 0)
    assert "NaN" in line["error"]


def test_without_opencv_there_is_one_error_before_anything_is_loaded(tmp_path):
    clip(tmp_path / "a.mp4")
    blocked = "import sys; sys.modules['cv2'] = sys.modules['torch'] = None; from emt_cli.app import main; main()"
    for command, code in (("transfer", 1), ("plan", 1)):
        ended = subprocess.run(
            [sys.executable, "-c", blocked, command, "a.mp4", "--prompt", "x", "--best-of", "2", "--model", model()],
            cwd=tmp_path,
            env=os.environ | environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == code
        assert "pip install 'emt-cli[evaluate]'" in ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        assert not (tmp_path / "out").exists()


def test_a_plan_tells_the_time_of_all_candidates(tmp_path):
    clip(tmp_path / "a.mp4")

    def seconds(*options: str) -> float:
        arguments = ["a.mp4", "--prompt", "x", "--device", "cpu", "--model", str(model()), "--json", *options]
        ended = emt("plan", *arguments, folder=tmp_path, environment=environment(tmp_path))
        return json.loads(ended.out.splitlines()[0])["seconds"]

    assert seconds("--best-of", "5") == pytest.approx(5 * seconds(), rel=0.05)


# ---- candidates ---------------------------------------------------------------------------------------------------


def best_of(seed: int, count: int) -> BestOf:
    return BestOf(Job(Path("/a.mp4"), "x", seed, Settings(best_of=count)))


def candidate(seed: int, fidelity: float, frames: np.ndarray | None = None) -> Candidate:
    return Candidate(seed, np.zeros(0) if frames is None else frames, {}, fidelity)


@pytest.mark.parametrize(
    ("scores", "kept"),
    [([0.2, 0.9, 0.4], 11), ([-0.3, -0.5, -0.4], 10), ([0.5, 0.7, 0.7], 11), ([0.9, 0.90004, 0.1], 10)],
)
def test_the_highest_score_wins_and_ties_go_to_the_first_seed(scores, kept):
    """Whatever the order in which candidates are ready: writers measure side by side."""
    for order in permutations(range(3)):
        c = best_of(10, 3)
        ended = [c.add(candidate(10 + i, scores[i]), {"steps": 1.0}, i) for i in order]
        assert ended == [False, False, True]
        assert c.best is not None
        assert c.best.seed == kept
        assert [reported["seed"] for reported in c.record()["best_of"]["candidates"]] == [10, 11, 12]
        assert (c.timings["steps"], c.peak) == (3.0, 2)


def test_a_candidate_that_fails_leaves_the_others():
    c = best_of(0, 3)
    assert not c.fail(0, EmtError("NaN"))
    assert not c.add(candidate(1, -0.8), {}, 0)
    assert c.fail(2, EmtError("out of memory"))
    assert c.best is not None
    assert c.best.seed == 1
    assert c.record()["best_of"]["candidates"][0] == {"seed": 0, "error": "NaN"}


def test_seeds_go_on_from_0_after_the_largest():
    assert [job.seed for job in best_of(MAX_SEED, 3).jobs] == [MAX_SEED, 0, 1]


def test_a_reference_at_rest_keeps_the_candidate_at_rest():
    """Nothing to follow is no undefined score: rest agrees with rest, and motion does not."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 255, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    still = np.stack([scene[:64, :64]] * FRAMES)
    moving = np.stack([scene[:64, 4 * t : 4 * t + 64] for t in range(FRAMES)])
    at_rest, moved = track(still), track(moving)
    scores = [tracklet_fidelity(at_rest, result) for result in (moved, at_rest, at_rest)]
    assert scores[1] == scores[2] == 1 > scores[0]
    c = best_of(0, 3)
    for seed, score in enumerate(scores):
        c.add(candidate(seed, score), {}, 0)
    assert c.best is not None
    assert c.best.seed == 1

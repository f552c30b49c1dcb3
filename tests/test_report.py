"""The page of an output folder: what it holds, and what it does in a browser.

The second part drives headless Chromium and is skipped where there is none (Debian: apt-get install chromium).
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from program import console

from emt.cache import ContentIndex
from emt.errors import EmtError
from emt.storage import write_atomically
from emt.video import probe, read_clip, write_clip
from emt_cli.batch import journal
from emt_cli.batch.jobs import Job, identify, output_name
from emt_cli.batch.journal import Journal, read
from emt_cli.batch.options import Format, Method, Settings
from emt_cli.batch.results import write_result
from emt_cli.report.page import render, write_report
from emt_cli.report.sheet import write_sheet

SETTINGS = Settings(frames=8, height=64, width=64, steps=2)
NASTY = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>",
    "a \"quoted\" <b>bold</b> & 'single' \\u003c @DATA@ ${x}",
    "two\nlines\tand a tab",
    "ein Löwe 🦁 auf dem 月 \u2028 مرحبا بالعالم \u202e override",
    "\udc80 no Unicode",
    "<!-- a comment",
)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def ball(frames: int, side: int = 64, colour: tuple[int, int, int] = (250, 180, 40), cycles: float = 1.0) -> np.ndarray:
    """A disc on a round path; its place tells the frame."""
    y, x = np.mgrid[:side, :side] / side
    clip = np.empty((frames, side, side, 3), np.uint8)
    for i in range(frames):
        angle = 2 * np.pi * cycles * i / frames
        disc = (x - 0.5 - 0.3 * np.cos(angle)) ** 2 + (y - 0.5 - 0.3 * np.sin(angle)) ** 2 < 0.02
        clip[i] = np.where(disc[..., None], colour, np.uint8(40 + 60 * y)[..., None])
    return clip


class Folder:
    """An output folder as a run leaves it, made with the run's own writers."""

    def __init__(self, path: Path) -> None:
        self.path, self.log, self.index = path, Journal(path), ContentIndex(path.parent / "index")

    def done(self, job: Job, frames: np.ndarray | Path, fps: float = 8.0, **more: Any) -> Path:
        """A finished job; its clip is written, or copied if it is a path."""
        sha256 = self.index.sha256(job.reference)
        output = output_name(job, sha256)
        record = {
            "id": identify(job, reference=sha256, model="m", precision="fp32"),
            "reference": str(job.reference),
            "prompt": job.prompt,
            "seed": job.seed,
            "settings": job.settings.as_dict(),
            "reference_sha256": sha256,
            "model": "tiny",
        }
        clip = self.path / output
        if isinstance(frames, Path):
            clip.parent.mkdir(exist_ok=True)
            shutil.copyfile(frames, clip)
        else:
            write_result(clip, frames, fps, record)
        status = clip.stat()
        line = {
            "event": "job",
            "output": str(output),
            **record,
            "state": "done",
            "timings": {"decode": 0.5, "steps": 2},
        }
        self.log.append(
            {**line, "peak_memory": 3 << 30, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, **more}
        )
        return clip

    def failed(self, error: str, hint: str = "", **known: Any) -> None:
        self.log.append({"event": "job", **known, "state": "failed", "error": error, "hint": hint})


@pytest.fixture(name="walk")
def make_walk(tmp_path):
    """A reference elsewhere, in a format that browsers do not play, of which jobs use the second half."""
    return write_clip(tmp_path / "clips" / "walk this way.gif", ball(32, 48, cycles=2), 16)


@pytest.fixture(name="folder")
def make_folder(tmp_path):
    return Folder(tmp_path / "out dir #1")


def embedded(page: Path) -> dict[str, Any]:
    """The data of a page, found as a browser finds it: up to the first end of a script."""
    text = page.read_text(encoding="utf-8")
    start = text.index('<script type="application/json" id="data">')
    return json.loads(text[text.index(">", start) + 1 : text.index("</script", start)])


# ---- the file -----------------------------------------------------------------------------------------------------


def test_reference_copies_hold_exactly_the_frames_that_the_job_sampled(folder, walk):
    settings = replace(SETTINGS, start=1.0, stride=2, fit=SETTINGS.fit)
    folder.done(Job(walk, "a robot", 3, settings), ball(8))
    data = embedded(write_report(folder.path))
    (reference,), (job,) = data["references"], data["jobs"]
    copy = read_clip(folder.path / reference["src"], frames=8)
    expected = read_clip(walk, frames=8, size=(64, 64), start=1.0, stride=2)
    assert probe(copy.info.path).frames == reference["frames"] == 8
    assert np.abs(copy.frames.astype(int) - expected.frames).mean() < 4
    assert reference["fps"] == pytest.approx(expected.fps)
    assert job["result"]["fps"] == pytest.approx(8)
    assert (job["state"], job["prompt"], job["seed"], job["reference"]) == ("done", "a robot", 3, "walk this way.gif")
    assert reference["poster"].startswith("data:image/jpeg;base64,")


def test_texts_of_jobs_stay_texts(folder, walk):
    for seed, prompt in enumerate(NASTY):
        folder.failed(prompt, prompt, reference=str(walk), prompt=prompt, seed=seed, output=f"x/{seed}.mp4")
    page = write_report(folder.path)
    text = page.read_text(encoding="utf-8")
    assert text.count("</script") == 2, "the data's end and the program's"
    assert "<!--" not in text
    reported = {job["prompt"] for job in embedded(page)["jobs"]}
    assert reported == set(NASTY)


def test_the_last_word_on_a_job_counts(folder, walk):
    job = Job(walk, "a robot", 0, SETTINGS)
    folder.failed("no prompt", "Give one.", reference=str(walk))
    folder.failed("the line is not JSON", origin="jobs.jsonl line 3")
    folder.failed("out of memory", reference=str(walk), prompt="a robot", seed=0)
    folder.done(job, ball(8))
    states = [(job["state"], job.get("error")) for job in embedded(write_report(folder.path))["jobs"]]
    assert states == [("done", None), ("failed", "the line is not JSON")]


@pytest.mark.parametrize("format", Format)
def test_results_of_every_format_are_playable(folder, walk, format):
    job = Job(walk, "a robot", 0, replace(SETTINGS, format=format))
    clip = folder.done(job, ball(8))
    result = embedded(write_report(folder.path))["jobs"][0]["result"]
    shown = folder.path / result["src"]
    assert shown.suffix in (".mp4", ".webm")
    assert (shown == clip) == (format in (Format.MP4, Format.WEBM))
    assert probe(shown).frames == result["frames"] == 8


def test_what_cannot_be_shown_has_a_note(folder, tmp_path, walk):
    broken, short = tmp_path / "broken.mp4", write_clip(tmp_path / "short.mp4", ball(3), 8)
    broken.write_bytes(b"no video")
    os.mkfifo(tmp_path / "pipe.mp4")
    gone = tmp_path / "gone.mp4"
    for name in (broken, short, gone, tmp_path / "pipe.mp4"):
        folder.failed("it failed", reference=str(name), prompt="x", seed=0, settings=SETTINGS.as_dict())
    folder.failed("no reference")
    changed = write_clip(tmp_path / "changed.mp4", ball(9), 8)
    folder.done(Job(changed, "x", 1, SETTINGS), ball(8)).unlink()
    write_clip(changed, ball(10), 8)
    data = embedded(write_report(folder.path))
    notes = {job.get("reference"): data["references"][job["media"]]["note"] for job in data["jobs"] if "media" in job}
    assert all(notes[name] for name in ("broken.mp4", "short.mp4", "gone.mp4", "pipe.mp4"))
    assert "changed since" in notes["changed.mp4"]
    assert "cannot read" in next(job for job in data["jobs"] if job["state"] == "done")["result"]["note"]


def test_a_second_report_is_the_same_and_reads_no_clip_again(folder, walk, monkeypatch):
    for seed in range(3):
        folder.done(Job(walk, f"robot {seed}", seed, SETTINGS), ball(8))
    first = write_report(folder.path).read_bytes()
    walk.unlink()
    monkeypatch.setattr("emt.video.read_clip", None)
    assert write_report(folder.path).read_bytes() == first


def test_a_page_elsewhere_refers_to_the_clips(folder, walk, tmp_path):
    folder.done(Job(walk, "a robot", 0, SETTINGS), ball(8))
    page = write_report(folder.path, tmp_path / "pages" / "mine.html")
    assert embedded(page)["jobs"][0]["result"]["src"].startswith("../out%20dir%20%231/walk-this-way_")


def test_measures_are_shown_until_a_clip_is_made_anew(folder, walk):
    old, new = (folder.done(Job(walk, "a robot", seed, SETTINGS), ball(8), mtime_ns=seed) for seed in (0, 1))
    rows = [
        {"result": str(Path("elsewhere", *clip.parts[-2:])), "motion_fidelity": 0.5, "camera": None}
        for clip in (old, new)
    ]
    summary = {"summary": {"motion_fidelity": {"value": 0.5, "low": 0.4, "high": 0.6, "clips": 2}}}
    content = "\n".join(map(json.dumps, [*rows, summary])) + "\nnot JSON\n"
    write_atomically(folder.path / "metrics.jsonl", content.encode())
    [last] = [line for line in read(folder.path) if line["output"] == str(new.relative_to(folder.path))]
    folder.log.append({**last, "mtime_ns": time.time_ns() + 10**9})
    data = embedded(write_report(folder.path))
    assert [job.get("metrics") for job in data["jobs"]] == [{"motion_fidelity": 0.5}, None]
    assert data["summaries"] == [summary["summary"]]


def test_a_folder_without_a_journal_is_refused(tmp_path):
    with pytest.raises(EmtError, match=r"has no journal\.jsonl") as error:
        write_report(tmp_path)
    assert "emt report OUT" in error.value.hint
    with pytest.raises(EmtError, match="is not a folder"):
        write_report(tmp_path / "nothing")


def test_the_program_prints_the_page(folder, walk):
    folder.done(Job(walk, "a robot", 0, SETTINGS), ball(8))
    ended = console(folder.path.parent, "report", folder.path.name)
    assert (ended.returncode, ended.stdout) == (0, f"{folder.path.name}/report.html\n"), ended.stderr
    ended = console(folder.path.parent, "report", "nothing")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: nothing is not a folder")


@pytest.mark.parametrize(
    ("name", "size", "frames"), [("sheet.gif", (286, 170), 8), ("a.png", (71 + 2 * 520, 2 * 153), 1)]
)
def test_a_sheet_has_each_result_below_its_reference(folder, walk, name, size, frames):
    """Of three finished jobs, the last of them smaller; what failed is not on it."""
    for seed, prompt in enumerate(NASTY[:2]):
        folder.done(Job(walk, prompt, seed, SETTINGS), ball(8, colour=(30, 60, 250)))
    folder.done(Job(walk, "z", 2, replace(SETTINGS, height=48, width=48)), ball(8, side=48))
    folder.failed("out of memory", reference=str(walk), prompt="y", seed=3, settings=SETTINGS.as_dict())
    path = folder.path.parent / name
    ended = console(folder.path.parent, "report", folder.path.name, "--sheet", name)
    assert (ended.returncode, ended.stdout) == (0, f"{name}\n"), ended.stderr
    with Image.open(path) as sheet:
        assert sheet.size == size
        assert getattr(sheet, "n_frames", 1) == frames
        left, top = 71, 34 if frames > 1 else 17  # beside the labels, below two lines of a prompt or one
        above, below = (np.asarray(sheet.convert("RGB"))[y : y + 64, left : left + 64] for y in (top, top + 64))
    yellow, blue = (
        np.argwhere(np.abs(np.int32(image) - np.int32(colour)).sum(-1) < 120)
        for image, colour in ((above, (250, 180, 40)), (below, (30, 60, 250)))
    )
    assert len(yellow) > 50
    assert len(blue) > 50
    assert len(np.argwhere(np.abs(np.int32(above) - np.int32((30, 60, 250))).sum(-1) < 120)) == 0


def test_a_sheet_that_cannot_be_made_is_refused(folder, walk):
    folder.failed("out of memory", reference=str(walk), prompt="y", seed=3)
    for name, said in (("sheet.txt", "names no format"), ("sheet.png", "no finished clips")):
        ended = console(folder.path.parent, "report", folder.path.name, "--sheet", name)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert said in ended.stderr


def test_k3_a_page_or_a_sheet_takes_the_place_of_no_clip_and_of_no_journal(folder, walk):
    clip = folder.done(Job(walk, "a robot", 0, SETTINGS), ball(8))
    kept = {path: path.read_bytes() for path in (walk, clip, folder.path / journal.FILE_NAME)}
    for path in kept:
        with pytest.raises(EmtError, match="is not replaced"):
            write_report(folder.path, path)
    for path in (walk, clip):
        with pytest.raises(EmtError, match="is one of the clips"):
            write_sheet(path, journal.current(folder.path), folder.path)
    assert {path: path.read_bytes() for path in kept} == kept
    page = write_report(folder.path, folder.path.parent / "page.html")
    assert write_report(folder.path, page) == page, "a page takes the place of a page"


# ---- folders of strangers -----------------------------------------------------------------------------------------

DEEP = b"[" * 100_000 + b"]" * 100_000


def note_of(entry: dict[str, Any]) -> str:
    assert not {"poster", "src", "link"} & entry.keys(), "nothing of it is shown"
    return entry["note"]


def test_k6_a_reference_that_was_not_recorded_is_not_shown(folder, walk, tmp_path):
    private = write_clip(tmp_path / "private.mp4", ball(9), 8)
    folder.failed("it failed", reference=str(private), prompt="x", seed=0, settings=SETTINGS.as_dict())
    folder.done(Job(walk, "y", 1, SETTINGS), ball(8), reference=str(private))
    data = embedded(write_report(folder.path))
    notes = [note_of(data["references"][job["media"]]) for job in data["jobs"]]
    assert sorted(notes) == ["The job has ended before its reference was read.", "The reference has changed since."]
    ended = console(folder.path.parent, "report", folder.path.name, "--sheet", "sheet.png")
    assert ended.returncode == 1
    assert "left out:" in ended.stderr
    assert not (folder.path.parent / "sheet.png").exists()


@pytest.mark.parametrize("kind", ["clip", "folder", "parent", "frames"])
def test_k6_a_result_that_is_a_link_out_of_the_folder_is_not_shown(folder, walk, tmp_path, kind):
    format = Format.PNG if kind in ("folder", "frames") else Format.MP4
    clip = folder.done(Job(walk, "y", 1, replace(SETTINGS, format=format)), ball(8))
    moved = {"parent": clip.parent, "frames": min(clip.iterdir()) if clip.is_dir() else clip}.get(kind, clip)
    elsewhere = moved.rename(tmp_path / f"elsewhere{moved.suffix}")
    moved.symlink_to(elsewhere, target_is_directory=elsewhere.is_dir())
    [job] = embedded(write_report(folder.path))["jobs"]
    assert note_of(job["result"]) == "The result is a link out of the folder."


def test_k6_the_reports_own_folder_may_not_lead_out(folder, walk, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder.path / "report").symlink_to(tmp_path / "elsewhere")
    folder.done(Job(walk, "y", 1, SETTINGS), ball(8))
    [job] = embedded(write_report(folder.path))["jobs"]
    assert job["result"]["src"].endswith(".mp4")
    assert not list((tmp_path / "elsewhere").iterdir())


KEPT = {"fps": 8, "frames": 8, "width": 8, "height": 8, "poster": "data:image/jpeg;base64,", "copy": False}


@pytest.mark.parametrize(
    "change",
    [
        *({"poster": "https://example.com/x.jpg"}, {"poster": None}, {"fps": float("nan")}, {"fps": 0}, {"fps": "8"}),
        *({"frames": 0}, {"frames": 1.5}, {"width": "wide"}, {"height": -1}, {"copy": 1}, {"copy": True}),
    ],
)
def test_k6_what_is_kept_of_a_clip_is_taken_as_it_was_written_or_not_at_all(folder, walk, change):
    folder.done(Job(walk, "y", 1, SETTINGS), ball(8))
    page = write_report(folder.path)
    first = embedded(page)
    for path in (folder.path / "report").glob("*.json"):
        path.write_text(json.dumps({**KEPT, "src": "https://example.com/", **change}))
    for path in (folder.path / "report").glob("*.mp4"):
        path.unlink()
    assert embedded(write_report(folder.path)) == first


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", DEEP, b"\xff"])
def test_k5_damaged_entries_are_made_again(folder, walk, content):
    folder.done(Job(walk, "y", 1, SETTINGS), ball(8))
    first = embedded(write_report(folder.path))
    for path in (folder.path / "report").glob("*.json"):
        path.write_bytes(content)
    assert embedded(write_report(folder.path)) == first


HOSTILE = {
    "settings": [None, [], {"frames": "many"}, {"frames": 0}, {"width": 1e308}, {"fit": "x"}, {"frames": {}}],
    "reference": ["", "\0", "x" * 300, 7, "/dev/zero", ".", "/proc/self/mem"],
    "output": ["\0", "x" * 300, ".", "a/b/c.mp4", 7, "../../etc/passwd", "/etc/passwd"],
    "prompt": [7, None, ["a"], "\ud800"],
    "seed": ["0", -1, 1e400, 2**70],
    "timings": [{"steps": "x"}, {"steps": 10**400}, [], 7],
    "best_of": [{"candidates": [None]}, 7],
    "batch": [{"size": "x"}, 7],
    "peak_memory": ["x", -1, 1e400, 10**400],
    "finished": [7, "\x1b[31m"],
    "mtime_ns": ["x", 1e400],
    "model": [7, {"a": {"b": [1e400]}}],
    "id": [7, DEEP.decode()],
}


def test_k5_a_hostile_journal_is_a_page_and_every_sound_job_is_on_it(folder, walk, browser_or_none):
    """Each line is a good one with one value of another kind."""
    folder.done(Job(walk, "sound", 0, SETTINGS), ball(8))
    good = json.loads((folder.path / "journal.jsonl").read_text().splitlines()[-1])
    damaged = [
        json.dumps({**good, "prompt": "odd", "output": f"{field}/{number}.mp4", field: value})
        for field, values in HOSTILE.items()
        for number, value in enumerate(values)
    ]
    with open(folder.path / "journal.jsonl", "a") as file:
        file.write("\n".join([*damaged, DEEP.decode(), "[]", "null", '{"event": "job"}']) + "\n")
    page = write_report(folder.path)
    assert "passwd" not in page.read_text(encoding="utf-8")
    jobs = embedded(page)["jobs"]
    assert ["src" in job["result"] for job in jobs if job.get("prompt") == "sound"] == [True]
    if browser_or_none:
        assert shown(opened(browser_or_none, page)) == len(jobs)
        assert browser_or_none.complaints == []
    ended = console(folder.path.parent, "report", folder.path.name, "--sheet", "sheet.png")
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr


def test_k5_hostile_measures_leave_a_page_with_the_sound_ones(folder, walk, browser_or_none):
    clips = [folder.done(Job(walk, f"robot {seed}", seed, SETTINGS), ball(8), mtime_ns=0) for seed in range(3)]
    values = [float("nan"), float("inf"), "x", None, True, [1], {"a": 1}, 10**400]
    rows: list[Any] = [{"result": str(clips[0]), "motion_fidelity": 0.5, "camera": value} for value in values]
    rows += [{"result": str(clips[1]), "motion_fidelity": value} for value in values]
    rows += [{"result": value} for value in (7, None, [], "", "\0", {})] + [[], 7, None]
    rows += [{"summary": value} for value in (7, [], {"camera": 7}, {"camera": {"value": float("nan")}})]
    rows += [{"summary": {"motion_fidelity": {"value": 0.5, "low": float("nan"), "high": "x"}, "leakage": None}}]
    lines = "\n".join(map(json.dumps, rows)).encode()
    (folder.path / "metrics.jsonl").write_bytes(lines + b"\n\xff\n" + DEEP + b"\n{\n")
    page = write_report(folder.path)
    data = embedded(page)
    assert [job.get("metrics") for job in data["jobs"]] == [{"motion_fidelity": 0.5}, None, None]
    assert data["summaries"] == [{"motion_fidelity": {"value": 0.5}}]
    if browser_or_none:
        assert shown(opened(browser_or_none, page)) == 3
        assert browser_or_none.complaints == []


def test_k4_pipes_in_the_folder_are_not_waited_for(folder, walk):
    folder.done(Job(walk, "y", 1, SETTINGS), ball(8))
    write_report(folder.path)
    for path in [folder.path / "metrics.jsonl", *(folder.path / "report").glob("*.json")]:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    ended = console(folder.path.parent, "report", folder.path.name)
    assert ended.returncode == 0, ended.stderr


def test_k8_jobs_that_failed_without_an_output_are_shown_in_linear_time(folder, walk):
    line = {"event": "job", "state": "failed", "error": "x", "reference": str(walk)}
    with open(folder.path / "journal.jsonl", "a") as file:
        file.writelines(json.dumps({**line, "prompt": f"a fox {number}"}) + "\n" for number in range(8000))
    begun = time.process_time()
    assert len(embedded(write_report(folder.path))["jobs"]) == 8000
    assert time.process_time() - begun < 4, "4,000 took 3.6 s, and the time grew with their square"


def test_k8_first_frames_of_many_clips_are_files_beside_the_page(folder, walk, monkeypatch):
    monkeypatch.setattr("emt_cli.report.gallery._EMBEDDED", 2000)
    for seed in range(4):
        folder.done(Job(walk, f"robot {seed}", seed, SETTINGS), ball(8, colour=(60 * seed, 0, 0)))
    posters = [job["result"]["poster"] for job in embedded(write_report(folder.path))["jobs"]]
    assert posters[-1].startswith("report/")
    assert Image.open(folder.path / posters[-1]).size == (64, 64)


# ---- in a browser -------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium (Debian: apt-get install chromium)")

PLAYING = "[...document.querySelectorAll('.card')].map(c => c.card.pair.players).filter(p => p.length === 2)"
FRAMES = PLAYING + ".map(players => players.map(player => player.video.currentTime * player.fps))"
WATCHED = f"""new Promise(resolve => {{
  const seen = [], began = performance.now();
  const look = () => {{
    seen.push(...{FRAMES});
    performance.now() - began < 3000 ? requestAnimationFrame(look) : resolve(seen);
  }};
  look();
}})"""


@pytest.fixture(scope="module")
def browser_or_none(tmp_path_factory):
    if not CHROMIUM:
        yield None
        return
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(name="browser", scope="module")
def start_browser(browser_or_none):
    return browser_or_none


def opened(browser: Browser, page: Path) -> Browser:
    browser.call("Page.navigate", url="about:blank")  # what the last page was still doing is none of this one's
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(page)
    return browser


def shown(browser: Browser) -> int:
    return browser("document.querySelectorAll('.card:not([hidden])').length")


def choose(browser: Browser, control: str, value: str) -> None:
    """Give a control a value, as a user does."""
    events = "for (const name of ['input', 'change']) node.dispatchEvent(new Event(name))"
    browser(f"{{const node = document.querySelector('{control}'); node.value = {json.dumps(value)}; {events}}}")


@pytest.fixture(name="gallery", scope="module")
def make_gallery(tmp_path_factory):
    """Four references, each with a finished job of 8 and one of 24 frames a second, and three that failed."""
    root = tmp_path_factory.mktemp("gallery")
    folder = Folder(root / "out")
    for i in range(4):
        clip = write_clip(root / "clips" / f"clip {i}.mp4", ball(48, 96, cycles=i + 1), 24)
        for prompt, fps in (("a slow fox", 8), ("a quick hare", 24)):
            settings = replace(SETTINGS, frames=24, fps=fps)
            folder.done(Job(clip, prompt, i, settings), ball(24, colour=(60, 200, 60 * i), cycles=i + 1), fps)
    for prompt in NASTY[:3]:
        folder.failed("out of memory", "Try --size 32x32.", reference=str(clip), prompt=prompt, seed=1, output=prompt)
    return write_report(folder.path)


@needs_browser
def test_the_page_is_whole_and_asks_for_nothing_from_outside(browser, gallery):
    page = opened(browser, gallery)
    assert page("document.createElement('video').canPlayType('video/mp4; codecs=\"avc1.640028\"')") == "probably"
    page.wait("[...document.querySelectorAll('video')].some(video => video.classList.contains('ready'))")
    assert shown(page) == 11
    assert page("document.title") == "out · emt report"
    assert page("[...document.images].every(image => image.alt && image.naturalWidth)")
    prompts = page("[...document.querySelectorAll('.prompt')].map(node => node.textContent)")
    assert set(prompts) == {"a slow fox", "a quick hare", *NASTY[:3]}
    assert "out of memory" in page("document.querySelector('.note.failed').textContent")
    folder = gallery.parent.as_uri()
    assert page.requests
    assert all(url.startswith(folder) for url in page.requests), page.requests
    assert page.complaints == []


@needs_browser
@pytest.mark.parametrize("speed", ["1", "2"])
def test_reference_and_result_play_within_a_frame_of_each_other(browser, gallery, speed):
    page = opened(browser, gallery)
    choose(page, "#search", "quick" if speed == "1" else "slow")
    choose(page, "#speed", speed)
    page.wait("document.querySelectorAll('video.ready').length === 8 && !document.querySelector('video').paused", 30)
    seen = page(WATCHED)
    apart = [min(abs(a - b), 24 - abs(a - b)) for a, b in seen]
    assert len(seen) > 60
    assert max(a for a, _ in seen) - min(a for a, _ in seen) > 4, "it moves"
    assert max(apart) < 1, f"frames apart: {sorted(apart)[-5:]}"
    assert page.complaints == []


@needs_browser
def test_paused_both_stand_on_the_same_frame(browser, gallery):
    page = opened(browser, gallery)
    page.wait("document.querySelectorAll('video.ready').length >= 4")
    page.press(" ", " ")
    frames = FRAMES + ".flat().map(Math.floor)"
    for frame in (0, 5, 23):
        choose(page, "#scrub", str(frame))
        page.wait(f"{frames}.every(f => f === {frame})")
    page.press("ArrowRight")
    page.wait(f"{frames}.every(f => f === 0)")
    page.press("ArrowLeft")
    page.wait("document.querySelector('#frame').textContent === '24 / 24'")
    page.press(" ", " ")
    page.wait("!document.querySelector('video').paused")


@needs_browser
def test_filters_leave_the_jobs_that_fit(browser, gallery):
    page = opened(browser, gallery)
    choose(page, "#search", "FOX slow")
    assert shown(page) == 4
    choose(page, "#reference", page("data.jobs.find(job => job.reference === 'clip 2.mp4').path"))
    assert shown(page) == 1
    page("document.querySelector('[name=state][value=failed]').click()")
    assert shown(page) == 0
    assert page("document.querySelector('#empty').checkVisibility()")
    choose(page, "#search", "")
    choose(page, "#reference", "")
    assert shown(page) == 3
    assert page("document.querySelector('#count').textContent") == "3 of 11"
    choose(page, "#search", "<script>")
    assert shown(page) == 1


@needs_browser
def test_a_click_shows_settings_and_a_key_hides_them(browser, gallery):
    page = opened(browser, gallery)
    page("document.querySelector('.prompt').click()")
    text = page("document.querySelector('#dialog').innerText")
    assert all(
        part in text for part in ("a quick hare", "steps\n2", "tiny", "clip 0.mp4", "3.00 GiB", "2.50 (decode 0.50")
    )
    page.wait("document.querySelectorAll('#dialog video.ready').length === 2")
    assert page("document.querySelectorAll('video').length") == 2, "the others rest"
    assert page("document.querySelector('#dialog #play').checkVisibility()"), "as the rest of the page is out of reach"
    page.press("Escape")
    page.wait("!document.querySelector('#dialog').open && document.querySelector('.bar #play')")
    page.wait("document.querySelectorAll('.card video').length >= 4")
    assert page.complaints == []


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_system_until_the_reader_chooses(browser, gallery, scheme):
    page = opened(browser, gallery)
    page("localStorage.clear()")
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    page.call("Emulation.setEmulatedMedia", features=features)
    page.open(gallery)
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(part => part > 200)"
    assert page(brightness) == (scheme == "light")
    page("document.querySelector('#theme').click()")
    assert page(brightness) == (scheme == "dark")
    page.wait("document.querySelector('video.ready')")
    assert page("document.querySelector('video').paused"), "who wants little motion starts it"
    page("localStorage.clear()")
    page.call("Emulation.setEmulatedMedia", features=[])


@needs_browser
def test_500_jobs_are_there_at_once_with_a_handful_of_videos(browser, tmp_path, walk):
    folder = Folder(tmp_path / "out")
    first = folder.done(Job(walk, "robot 0", 0, SETTINGS), ball(8))
    for seed in range(1, 500):
        folder.done(Job(walk, f"robot {seed}", seed, SETTINGS), first)
    path = write_report(folder.path)
    for _ in range(3):  # the machine may be busy
        page = opened(browser, path)
        took = page("performance.getEntriesByType('navigation')[0].domInteractive")
        if took < 4000:
            break
    assert took < 4000, f"{took:.0f} ms"
    assert shown(page) == 500
    page.wait("document.querySelectorAll('video.ready').length > 4")
    most = 0
    for _ in range(20):
        page("scrollBy(0, 2500)")
        time.sleep(0.05)
        most = max(most, page("document.querySelectorAll('video').length"))
    page("scrollTo(0, document.body.scrollHeight)")
    page.wait("[...document.querySelectorAll('.card')].at(-1).querySelectorAll('video.ready').length === 2")
    page.wait("!document.querySelector('.card:first-child video')")
    assert max(most, page("document.querySelectorAll('video').length")) <= 48
    began = time.monotonic()
    choose(page, "#search", "robot 49")
    assert shown(page) == 15
    assert time.monotonic() - began < 10
    assert page.complaints == []


# ---- measures, comparison, widths and size ---------------------------------------------------------------------------


def measured(out: Path, shift: float) -> Folder:
    """A folder with four references, two prompts each; fidelity rises with the reference, of one there is no camera."""
    folder, rows = Folder(out), []
    for i in range(4):
        clip = out.parent / "clips" / f"clip {i}.mp4"
        if not clip.exists():
            write_clip(clip, ball(48, 96, cycles=i + 1), 24)
        for number, prompt in enumerate(("a slow fox", "a quick hare")):
            how = {"steps": 2, "method": Method.GUIDANCE} if shift else {"steps": 8}
            settings = replace(SETTINGS, frames=24, fps=24, **how)
            result = folder.done(Job(clip, prompt, i, settings), ball(24, cycles=i + 1), 24, mtime_ns=0)
            values = {"motion_fidelity": round(0.2 * i + 0.01 * number + shift, 3), "camera": 0.5 if i else None}
            others = {"temporal_consistency": 0.9, "text_alignment": 0.95, "leakage": -0.02, "pan_x_gain": 0.64}
            rows.append({"result": str(result), **values, **others})
    summary = {"motion_fidelity": {"value": 0.3 + shift, "low": 0.1, "high": 0.5, "clips": 8}}
    (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"summary": summary}])))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    first, second = measured(root / "first", 0.0), measured(root / "second", 0.1)
    clip = str(root / "clips" / "clip 3.mp4")
    second.failed("out of memory", "Try less.", reference=clip, prompt="a whale", seed=9)
    return first.path, second.path


def cells(page: Browser, selector: str) -> list[str]:
    return page(f"[...document.querySelectorAll('.card:not([hidden]) {selector}')].map(node => node.textContent)")


@needs_browser
def test_jobs_are_sorted_and_filtered_by_a_measure_that_is_explained(browser, two):
    page = opened(browser, write_report(two[0]))
    choose(page, "#sort", "motion_fidelity-")
    assert cells(page, ".number") == [f"seed {seed}" for seed in (3, 3, 2, 2, 1, 1, 0, 0)]
    assert cells(page, ".prompt")[:2] == ["a quick hare", "a slow fox"]
    assert "as those of the reference do" in page("document.querySelector('#meaning').innerText")
    choose(page, "#sort", "camera+")
    assert cells(page, ".number")[-2:] == ["seed 0", "seed 0"], "what has no value comes last"
    choose(page, "#sort", "")
    choose(page, "#measure", "motion_fidelity")
    choose(page, "#limit", "0.39")
    assert cells(page, ".number") == ["seed 2"] * 2 + ["seed 3"] * 2
    choose(page, "#relation", "-1")
    assert shown(page) == 4
    choose(page, "#measure", "pan_x_gain")
    assert "1 is as far" in page("document.querySelector('#meaning').innerText")
    assert shown(page) == 0
    page("document.querySelector('#measures').open = true")
    reported = page("document.querySelector('#measures').innerText")
    assert reported.count("\n") >= 5
    assert "motion fidelity" in reported
    assert page.complaints == []


@needs_browser
def test_cards_of_one_reference_prompt_and_seed_say_by_what_they_differ(browser, folder, walk, tmp_path):
    changes: tuple[dict[str, Any], ...] = (
        {}, {"lora": ("styles/ink.safetensors:0.8",)}, {"lora": ("ink.safetensors:1",), "steps": 3},
    )  # fmt: skip
    for number, change in enumerate(changes):
        folder.done(Job(walk, "a fox", 0, replace(SETTINGS, **change)), ball(8), output=f"{number}.mp4")
    folder.done(Job(walk, "a fox", 1, SETTINGS), ball(8))
    page = opened(browser, write_report(folder.path))
    expected = ["steps 2", "steps 2 · lora ink.safetensors:0.8", "steps 3 · lora ink.safetensors:1"]
    assert sorted(cells(page, ".differing")) == sorted(expected), "the clip of another seed needs no such line"
    assert page.complaints == []
    plain = Folder(tmp_path / "with or without")
    for number, lora in enumerate((None, ("ink.safetensors:1",))):
        plain.done(Job(walk, "a fox", 0, replace(SETTINGS, lora=lora)), ball(8), output=f"{number}.mp4")
    page = opened(browser, write_report(plain.path))
    assert sorted(cells(page, ".differing")) == ["lora ink.safetensors:1", "no lora"]


@needs_browser
def test_methods_are_shown_filtered_by_and_compared(browser, two, tmp_path):
    first, second = two
    page = opened(browser, write_report(first, tmp_path / "both.html", compare=second))
    table = page("[...document.querySelectorAll('#methods tr')].map(row => row.innerText.split('\\t').slice(0, 3))")
    assert table[1:] == [["adapter", "8", "0.30"], ["guidance", "8", "0.41"]]
    assert cells(page, ".method") == ["adapter / guidance"] * 8, "the ninth failed before it had settings"
    choose(page, "#method", "guidance")
    assert shown(page) == 8
    assert page.complaints == []
    page = opened(browser, write_report(first))
    assert page("document.querySelector('#method').hidden && document.querySelector('#methods').hidden")


@needs_browser
def test_two_folders_are_compared_side_by_side(browser, two):
    first, second = two
    ended = console(first.parent, "report", "first", "--compare", "second", "-o", "both.html")
    assert (ended.returncode, ended.stdout) == (0, "both.html\n"), ended.stderr
    page = opened(browser, first.parent / "both.html")
    assert shown(page) == 9
    assert page("document.querySelector('.totals').innerText").endswith("0.30 / 0.40")
    captions = cells(page, "figcaption")
    assert captions[:3] == ["reference", "first", "second"]
    choose(page, "#search", "whale")
    [text] = page("[...document.querySelectorAll('.card:not([hidden])')].map(node => node.innerText)")
    assert "Not in this folder" in text
    assert "out of memory" in text
    choose(page, "#search", "slow")
    choose(page, "#sort", "motion_fidelity~")
    assert shown(page) == 4
    assert cells(page, ".metrics dd")[0] == "0.00 / 0.10"
    page.wait("document.querySelectorAll('video.ready').length >= 6 && !document.querySelector('video').paused", 30)
    three = WATCHED.replace("p.length === 2", "p.length === 3")
    apart = [max(frames) - min(frames) for frames in page(three)]
    assert len(apart) > 60
    assert sorted(min(a, 24 - a) for a in apart)[int(len(apart) * 0.95)] < 1, "all three play together"
    page("document.querySelector('.prompt').click()")
    text = page("document.querySelector('#dialog').innerText")
    assert "8 / 2" in text, "steps of the two"
    assert "How it was made: second" in text
    page("document.querySelector('#dialog').close()")
    assert page.complaints == []
    assert not (second / "report").exists(), "what is kept for the page is in the first folder"


@needs_browser
@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("compare", [False, True])
def test_nothing_hangs_over_at_any_width(browser, two, width, compare):
    page = opened(browser, write_report(two[0], two[0].parent / "page.html", two[1] if compare else None))
    browser.resize(width, 800)
    try:
        page.wait("document.querySelector('video.ready')")
        visible = "e => e.checkVisibility() && e.getBoundingClientRect().width > 0"
        boxes = f"[...document.querySelectorAll('header *, .bar *, .card *')].filter({visible})"
        outside = (
            f"{boxes}.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        scrolled = ".filter(e => !e.closest('#methods table'))"  # a table wider than the page scrolls by itself
        assert page(outside.replace(boxes, boxes + scrolled)) == []
        assert page("document.documentElement.scrollWidth") <= width
        assert page("document.querySelector('#scrub').getBoundingClientRect().width") >= 90, "the slider can be used"
        page("document.querySelector('.prompt').click()")
        inside = "document.querySelector('#dialog').scrollWidth <= document.querySelector('#dialog').clientWidth"
        assert page(inside)
        assert page("document.querySelector('#dialog #scrub').getBoundingClientRect().width") >= 90
        page("document.querySelector('#dialog').close()")
    finally:
        browser.resize(1280, 800)


PLAIN_CARDS = """(() => {
  for (let i = 0; i < 5000; i++) {
    const card = document.createElement('article');
    for (const name of ['p', 'p', 'p', 'p', 'span', 'span'])
      card.append(Object.assign(document.createElement(name), {textContent: `card ${i}`}));
    document.body.append(card);
  }
  return document.body.offsetHeight;
})()"""


def processor_seconds(browser: Browser) -> float:
    """Seconds of the processor that the page's thread has taken."""
    return {m["name"]: m["value"] for m in browser.call("Performance.getMetrics")["metrics"]}["TaskDuration"]


@needs_browser
def test_k8_20_000_results_open_in_3_seconds(browser, tmp_path, walk):
    folder = Folder(tmp_path / "out")
    folder.done(Job(walk, "robot", 0, SETTINGS), ball(8))
    path = write_report(folder.path)
    data = embedded(path)
    [job] = data["jobs"]
    (folder.path / "poster.jpg").write_bytes(base64.b64decode(job["result"]["poster"].partition(",")[2]))
    job["result"]["poster"] = "poster.jpg"  # as of so many (`Gallery`)
    data["jobs"] = [{**job, "prompt": f"robot {seed}", "seed": seed} for seed in range(20_000)]
    path.write_bytes(render(data))
    browser.call("Performance.enable", timeDomain="threadTicks")
    browser.call("Page.navigate", url="about:blank")
    before = processor_seconds(browser)
    browser(PLAIN_CARDS)
    plain = processor_seconds(browser) - before
    page = opened(browser, path)
    took = processor_seconds(browser)
    # 3 s where 5,000 plain cards take 0.6: a bound that holds on a machine that is slow, or has other work, too.
    assert took < 5 * plain, f"{took:.1f} s, plain cards {plain:.1f} s"
    assert shown(page) == 20_000
    page.wait("document.querySelectorAll('video.ready').length > 4")
    choose(page, "#search", "robot 1999")
    assert shown(page) == 12
    assert page.complaints == []

"""What the user gave: references, prompt files and standard input, read into jobs."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import threading
import time
from pathlib import Path, PurePosixPath

import fsspec
import numpy as np
import pytest
from program import lines, transfer

from emt.errors import EmtError
from emt.storage import check_readable
from emt.video import write_clip
from emt_cli.batch.inputs import PromptWarnings, expand, prompt_files
from emt_cli.batch.inputs.references import Finder
from emt_cli.batch.jobs import Job, Rejected
from emt_cli.batch.options import JOB_FIELDS, Settings, TransferOptions, UsageError, parse_field


def listed(*references: object, **options: object) -> list[Job | Rejected]:
    return expand(TransferOptions([str(r) for r in references], **options), {})[0]  # type: ignore[arg-type]


def clip(path: Path, content: bytes = b"clip") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ---- which jobs ---------------------------------------------------------------------------------------------------


def test_references_times_prompts_times_seeds_grouped_by_reference(tmp_path):
    clip(tmp_path / "b.mp4")
    clip(tmp_path / "a.webm")
    (tmp_path / "notes.md").write_text("no clip")
    jobs = listed(tmp_path, prompt=["x", "y"], seeds="0,5-6")
    assert [(j.reference.name, j.prompt, j.seed) for j in jobs] == [
        (r, p, s) for r in ("a.webm", "b.mp4") for p in "xy" for s in (0, 5, 6)
    ]


def test_pair_zips(tmp_path):
    one, two = clip(tmp_path / "1.mp4"), clip(tmp_path / "2.mp4")
    jobs = listed(one, two, prompt=["x", "y"], pair=True)
    assert [(j.reference.name, j.prompt) for j in jobs] == [("1.mp4", "x"), ("2.mp4", "y")]
    with pytest.raises(UsageError, match="here are 2 and 1"):
        listed(one, two, prompt=["x"], pair=True)


def test_globs_folders_and_recursion(tmp_path):
    clip(tmp_path / "deep" / "er" / "c.mp4")
    clip(tmp_path / "a.mp4")
    clip(tmp_path / "[x].mp4")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)

    def names(*arguments, **options):
        return [j.reference.name for j in listed(*arguments, prompt=["x"], **options)]

    assert names(tmp_path) == ["[x].mp4", "a.mp4"]
    assert names(tmp_path, recursive=True) == ["[x].mp4", "a.mp4", "c.mp4"]
    assert names(tmp_path, recursive=True, out=tmp_path / "deep") == ["[x].mp4", "a.mp4"], "results are no references"
    assert names(tmp_path / "*.mp4") == ["[x].mp4", "a.mp4"]
    assert names(tmp_path / "[x].mp4") == ["[x].mp4"], "a file of that name comes before the glob"
    assert names(tmp_path / "a.mp4", tmp_path) == ["a.mp4", "[x].mp4"], "each once"


def test_prompts_beside_the_clip(tmp_path):
    clip(tmp_path / "walk.mp4")
    (tmp_path / "walk.txt").write_text("# comment\na cat\n\n a dog \n")
    clip(tmp_path / "run.mp4")
    jobs = listed(tmp_path)
    assert [j.prompt for j in jobs if isinstance(j, Job)] == ["a cat", "a dog"]
    [rejected] = [j for j in jobs if isinstance(j, Rejected)]
    assert rejected.reference.endswith("run.mp4")
    assert "run.txt" in rejected.error.hint
    assert [j.prompt for j in listed(tmp_path / "walk.mp4", prompt=["x"])] == ["x"]
    assert len(listed(tmp_path / "walk.mp4", tmp_path / "walk.txt")) == 2, "a shell's walk.* names the prompts too"


def test_csv_and_jsonl_rows_set_any_field(tmp_path):
    here = clip(tmp_path / "a.mp4")
    (tmp_path / "p.csv").write_text('prompt,steps,seed\n"x, y",3,\nz,,9\n')
    jobs = listed(here, prompts=[tmp_path / "p.csv"], seeds="1-2", settings={"steps": 7})
    assert [(j.prompt, j.settings.steps, j.seed, j.overrides) for j in jobs] == [
        ("x, y", 3, 1, ("steps",)), ("x, y", 3, 2, ("steps",)), ("z", 7, 9, ()),
    ]  # fmt: skip
    rows = [{"reference": str(here), "prompt": "x", "width": 64}, {"prompt": "y"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    jobs = listed(prompts=[tmp_path / "p.jsonl"])
    assert [(j.prompt, j.settings.width) for j in jobs if isinstance(j, Job)] == [("x", 64)]
    left = [j.prompt for j in jobs if isinstance(j, Rejected)]
    assert left == ["y"], "a row without reference goes with those named, of which there are none"


def test_a_malformed_line_fails_alone_and_is_named(tmp_path):
    here = clip(tmp_path / "a.mp4")
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n{"prompt"\n\n{"prompt": "y", "steps": 0}\n')
    rejected = [j for j in listed(here, prompts=[tmp_path / "p.jsonl"]) if isinstance(j, Rejected)]
    assert [(r.origin, r.error.problem) for r in rejected] == [
        ("p.jsonl line 2", "the line is not JSON"), ("p.jsonl line 4", "steps is 0"),
    ]  # fmt: skip


def test_k7_a_prompt_that_goes_with_no_reference_is_said(tmp_path):
    here = clip(tmp_path / "a.mp4")
    (tmp_path / "p.jsonl").write_text(json.dumps({"reference": str(here), "prompt": "x"}) + '\n{"prompt": "y"}\n')
    found = {item.prompt: item for item in listed(prompts=[tmp_path / "p.jsonl"], prompt=["z"])}
    assert isinstance(found["x"], Job)
    for prompt, origin in (("y", "p.jsonl line 2"), ("z", "")):
        assert (found[prompt].error.problem, found[prompt].origin) == ("the job has no reference", origin)


def test_jobs_of_a_stream_arrive_one_by_one(tmp_path, monkeypatch):
    here = clip(tmp_path / "a.mp4")
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reader))
    _, stream = expand(TransferOptions(["-", str(here)], prompt=["p"]), {})
    assert next(stream) is None, "nothing yet: the batch at hand need not wait"
    os.write(writer, b'{"prompt": "x", "seed": 3}\nnonsense\n{"steps": 9}')
    job, rejected = next(stream), next(stream)
    assert (job.prompt, job.seed, job.reference) == ("x", 3, here)
    assert rejected.origin == "line 2"
    assert next(stream) is None
    os.close(writer)
    last = next(stream)
    assert (last.prompt, last.settings.steps, last.origin) == ("p", 9, "line 3")
    assert list(stream) == []


def test_a_reference_that_is_not_there_fails_with_each_of_its_prompts(tmp_path):
    found = listed(tmp_path / "nowhere.mp4", prompt=["x", "y"])
    assert [(item.reference, item.prompt, item.error.problem) for item in found] == [
        (str(tmp_path / "nowhere.mp4"), "x", "no such file"),
        (str(tmp_path / "nowhere.mp4"), "y", "no such file"),
    ]


def test_nothing_to_do_is_bad_usage(tmp_path):
    with pytest.raises(UsageError):
        listed(prompt=["x"])
    with pytest.raises(UsageError, match="no such file"):
        listed(tmp_path, prompts=[tmp_path / "missing.txt"])
    (tmp_path / "p.csv").write_text("prompt,colour\na,red\n")
    with pytest.raises(UsageError, match="colour"):
        listed(tmp_path, prompts=[tmp_path / "p.csv"])


@pytest.mark.parametrize("name", ["jobs.jsonl", "list.CSV", "prompts.txt"])
def test_prompts_in_a_references_place_are_told_where_they_go(tmp_path, name):
    (tmp_path / name).write_text("a fox\n")
    [rejected] = listed(tmp_path / name, prompt=["x"])
    assert rejected.error.hint == f"Give it with --prompts {tmp_path / name}."
    companion = clip(tmp_path / "prompts.mp4")
    beside = [job for job in listed(companion, tmp_path / name) if isinstance(job, Job)]
    assert [job.prompt for job in beside] == (["a fox"] if name == "prompts.txt" else [])


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", Path("/dev/zero"), tmp_path / "missing.mp4", tmp_path / ("x" * 300)):
        with pytest.raises(EmtError):
            check_readable(path)


# ---- prompt files -------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path):
    return clip(tmp_path / "a.mp4")


def prompts_of(here: Path, name: str, content: bytes) -> list[str]:
    path = here.with_name(name)
    path.write_bytes(content)
    return [j.prompt if isinstance(j, Job) else j.error.problem for j in listed(here, prompts=[path])]


@pytest.mark.parametrize("name", ["p.txt", "p", "p.TXT", "p.text"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_text_has_a_prompt_a_line(here, name, end):
    assert prompts_of(here, name, end.join([b"# two", b"a fox", b" a wolf "])) == ["a fox", "a wolf"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_k7_prompts_are_read_in_the_encodings_that_shells_write(here, encoding):
    text = "ein Löwe\r\n一只狗\r\n"
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    assert prompts_of(here, "p.txt", mark + text.encode(encoding)) == ["ein Löwe", "一只狗"]
    here.with_suffix(".txt").write_bytes(mark + text.encode(encoding))
    assert [j.prompt for j in listed(here)] == ["ein Löwe", "一只狗"]
    rows = "\r\n".join(json.dumps({"prompt": line}, ensure_ascii=False) for line in text.split())
    assert prompts_of(here, "p.jsonl", mark + rows.encode(encoding)) == text.split()
    assert prompts_of(here, "p.csv", mark + f"prompt\r\n{text}".encode(encoding)) == ["ein Löwe", "一只狗"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfea\0 \0f\0o\0x\0\n",
        "ein Löwe".encode("utf-16-le"),
        bytes(100),
        b"\xff\xfe\0\xd8",
    ],
)
def test_k7_what_is_no_text_is_one_line(here, content):
    with pytest.raises(UsageError, match=r"p.txt' is no text in UTF-8"):
        prompts_of(here, "p.txt", content)
    here.with_suffix(".txt").write_bytes(content)
    [rejected] = listed(here)
    assert rejected.error.problem == "a.txt is no text in UTF-8"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{\\rtf1\\ansi a fox}", "RTF"),
        (b"PK\3\4" + bytes(99), "a document or archive"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"\xd0\xcf\x11\xe0\xa1", "a document of an office program"),
        (b"<!DOCTYPE html>\n<p>a fox", "a web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG picture"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
    ],
)
@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "p"])
def test_k2_a_document_that_is_called_a_text_is_refused(here, name, content, kind):
    with pytest.raises(UsageError, match=f"is {kind}.* no plain text"):
        prompts_of(here, name, content)


def test_a_line_in_another_encoding_fails_alone(here, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a fox\nein L\xf6we\n")
    rejected, job = listed(here, prompts=[tmp_path / "p.txt"])
    assert job.prompt == "a fox"
    assert rejected.origin == "p.txt line 2"
    assert "UTF-8" in rejected.error.hint


@pytest.mark.parametrize("name", ["p.json", "p.tsv", "p.xlsx", "p.yaml", "p.docx"])
def test_k2_a_prompts_file_of_a_kind_that_is_not_read_is_refused(here, name):
    with pytest.raises(UsageError, match="is not read") as error:
        prompts_of(here, name, b'[\n"a cat",\n"a dog"\n]\n')
    assert all(kind in error.value.hint for kind in (".txt", ".csv", ".jsonl"))


@pytest.mark.parametrize(
    "content", [b'[\n"a cat",\n"a dog"\n]', b'{"prompt": "a"}\n{"prompt": "b"}', b"[" * 100_000 + b"]" * 100_000]
)
def test_k2_json_under_the_name_of_a_text_is_refused(here, content):
    with pytest.raises(UsageError, match="holds JSON"):
        prompts_of(here, "p.txt", content)
    assert prompts_of(here, "p.txt", b"[a fox] in snow\n{a|b}\n") == ["[a fox] in snow", "{a|b}"]


def test_prompts_come_through_a_pipe(here):
    reader, writer = os.pipe()
    os.write(writer, b"a fox\na wolf\n")
    os.close(writer)
    try:
        assert [j.prompt for j in listed(here, prompts=[Path(f"/dev/fd/{reader}")])] == ["a fox", "a wolf"]
    finally:
        os.close(reader)


def test_a_file_without_an_end_is_refused(here, monkeypatch):
    monkeypatch.setattr(prompt_files, "_MAX_PROMPTS", 1 << 20)
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        listed(here, prompts=[Path("/dev/zero")])


def test_k7_bad_lines_are_named_even_if_there_are_no_others(here, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt"\n{"steps": 0}\n')
    found = listed(prompts=[tmp_path / "p.jsonl"])
    assert [item.origin for item in found] == ["p.jsonl line 1", "p.jsonl line 2"]
    with pytest.raises(UsageError, match="has no prompts"):
        prompts_of(here, "p.txt", b"\n# nothing\n")


# ---- standard input ------------------------------------------------------------------------------------------------


def streamed(monkeypatch, content: bytes, *references: object, **options: object) -> list[Job | Rejected]:
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reader))
    thread = threading.Thread(target=lambda: (os.write(writer, content), os.close(writer)))
    thread.start()
    _, stream = expand(TransferOptions(["-", *map(str, references)], **options), {})  # type: ignore[arg-type]
    found = [item for item in stream if item is not None]
    thread.join()
    return found


@pytest.mark.parametrize("length", [prompt_files.MAX_LINE + 1, 3 * prompt_files.MAX_LINE])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_k3_a_line_that_is_too_long_fails_alone(here, monkeypatch, length, end):
    long = b'{"prompt": "' + b"x" * (length - 12)
    before, after = b'{"prompt": "a"}\n{"prompt": "b"}\n', b'{"prompt": "c"}' if end else b""
    found = streamed(monkeypatch, before + long + end + after, here)
    assert [item.prompt for item in found if isinstance(item, Job)] == ["a", "b", "c"][: 3 if end else 2]
    [rejected] = [item for item in found if isinstance(item, Rejected)]
    assert (rejected.error.problem, rejected.origin) == ("the line is too long", "line 3")


def test_a_stream_may_begin_with_a_byte_order_mark(here, monkeypatch):
    [job] = streamed(monkeypatch, b'\xef\xbb\xbf{"prompt": "a"}\r\n', here)
    assert job.prompt == "a"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_k1_a_stream_may_be_written_as_powershell_writes_files(here, monkeypatch, encoding):
    jobs = streamed(monkeypatch, '{"prompt": "ein Löwe"}\r\n{"prompt": "b"}'.encode(encoding), here)
    assert [job.prompt for job in jobs] == ["ein Löwe", "b"]


def test_k2_a_field_given_twice_is_refused(here, monkeypatch):
    [rejected] = streamed(monkeypatch, b'{"prompt": "a", "seed": 1, "prompt": "b"}', here)
    assert rejected.error.problem == "the field 'prompt' is given twice"
    with pytest.raises(UsageError, match="column prompt is there twice"):
        prompts_of(here, "p.csv", b"prompt,prompt\na,b\n")


def test_k2_marks_of_files_that_were_put_together_are_no_text(here):
    assert prompts_of(here, "p.txt", "\ufeffa\r\n\ufeff b\n\ufeff# c\n".encode()) == ["a", "b"]


def test_k2_comments_of_a_table_are_no_prompts(here):
    rows = '# of Monday\nprompt,seed\na,1\n#b,2\n"#1 dog",3\n"c\n# d",4\n  # e,5\nf,x\n'
    assert prompts_of(here, "p.csv", rows.encode()) == ["seed is 'x'", "a", "#1 dog", "c\n# d"]
    assert listed(here, prompts=[here.with_name("p.csv")])[0].origin == "p.csv line 9"


@pytest.mark.parametrize("own", [True, False])
def test_k2_results_are_no_references_where_the_output_folder_is_theirs(tmp_path, own):
    clip(tmp_path / "a.mp4")
    (tmp_path / "a.mp4.json").write_text('{"title": "a.mp4", "photoTakenTime": {}}')  # as photo services write them
    result = clip(tmp_path / "a_1234" / "prompt-0.mp4")
    record = {"id": "1", "settings": {}} if own else {"note": "of somebody's"}
    result.with_name(f"{result.name}.json").write_text(json.dumps(record))
    said = []
    found = Finder(True, tmp_path, said.append).find([str(tmp_path)])
    assert [path.name for path in found] == (["a.mp4"] if own else ["a.mp4", "prompt-0.mp4"])
    assert any("1 result of earlier runs" in line for line in said) == own


@pytest.mark.parametrize("given", [["link"], ["clips/**/*.mp4"], ["clips/a.mp4", "clips/out"]])
def test_k2_results_are_no_references_whatever_way_leads_to_them(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    clip(tmp_path / "clips" / "a.mp4")
    (tmp_path / "link").symlink_to("clips")
    result = clip(tmp_path / "clips" / "out" / "a_1234" / "prompt-0.mp4")
    result.with_name(f"{result.name}.json").write_text('{"id": "1", "settings": {}}')
    out = Path("clips/out")
    recursive = given == ["link"]
    assert [path.name for path in Finder(recursive, out, lambda text: None).find(given)] == ["a.mp4"]
    named = Finder(False, out, lambda text: None).find(["clips/out/*/*.mp4"])
    assert [path.name for path in named] == ["prompt-0.mp4"], "nothing else is named"


def test_k2_results_of_other_output_folders_are_no_references_unless_they_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip(tmp_path / "clips" / "a.mp4")
    clip(tmp_path / "before" / "kept.mp4")  # somebody's own, beside the results
    result = clip(tmp_path / "before" / "a_1234" / "prompt-0.mp4")
    result.with_name(f"{result.name}.json").write_text('{"id": "1", "settings": {}}')
    (tmp_path / "before" / "journal.jsonl").touch()
    said = []
    assert [path.name for path in Finder(True, Path("out"), said.append).find(["."])] == ["kept.mp4", "a.mp4"]
    assert any("left out: 1 result of earlier runs" in line for line in said)
    said = []
    assert [path.name for path in Finder(False, Path("out"), said.append).find(["**/*.mp4"])] == ["kept.mp4", "a.mp4"]
    assert said == ["note: left out: 1 result of earlier runs in **/*.mp4"]
    for named in ("before", "before/a_1234", str(result), "before/*/*.mp4"):
        said = []
        found = Finder(True, Path("out"), said.append).find([named])
        assert [path.name for path in found][:1] == ["prompt-0.mp4"], "it is what was asked for"
        assert "note: among the references is 1 result of earlier runs" in said, "a shell's glob may have asked for it"


@pytest.mark.parametrize("folder", ["@eaDir", "$RECYCLE.BIN", "lost+found", "__MACOSX"])
def test_k2_folders_of_systems_hold_no_references_unless_they_are_named(tmp_path, folder):
    clip(tmp_path / "a.mp4")
    inside = clip(tmp_path / folder / "b.mp4")
    finder = Finder(True, tmp_path / "out", lambda text: None)
    assert [path.name for path in finder.find([str(tmp_path)])] == ["a.mp4"]
    assert finder.find([str(inside.parent)]) == [inside]


@pytest.mark.parametrize(
    ("given", "out"),
    [
        ("memory://refs", "memory://refs"),
        ("memory://refs", "memory://refs/out"),
        ("memory://refs/**/*.mp4", "memory://refs/out"),
        ("memory://refs/**/*.mp4", "memory://refs"),
    ],
)
def test_k2_results_in_a_store_are_no_references_where_the_output_folder_is_theirs(given, out):
    store = fsspec.filesystem("memory")
    for name in ("refs/a.mp4", f"{out[9:]}/a_12345678/fox-0.mp4", f"{out[9:]}/a_12345678/fox-0.mp4.json"):
        store.pipe_file(f"/{name}", b"x")
    try:
        found = Finder(True, Path(out), lambda text: None, lambda url: Path(PurePosixPath(url).name)).find([given])
        assert [path.name for path in found] == ["a.mp4"]
    finally:
        store.rm("/refs", recursive=True)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_k1_tables_as_spreadsheets_write_them(here, delimiter):
    table = delimiter.join(["seed", "prompt"]) + "\n" + delimiter.join(["1", '"a; b, c"']) + "\n"
    assert prompts_of(here, "p.csv", table.encode()) == ["a; b, c"]
    assert prompts_of(here, "one.csv", b"prompt\na; b\n") == ["a; b"], "a single column has no delimiter"
    with pytest.raises(UsageError, match="between commas, semicolons or tabs"):
        prompts_of(here, "odd.csv", b"prompt|seed\na|1\n")


@pytest.mark.parametrize(
    "table",
    [
        "prompt, seed\na, 1\n",
        'prompt, seed\n"a", 1\n',
        "Prompt,SEED\na,1\n",
        "prompt,seed,\na,1,\n",
        "\n\nprompt,seed\n\na,1\n,\n,,,\n",
        "sep=;\nprompt;seed\na;1\n",
        "sep=,\nseed,prompt\n1,a\n",
        "prompt,seed\na,1.0\n",
        '\ufeff"prompt";"seed"\n"a";"1"\n',
    ],
)
def test_k1_tables_as_people_and_spreadsheets_write_them(here, tmp_path, table):
    (tmp_path / "p.csv").write_text(table, encoding="utf-8")
    assert [(job.prompt, job.seed) for job in listed(here, prompts=[tmp_path / "p.csv"])] == [("a", 1)]


def test_k1_a_table_with_semicolons_may_have_decimal_commas(here, tmp_path):
    (tmp_path / "p.csv").write_text("negative-prompt;prompt;guidance\n1,5;2,5;7,5\n")
    [job] = listed(here, prompts=[tmp_path / "p.csv"])
    assert (job.settings.negative_prompt, job.prompt, job.settings.guidance) == ("1,5", "2,5", 7.5)


def test_k2_a_cell_of_a_column_without_a_name_is_not_passed_over(here, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,\na,\nb,c\n")
    rejected, job = listed(here, prompts=[tmp_path / "p.csv"])
    assert job.prompt == "a"
    assert (rejected.origin, rejected.error.problem) == ("p.csv line 3", "the line has more cells than columns")


def test_k5_a_cell_of_any_length_fails_alone(here, tmp_path):
    (tmp_path / "p.csv").write_text(f"prompt\n{'x' * (3 << 20)}\na fox\n")
    rejected, job = listed(here, prompts=[tmp_path / "p.csv"])
    assert "characters" in rejected.error.problem
    assert job.prompt == "a fox"


@pytest.mark.parametrize(("value", "how"), [([{"prompt": "a"}], ".[]"), ({"prompt": "a"}, ".")])
def test_k7_json_over_several_lines_is_one_error(here, value, how):
    with pytest.raises(UsageError, match="one JSON value over several lines") as error:
        prompts_of(here, "p.jsonl", json.dumps(value, indent=1).encode())
    assert error.value.hint == f"jq -c {how} p.jsonl"


def test_k2_a_prompt_of_characters_without_width_is_empty(here):
    here.with_suffix(".txt").write_text("\u200b\u200d\n", encoding="utf-8")
    [rejected] = listed(here)
    assert rejected.error.problem == "the prompt is empty"


def test_standard_input_that_cannot_be_read_is_one_failure(here, monkeypatch):
    monkeypatch.setattr(sys, "stdin", os.fdopen(os.open(os.devnull, os.O_WRONLY)))
    _, stream = expand(TransferOptions(["-", str(here)]), {})
    [rejected] = [item for item in stream if item is not None]
    assert "Bad file descriptor" in rejected.error.problem
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="closed"):
        next(expand(TransferOptions(["-", str(here)]), {})[1])


# ---- order, and what is not read -----------------------------------------------------------------------------------


def test_k2_clips_come_in_natural_order(tmp_path):
    for number in (10, 2, 1):
        clip(tmp_path / "clips" / f"clip{number}.mp4")
        clip(tmp_path / f"part{number}" / "x.mp4")
    prompts = ["one", "two", "ten"]
    for argument in (tmp_path / "clips", tmp_path / "clips" / "*.mp4", tmp_path / "part*" / "x.mp4"):
        jobs = listed(argument, prompt=prompts, pair=True)
        numbers = [re.findall(r"\d+", str(job.reference.relative_to(tmp_path)))[0] for job in jobs]
        assert [(number, job.prompt) for number, job in zip(numbers, jobs)] == [
            ("1", "one"),
            ("2", "two"),
            ("10", "ten"),
        ]


def test_k2_pairs_in_a_shells_order_are_pointed_out(tmp_path):
    clips = [clip(tmp_path / f"clip{number}.mp4") for number in (1, 10, 2)]
    assert "clip1.mp4, clip10.mp4, clip2.mp4" in notes(*clips, prompt=["x"] * 3, pair=True)[0]
    assert not notes(clips[2], clips[0], clips[1], prompt=["x"] * 3, pair=True), "an order of the user's own"
    assert not notes(*clips, prompt=["x"])


def notes(*references: object, **options: object) -> list[str]:
    said: list[str] = []
    expand(TransferOptions([str(r) for r in references], **options), {}, said.append)  # type: ignore[arg-type]
    return said


def test_k7_what_is_not_read_of_a_folder_is_one_line(tmp_path):
    clip(tmp_path / "a.mp4")
    for name in ("a.txt", ".hidden", "1.doc", "2.doc", "README"):
        (tmp_path / name).write_text("x")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere")
    clip(tmp_path / "more" / "b.mp4")
    unread, folders = notes(tmp_path, prompt=["x"])
    assert all(
        part in unread for part in ("4 files", "1.doc and 1 more", "README", "gone.mp4 (a link that leads nowhere)")
    )
    assert "1 folder in" in folders
    assert "--recursive" in folders
    assert len(notes(tmp_path, prompt=["x"], recursive=True)) == 1
    assert not notes(tmp_path / "more", prompt=["x"])
    for number in range(30):
        clip(tmp_path / "many" / str(number) / "a.mp4").with_name("b.doc").write_text("x")
    assert len(notes(tmp_path / "many", prompt=["x"], recursive=True)) < 12, "no flood"


def test_k5_a_folder_that_cannot_be_read_leaves_the_others(tmp_path, monkeypatch):
    clip(tmp_path / "a.mp4")
    clip(tmp_path / "closed" / "b.mp4")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [job.reference.name for job in listed(tmp_path, prompt=["x"], recursive=True)] == ["a.mp4"]
    assert any("Permission denied" in line for line in notes(tmp_path, prompt=["x"], recursive=True))


def test_k2_a_folder_of_clips_and_thumbnails_is_its_clips(tmp_path):
    from PIL import Image

    for number in range(1, 4):
        clip(tmp_path / f"{number}.mp4")
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.jpg")
    assert [job.reference.name for job in listed(tmp_path, prompt=["x"])] == ["1.mp4", "2.mp4", "3.mp4"]


def test_a_text_beside_a_clip_is_its_prompts_whatever_else_has_that_name(tmp_path):
    here = clip(tmp_path / "a.b.mp4")
    for name in ("a.b.txt", "a.txt"):
        (tmp_path / name).write_text("x")
    rejected, job = listed(*sorted(tmp_path.iterdir()), prompt=["x"])
    assert (rejected.reference, job.reference) == (str(tmp_path / "a.txt"), here)


def seconds(work) -> float:
    """Time of the processor, but for the garbage collector's on what other tests have left in this process."""
    gc.collect()
    gc.freeze()
    try:
        begun = time.process_time()
        work()
        return time.process_time() - begun
    finally:
        gc.unfreeze()


def test_k8_texts_beside_clips_are_found_in_linear_time(tmp_path):
    for number in range(1500):
        (tmp_path / f"{number}.mp4").write_bytes(b"x")
        (tmp_path / f"{number}.txt").write_bytes(b"a fox")
    given = [str(path) for path in tmp_path.iterdir()]
    assert seconds(lambda: expand(TransferOptions(given), {})) < 1.5, "2.3 s for 800 if each looks at all"


def test_k8_the_first_of_60_000_jobs_is_there_in_a_second(tmp_path):
    for number in range(60):
        clip(tmp_path / f"{number}.mp4")
    options = TransferOptions([str(tmp_path)], prompt=[f"a fox {number}" for number in range(100)], seeds="0-9")
    assert len(expand(options, {})[0]) == 60_000
    plain = seconds(lambda: [Job(Path(f"/{k}.mp4"), f"a fox {k}", k, Settings()) for k in range(60_000)])
    took = seconds(lambda: expand(options, {}))
    assert took < 2 * plain  # a second where the jobs by themselves take half of one


# ---- warnings ------------------------------------------------------------------------------------------------------


def warnings_of(*prompts: str, negative: str = "") -> list[str]:
    said: list[str] = []
    jobs = [Job(Path("/a.mp4"), prompt, 0, Settings(negative_prompt=negative)) for prompt in prompts]
    list(PromptWarnings("m", None, said.append).watch(jobs))
    return said


@pytest.mark.parametrize(
    "syntax",
    [
        "(fox:1.3)",
        "(a red fox : .5)",
        "((fox))",
        "[fox]",
        "[a:b:0.5]",
        "BREAK",
        "<lora:x:0.8>",
        "<LoRA:x>",
        "{a|b}",
        "embedding:x",
    ],
)
def test_k2_syntax_that_is_not_honoured_is_said_in_one_line(syntax):
    for said in (warnings_of(f"a {syntax} in snow"), warnings_of("a fox", negative=syntax)):
        [line] = said
        assert line.startswith("warning: read as plain text")
        assert syntax in line


def test_k2_each_kind_of_syntax_is_named_once():
    said = warnings_of("(fox:1.3) BREAK (wolf:1.2)", "(cat:1.1)", "<lora:x:1>")
    assert len(said) == 2
    assert "(fox:1.3), (wolf:1.2), BREAK" in said[0]
    assert "<lora:x:1>" in said[1]


def test_k2_syntax_that_is_not_honoured_is_in_the_record(tmp_path):
    reference = clip(tmp_path / "a.mp4")
    write_clip(reference, np.zeros((4, 32, 32, 3), np.uint8), 8)
    ask = ["--prompt", "a {red|blue} fox", "--prompt", "a fox", "--json", "--out", "out"]
    said = {line["prompt"]: line.get("warnings") for line in lines(transfer(tmp_path, reference, *ask))}
    assert said["a fox"] is None
    assert said["a {red|blue} fox"] == [
        "read as plain text, not as weights, LoRAs, breaks, choices or key frames: {red|blue}"
    ]


@pytest.mark.parametrize(
    "prompt", ["a fox (red) in snow", "12:30 at the station", "a fox | a wolf", "a < b > c", "break dance", "C++"]
)
def test_plain_words_are_not_taken_for_syntax(prompt):
    assert not warnings_of(prompt)


@pytest.mark.parametrize("name", JOB_FIELDS)
def test_k7_a_long_value_of_any_field_is_not_repeated_whole(name):
    for value in ("x" * 5_000, ["x" * 5_000], {"x" * 5_000: 1}, 10**4_000):
        try:
            parse_field(name, value)
        except EmtError as error:
            assert len(error.problem) < 300  # noqa: PT017

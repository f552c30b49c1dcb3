"""Options as users of other programs know them, from the command line, the environment and config files."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from program import clip, emt, environment, model

from emt.errors import EmtError
from emt_cli import config, messages
from emt_cli.batch.inputs import expand
from emt_cli.batch.jobs import Rejected
from emt_cli.batch.options import Settings, TransferOptions, UsageError, parse_field, parse_seeds
from emt_cli.commands.group import all_options, app, describe_error
from emt_cli.config import Config


def parsed(line: str) -> dict[str, object]:
    """The parameters of a command line, by typer's parser."""
    name, *arguments = shlex.split(line)
    main = typer.main.get_command(app)
    with main.make_context("emt", [name]) as root:
        return main.get_command(root, name).make_context(name, arguments, parent=root).params


def refused(line: str) -> str:
    """The message about a command line that the parser does not take."""
    try:
        parsed(line)
    except Exception as error:
        return describe_error(error)
    raise AssertionError(f"{line} was taken")


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "ours"),
    [
        ("-p 'a fox' -p 'a wolf'", "--prompt 'a fox' --prompt 'a wolf'"),
        ("-m models/rv", "--model models/rv"),
        ("-n 12", "--steps 12"),
        ("--num-inference-steps 12", "--steps 12"),
        ("--guidance-scale 3.5", "--guidance 3.5"),
        ("--seed 7", "--seeds 7"),
        ("--output results", "--out results"),
    ],
)
@pytest.mark.parametrize("command", ["transfer", "plan"])
def test_options_have_the_names_of_other_programs_too(command, others, ours):
    assert parsed(f"{command} a.mp4 {others}") == parsed(f"{command} a.mp4 {ours}")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("transfer a.mp4", "out"),
        ("plan a.mp4", "out"),
        ("evaluate out", "output"),
        ("report out", "output"),
        ("rerun a.mp4", "output"),
        ("train --pairs p", "output"),
        ("make-pairs", "output"),
        ("build-engine", "output"),
        ("import-weights", "output"),
        ("doctor", "out"),
    ],
)
def test_out_and_output_are_the_same_option_everywhere(command, name):
    values = [parsed(f"{command} {option} x")[name] for option in ("--out", "--output", "-o")]
    assert values == [values[0]] * 3
    assert "x" in str(values[0])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("transfer --stepz 3", "no such option: --stepz (did you mean --steps?)"),
        (
            "transfer --num-inference-step 3",
            "no such option: --num-inference-step (did you mean --num-inference-steps?)",
        ),
        ("report out --compair x", "did you mean --compare?"),
        ("plan --hlep", "did you mean --help?"),
        ("transfer a.mp4 --scheduler eular", "(did you mean euler?)"),
        ("transfer a.mp4 --method adaptor", "(did you mean adapter?)"),
        ("transfer a.mp4 -n 0", "invalid value for --steps"),
        ("transfer a.mp4 --scheduler eular", "'euler'"),
    ],
)
def test_unknown_syntax_is_one_line_with_the_nearest_name(line, said):
    message = refused(line)
    assert said in message
    assert "\n" not in message


def test_an_unknown_command_is_one_line_with_the_nearest_name(tmp_path):
    ended = emt("transfr", "a.mp4", folder=tmp_path, environment=environment(tmp_path))
    assert ended.code == 2
    assert ended.err == "error: no such command: transfr (did you mean transfer?); emt --help lists what is allowed\n"


def jobs_of(tmp_path, row: dict[str, object], **options) -> list:
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"reference": "a.mp4", "prompt": "x", **row}))
    return expand(TransferOptions(prompts=[tmp_path / "jobs.jsonl"], out=tmp_path / "out", **options), {})[0]


def test_a_job_line_takes_the_other_names_and_is_the_same_job(tmp_path):
    [ours] = jobs_of(tmp_path, {"steps": 12, "guidance": 3.5})
    assert jobs_of(tmp_path, {"num_inference_steps": 12, "guidance_scale": 3.5}) == [ours]
    [twice] = jobs_of(tmp_path, {"steps": 12, "num_inference_steps": 12})
    assert "given twice" in twice.error.problem


def test_an_unknown_field_of_a_job_names_the_nearest(tmp_path):
    [rejected] = jobs_of(tmp_path, {"sceduler": "euler"})
    assert (rejected.error.problem, rejected.error.hint) == ("unknown field 'sceduler'", "Did you mean scheduler?")


# ---- random seeds --------------------------------------------------------------------------------------------------


def seeds_of(tmp_path, text: str, **options) -> list[int]:
    clip(tmp_path / "a.mp4")
    given = TransferOptions(references=[str(tmp_path / "a.mp4")], prompt=["x"], seeds=text, out=tmp_path / "out")
    return [job.seed for job in expand(given, {}, **options)[0]]


def test_random_seeds_are_drawn_once_and_kept_by_the_output_folder(tmp_path):
    four = seeds_of(tmp_path, "random:4")
    assert len(set(four)) == 4
    assert seeds_of(tmp_path, "random:4") == four, "run again, it resumes"
    assert seeds_of(tmp_path, "random:2") == four[:2]
    assert seeds_of(tmp_path, "7,random:6")[:5] == [7, *four], "more are drawn to those that are there"
    assert json.loads((tmp_path / "out" / "seeds.json").read_bytes())["seeds"][:4] == four


def test_a_plan_keeps_no_seeds(tmp_path):
    said: list[str] = []
    assert len(seeds_of(tmp_path, "random:3", say=said.append, keep_seeds=False)) == 3
    assert not (tmp_path / "out").exists()
    assert "not drawn yet" in said[0]


@pytest.mark.parametrize("text", ["random:0", "random:x", "random:", "random:-1", "random:1000000"])
def test_random_seeds_need_a_count(text):
    with pytest.raises(EmtError, match="random:"):
        parse_seeds(text)


def test_damaged_seeds_are_an_error_and_stay(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "seeds.json").write_text('{"seeds": [1, "2"]}')
    with pytest.raises(EmtError, match="damaged"):
        seeds_of(tmp_path, "random:1")
    assert (tmp_path / "out" / "seeds.json").read_text() == '{"seeds": [1, "2"]}'


def test_clips_with_random_seeds_are_there_when_the_run_is_started_again(tmp_path):
    clip(tmp_path / "a.mp4")
    arguments = ("transfer", "a.mp4", "-p", "x", "--seeds", "random:2", "-m", str(model()), "--device", "cpu", "--json")
    runs = [emt(*arguments, folder=tmp_path, environment=environment(tmp_path)) for _ in range(2)]
    first, second = ([json.loads(line) for line in run.out.splitlines()] for run in runs)
    assert [line["state"] for line in first] == ["done", "done"], runs[0].err
    assert [line["state"] for line in second] == ["skipped", "skipped"]
    assert [line["seed"] for line in first] == [line["seed"] for line in second]


# ---- config files and the environment ------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder, a home of its own, and no variables of ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("EMT_")]:
        monkeypatch.delenv(name)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_command_line_wins_over_the_environment_over_config_files_over_defaults(here, monkeypatch):
    """One option after the other is taken away, and the next weaker source holds."""
    write(here / "config/emt/emt.toml", "[transfer]\nsteps = 1\nfps = 1\nstride = 11")
    write(here / "emt.toml", "steps = 2\nfps = 2\n")
    monkeypatch.setenv("EMT_STEPS", "3")
    found = parsed("transfer a.mp4 -n 4")
    assert found["steps"] == 4
    found = parsed("transfer a.mp4")
    assert (found["steps"], found["fps"], found["stride"], found["best_of"]) == (3, 2, 11, None)
    monkeypatch.setenv("EMT_TRANSFER_STEPS", "5")
    assert parsed("transfer a.mp4")["steps"] == 5, "a variable of the command wins over that of all commands"
    write(here / "other.toml", "fps = 7")
    found = parsed("transfer a.mp4 --config other.toml")
    assert (found["fps"], found["stride"]) == (7, None), "a file that is named is the only one"


def test_every_option_of_every_command_can_be_set_in_a_file_and_but_lists_by_a_variable():
    """Options come from the declarations alone: a new one needs no line here or there."""
    for name, options in all_options().items():
        for option in options:
            assert option.names, f"{name} {option.parameter}"
            assert bool(option.variables(name)) is (not option.multiple or option.kind is Path)
    transfer = {option.parameter: option for option in all_options()["transfer"]}
    declared = {f.name for f in (*fields(Settings), *fields(TransferOptions))}
    assert declared - transfer.keys() == {"references", "settings", "background", "presets", "others"}


def test_the_section_of_transfer_holds_for_a_plan_too_and_out_for_no_other_command(here):
    write(here / "emt.toml", 'out = "results"\n[transfer]\nprompt = ["a fox", "a wolf"]\nreport = true')
    assert str(parsed("transfer a.mp4")["out"]) == "results"
    found = parsed("plan a.mp4")
    assert ([str(out) for out in found["out"]], list(found["prompt"])) == (["results"], ["a fox", "a wolf"])
    assert found["report"] is True
    assert parsed("plan a.mp4 --no-report")["report"] is False
    assert parsed("report somewhere")["output"] is None, "there it would be the page"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz = 3", "no command has an option 'stepz' (did you mean steps?)"),
        ("[transfer]\nstepz = 3", "[transfer] has no option 'stepz' (did you mean steps?)"),
        ("[transfer.lora]\nfile = 'x'", "[transfer] lora is {file = 'x'}; allowed: a text"),
        ("[transfer.lara]\nfile = 'x'", "there is no section [transfer.lara]"),
        ("[transfer]\nsize = {width = 32}", "[transfer] size is {width = 32}; allowed: a text"),
        ("size = [512, 512]", "size is [512, 512]; allowed: a text that is not empty (WxH|NAME), and no list"),
        ("size = {width = 32}", "size is {width = 32}; allowed: a text"),
        ("steps = [3]", "steps is [3]; allowed: a whole number from 1 to 500, and no list"),
        ("out = 2026-11-30", "out is 2026-11-30; allowed: a text"),
        ("out = true", "out is true; allowed: a text"),
        ('out = "a\\u0000b"', "allowed: a text that is not empty without zero bytes"),
        ("[engines.list]\njson = {a = 1}", "[engines.list] json is {a = 1}; allowed: true or false"),
        ("[engines.list.more]\na = 1", "there is no section [engines.list.more]"),
        ("[transfr]\nsteps = 3", "there is no section [transfr] (did you mean transfer?)"),
        ("steps = 'three'", "steps is 'three'; allowed: a whole number from 1 to 500"),
        ("steps = 2.5", "steps is 2.5; allowed: a whole number from 1 to 500"),
        ("steps = true", "steps is true; allowed: a whole number"),
        ("guidance = 0", "guidance is 0; allowed: a number from 1 to 50"),
        ("report = 1", "report is 1; allowed: true or false"),
        ("scheduler = 'eular'", "(did you mean euler?)"),
        ("prompt = [['a']]", "allowed: a text"),
        ("steps = ", "is no TOML"),
        ("presets = 3", "presets are sections"),
        ("[presets.fast]\nsteps = 3", "[presets.fast] is a preset of emt"),
        ("[presets.mine]\nstepz = 3", "[presets.mine] has no setting 'stepz' (did you mean steps?)"),
        ("[presets.mine]\nsteps = 0", "steps is 0"),
        ("[presets.mine]\npreset = 'fast'", "[presets.mine] has no setting 'preset'"),
        ("[presets.mine]\nsteps = 3\nnum-inference-steps = 4", "'steps' and 'num-inference-steps', which are one"),
        ("guidance = 2\nguidance_scale = 3", "the top has 'guidance' and 'guidance_scale', which are one option"),
        ("[transfer]\nbest-of = 2\nbest_of = 3", "[transfer] has 'best-of' and 'best_of', which are one option"),
        ("[transfer]\nout = ''", "[transfer] out is ''; allowed: a text that is not empty"),
        ("[transfer]\nprompts = ['']", "[transfer] prompts is ''"),
        ("model = ''", "model is ''"),
        ("verbose = true", "'verbose' is not set by config files"),
        ("[engines]\njson = true", "[engines] has no options, so no 'json'"),
    ],
)
def test_what_a_config_file_has_wrong_is_one_line_with_the_nearest_name(here, text, said):
    write(here / "emt.toml", text)
    with pytest.raises(UsageError) as caught:
        parsed("transfer a.mp4")
    assert said in caught.value.problem
    assert caught.value.problem.startswith("emt.toml")
    assert "\n" not in str(caught.value)


def test_k7_what_several_options_have_wrong_together_names_the_source(here, monkeypatch):
    def said(*arguments: str) -> str:
        with pytest.raises(UsageError) as caught:
            typer.main.get_command(app)(["plan", "a.mp4", *arguments], standalone_mode=False)
        return caught.value.problem

    write(here / "emt.toml", "seeds = 'x'")
    assert said() == "emt.toml: --seeds has 'x'"
    monkeypatch.setenv("EMT_SEEDS", "y")
    assert said() == "an environment variable: --seeds has 'y'"
    assert said("--seeds", "z") == "--seeds has 'z'"
    monkeypatch.setenv("EMT_SIZE", "32")
    assert said() == "an environment variable: size is '32'", "a setting of the clip, too"
    assert said("--size", "33") == "size is '33'"


@pytest.mark.parametrize("name", ["/dev/zero", "large.toml"])
def test_k8_a_config_file_without_end_is_not_read_into_memory(here, name):
    (here / "large.toml").write_bytes(b"#" * (5 << 20))
    with pytest.raises(UsageError, match="larger than 4 MiB, so no config file"):
        config._parse(Path(name))


def test_k5_a_config_folder_that_cannot_be_looked_into_has_no_file(here, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here / ("x" * 300)))  # as the home folder of another user
    assert parsed("transfer a.mp4")["steps"] is None


def test_k2_an_empty_path_in_a_variable_is_not_the_working_folder(here, monkeypatch):
    monkeypatch.setenv("EMT_OUT", f"out{os.pathsep}")
    assert "--out: it is empty" in refused("plan a.mp4")


def test_samplers_are_spelled_as_in_the_web_ui_wherever_they_are_named(here, monkeypatch):
    spelled = "DPM++ 2M Karras"
    assert parsed(f"transfer a.mp4 --scheduler '{spelled}'")["scheduler"] == "dpm++_2m_karras"
    monkeypatch.setenv("EMT_SCHEDULER", "Euler a")
    assert parsed("plan a.mp4")["scheduler"] == "euler_a"
    monkeypatch.delenv("EMT_SCHEDULER")
    write(here / "emt.toml", f"[transfer]\nscheduler = '{spelled}'\n[presets.mine]\nscheduler = 'DPM++ SDE'")
    assert parsed("transfer a.mp4")["scheduler"] == "dpm++_2m_karras"
    assert Config.load(None).presets["mine"]["scheduler"].value == "dpm++_sde"


def test_a_variable_of_another_type_names_itself(here, monkeypatch):
    monkeypatch.setenv("EMT_STEPS", "many")
    assert "invalid value for the environment variable EMT_STEPS" in refused("transfer a.mp4")


def settings(here, *layers: dict[str, object], line: dict[str, object] | None = None) -> Settings:
    """The settings of a job: config file, environment, command line, and its own line over them."""
    *background, given = [{name: parse_field(name, value) for name, value in layer.items()} for layer in layers]
    mine = {"draft": {"steps": 5, "guidance": 2.0}}
    [job] = jobs_of(here, line or {}, settings=given, background=background, presets=mine)
    return job.settings if not isinstance(job, Rejected) else job.error


def test_a_preset_wins_over_what_a_weaker_source_sets_and_yields_to_its_own(here):
    def steps(*layers, line=None):
        return settings(here, *layers, line=line).steps

    assert steps({"steps": 30}, {}, {"preset": "fast"}) == 6
    assert steps({}, {"preset": "draft"}, {"steps": 30}) == 30
    assert steps({"preset": "draft", "steps": 30}, {}, {}) == 30
    assert steps({"preset": "fast"}, {}, {"preset": "draft"}) == 5
    assert steps({"steps": 30}, {}, {}, line={"preset": "draft"}) == 5
    assert steps({}, {}, {"steps": 30}, line={"preset": "draft"}) == 30, "explicit options win over presets"


def test_an_unknown_preset_of_a_job_line_names_the_nearest(here):
    error = settings(here, {}, {}, {}, line={"preset": "drift"})
    assert error.problem == "there is no preset 'drift'"
    assert error.hint.startswith("Did you mean draft? Allowed are exact, fast, draft")


def test_an_own_preset_is_used_recorded_and_made_again_without_its_file(here):
    clip(here / "a.mp4")
    write(here / "mine.toml", f'model = "{model()}"\ndevice = "cpu"\n[presets.draft]\nsteps = 3\nseed = 1\n')
    arguments = ("transfer", "a.mp4", "-p", "x", "--preset", "draft", "--config", "mine.toml")
    refused = emt(*arguments, folder=here, environment=environment(here))
    assert refused.err == "error: mine.toml: [presets.draft] has no setting 'seed'\n"
    write(here / "mine.toml", (here / "mine.toml").read_text().replace("seed = 1\n", ""))
    made = emt(*arguments, folder=here, environment=environment(here))
    assert made.code == 0, made.err
    record = json.loads((here / f"{made.out.strip()}.json").read_bytes())
    assert (record["settings"]["steps"], record["settings"]["preset"]) == (3, "draft")
    again = emt("rerun", made.out.strip(), folder=here, environment=environment(here))
    assert "identical with the original" in again.err


def test_config_show_names_the_source_of_each_option(here, monkeypatch, capsys):
    write(here / "config/emt/emt.toml", "[transfer]\npreset = 'draft'\n[presets.draft]\nsteps = 6")
    write(here / "emt.toml", "guidance = 2")
    monkeypatch.setenv("EMT_FPS", "12")
    monkeypatch.setenv("EMT_STEPZ", "12")
    monkeypatch.setenv("COLUMNS", "200")
    main = typer.main.get_command(app)
    assert main(["config", "show"], standalone_mode=False) in (None, 0)
    shown = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.out.splitlines() if line[:1] == "│"]
    found = {option: (value, source) for option, value, source in rows}
    assert found["--steps"] == ("6", "preset draft")
    assert found["--guidance"] == ("2.0", "emt.toml")
    assert found["--fps"] == ("12.0", "variable EMT_FPS")
    assert found["--preset"] == ("draft", str(here / "config/emt/emt.toml"))
    assert found["--height"] == ("128", "model demo")
    assert found["--report"] == ("false", "default")
    assert "EMT_STEPZ sets no option (did you mean EMT_STEPS?)" in shown.err


# ---- messages ------------------------------------------------------------------------------------------------------


def test_quiet_and_verbose_exclude_each_other_and_the_command_line_wins(tmp_path):
    """Both on the command line, or both in the environment, are bad usage."""

    def shows_details(*flags: str, **variables: str) -> bool:
        ended = emt("report", "nowhere", *flags, folder=tmp_path, environment=environment(tmp_path) | variables)
        assert ended.code == 1, ended.err
        return "options from emt.toml" in ended.err

    (tmp_path / "emt.toml").write_text("steps = 3\n")
    for command in (["plan", "x.mp4", "-p", "x"], ["doctor"], ["engines", "list"]):
        ended = emt(*command, "-q", "--verbose", folder=tmp_path, environment=environment(tmp_path))
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.splitlines() == ["error: --quiet and --verbose exclude each other", "Give one of them."]
    ended = emt("doctor", folder=tmp_path, environment=environment(tmp_path) | {"EMT_QUIET": "1", "EMT_VERBOSE": "1"})
    assert ended.code == 2
    assert not shows_details("-q", EMT_VERBOSE="1")
    assert shows_details("-v", EMT_QUIET="1")
    assert not shows_details(EMT_QUIET="1")


def test_quiet_leaves_failures_verbose_adds_phases_and_the_log_file_has_all(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    arguments = ("transfer", "bad.mp4", "-p", "x", "-m", str(model()), "--device", "cpu", "--log-file", "log/a.txt")
    quiet, loud = (emt(*arguments, flag, folder=tmp_path, environment=environment(tmp_path)) for flag in ("-q", "-v"))
    assert quiet.code == loud.code == 1
    assert [line.split()[1] for line in quiet.err.splitlines()] == ["FAILED"]
    assert "looking for the model and clips …" in loud.err
    assert "0 done, 0 already there, 1 failed" in loud.err
    kept = (tmp_path / "log/a.txt").read_text()
    assert kept.count("WARNING [1/1] FAILED") == 2, "the second run goes on with the file of the first"
    assert kept.count("DEBUG looking for the model and clips") == 2
    assert kept.count("INFO 0 done") == 2


def test_a_log_file_that_cannot_be_written_is_bad_usage(tmp_path):
    ended = emt("plan", "a.mp4", "--log-file", str(tmp_path), folder=tmp_path, environment=environment(tmp_path))
    assert ended.code == 2
    assert "--log-file" in ended.err


@pytest.fixture
def log_to():
    """Starts keeping lines in a file; what that has changed is put back."""
    root, levels = logging.getLogger(), {}
    before = [*root.handlers]
    for name in ("emt", "diffusers", "transformers", "huggingface_hub", "torch.distributed"):
        levels[name] = logging.getLogger(name).level
    yield lambda path: messages.start(log_file=path)
    for handler in {*root.handlers} - {*before}:
        root.removeHandler(handler)
        handler.close()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    messages._log = None


def test_k7_a_log_file_on_a_full_disk_is_one_line(log_to, capfd):
    log_to(Path("/dev/full"))
    for number in range(3):
        messages.say(f"line {number}")
    err = capfd.readouterr().err.splitlines()
    assert err[0] == "warning: --log-file /dev/full takes nothing more: No space left on device"
    assert err[1:] == ["line 0", "line 1", "line 2"]


@pytest.mark.parametrize("content", [b"\0\0\0 ftypisom", b'{"event": "job"}\n', b" [1]\n"])
def test_k3_a_clip_or_a_journal_is_no_log(log_to, tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(EmtError, match="is there, and no log"):
        log_to(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


# ---- measures and report at the end of a run -----------------------------------------------------------------------


def test_evaluate_and_report_at_the_end_of_a_run_show_the_measures(tmp_path):
    clip(tmp_path / "a.mp4")
    arguments = ("transfer", "a.mp4", "-p", "x", "-m", str(model()), "--device", "cpu", "--evaluate", "--report")
    ended = emt(*arguments, folder=tmp_path, environment=environment(tmp_path))
    assert ended.code == 0, ended.err
    assert "evaluated 1 clip: " in ended.err
    [row, summary] = map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    assert row["result"].endswith("x-0.mp4")
    assert summary["clips"] == 1
    assert b'"metrics"' in (tmp_path / "out/report.html").read_bytes()
    assert len(ended.out.splitlines()) == 1, "standard output has the clips alone"


def test_what_measuring_needs_is_missed_before_the_run_starts(tmp_path, monkeypatch):
    clip(tmp_path / "a.mp4")
    without = "import sys; sys.modules['cv2'] = None; from emt_cli.app import main; main()"
    command = [sys.executable, "-c", without, "transfer", "a.mp4", "-p", "x", "-m", str(model()), "--evaluate"]
    environ = os.environ | environment(tmp_path)
    ended = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "error: OpenCV is needed" in ended.stderr
    assert "pip install 'emt-cli[evaluate]'" in ended.stderr
    assert not (tmp_path / "out").exists()

"""LoRAs, VAEs, textual inversions and `--clip-skip` of a clip: what they change, and what a run does with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from program import FRAMES, clip, emt, environment, journal, lines, model, transfer
from safetensors.torch import save_file

from emt.backbones.sd15.switching import WeightSwitch
from emt.cache import ContentIndex
from emt.errors import EmtError
from emt.hub import split_scale
from emt.model_folder import DEFAULTS
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.video import read_clip
from emt_cli.batch.addons import AddonFinder
from emt_cli.batch.inputs import expand
from emt_cli.batch.jobs import Job, identify, output_name
from emt_cli.batch.options import Settings, TransferOptions, parse_field

SPATIAL = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
TEMPORAL = "up_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_v"
TEXT = "encoder.layers.0.self_attn.q_proj"
ALPHA, RANK = 6.0, 2


@pytest.fixture(scope="module")
def pipe() -> MotionTransferPipeline:
    return load_pipeline(model())


def weights(pipe: MotionTransferPipeline) -> dict[str, torch.Tensor]:
    """Copies of all weights, by network and name."""
    parts = ("unet", "vae", "text_encoder")
    found = {f"{part}.{n}": p.detach().clone() for part in parts for n, p in getattr(pipe, part).named_parameters()}
    return {name.replace(".text_model.", "."): tensor for name, tensor in found.items()}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_lora(path: Path, pipe: MotionTransferPipeline, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA of kohya's of spatial, temporal and text weights; returns B·A by weight."""
    state, products, own = {}, {}, weights(pipe)
    for i, (prefix, part, name) in enumerate(
        [("lora_unet", "unet", SPATIAL), ("lora_unet", "unet", TEMPORAL), ("lora_te_text_model", "text_encoder", TEXT)]
    ):
        rows, columns = own[f"{part}.{name}.weight"].shape
        down, up = draw(RANK, columns, seed=seed + i), draw(rows, RANK, seed=seed + i + 50)
        key = f"{prefix}_{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(ALPHA)}
        products[f"{part}.{name}.weight"] = up @ down
    save_file(state, path)
    return products


def write_vae(path: Path, pipe: MotionTransferPipeline, seed: int = 7) -> dict[str, torch.Tensor]:
    state = {name: draw(*p.shape, seed=seed) / 8 for name, p in pipe.vae.named_parameters()}
    save_file(state, path)
    return state


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


# ---- weights -------------------------------------------------------------------------------------------------------


def test_a_lora_is_the_weight_plus_scale_times_alpha_over_rank_times_ba(pipe, tmp_path):
    products, before = write_lora(tmp_path / "a.safetensors", pipe), weights(pipe)
    switch = WeightSwitch(pipe)
    switch.set([(tmp_path / "a.safetensors", 0.8)])
    after = weights(pipe)
    assert differing(before, after) == products.keys()
    for name, product in products.items():
        torch.testing.assert_close(after[name], before[name] + 0.8 * ALPHA / RANK * product)
    switch.set()
    assert not differing(before, weights(pipe))


def test_after_other_files_the_same_ones_give_the_same_bits(pipe, tmp_path):
    """LoRA A, B with a VAE and a word, A again, nothing: never the sum of what was there."""
    a, b, vae, word = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "vae", "word"))
    write_lora(a, pipe, 1), write_lora(b, pipe, 2)
    expected = write_vae(vae, pipe)
    save_file({"emb_params": draw(2, 32)}, word)
    own, table, switch = weights(pipe), pipe.text_encoder.get_input_embeddings(), WeightSwitch(pipe)
    plain = pipe.encode_prompts(["a style fox"])

    switch.set([(a, 1.0)])
    first = weights(pipe)
    switch.set([(b, 0.5), (a, -1.0)], vae, {"style": word})
    assert differing(first, weights(pipe) | {k: first[k] for k in first if "token_embedding" in k}) >= {
        f"unet.{SPATIAL}.weight",
        *(f"vae.{name}" for name in expected),
    }
    assert all(torch.equal(p, expected[name]) for name, p in pipe.vae.named_parameters())
    assert not torch.equal(pipe.encode_prompts(["a style fox"]), plain)
    switch.set([(a, 1.0)])
    assert not differing(first, weights(pipe))
    switch.set()
    assert not differing(own, weights(pipe))
    assert pipe.text_encoder.get_input_embeddings() is table
    assert torch.equal(pipe.encode_prompts(["a style fox"]), plain)


def test_what_does_not_fit_leaves_the_pipeline_as_it_was(pipe, tmp_path):
    a, bad, vae = (tmp_path / f"{name}.safetensors" for name in ("a", "bad", "vae"))
    write_lora(a, pipe)
    save_file({"lora_unet_nowhere.lora_down.weight": draw(2, 4), "lora_unet_nowhere.lora_up.weight": draw(4, 2)}, bad)
    small = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    save_file({name: p.detach() for name, p in small.named_parameters()}, vae)
    switch = WeightSwitch(pipe)
    switch.set([(a, 1.0)])
    before = weights(pipe)
    for loras, other, words, message in (
        ([(bad, 1.0)], None, {}, "no such weight in the model: lora_unet_nowhere"),
        ([(a, 1e38)], None, {}, "are not finite"),
        ([], vae, {}, "VAE"),
        ([], a, {}, "is a LoRA, not a VAE"),
        ([], None, {"style": a}, "is a LoRA, not a textual inversion"),
    ):
        with pytest.raises(EmtError, match=message):
            switch.set(loras, other, words)
        assert not differing(before, weights(pipe))
    switch.set()


def test_clip_skip_is_diffusers_own_less_one(pipe):
    """The web UI counts the last layer as 1, diffusers the layers that are skipped."""
    encoder = pipe.text_encoder
    config = type(encoder.config).from_dict(encoder.config.to_dict() | {"num_hidden_layers": 3})
    torch.manual_seed(0)
    # diffusers reads the last norm by the name that it had before transformers 5.
    kind = type("Named", (type(encoder),), {"text_model": property(lambda own: own)})
    pipe.text_encoder = kind(config).eval()
    theirs = StableDiffusionPipeline(
        None, pipe.text_encoder, pipe.tokenizer, None, None, None, None, requires_safety_checker=False
    )
    try:
        found = []
        for skip in (1, 2, 3):
            pipe.clip_skip = skip
            options = {"clip_skip": skip - 1} if skip > 1 else {}
            expected, _ = theirs.encode_prompt("a red fox", torch.device("cpu"), 1, False, **options)
            found.append(pipe.encode_prompts(["a red fox"]))
            assert torch.equal(found[-1], expected)
        assert not torch.equal(found[0], found[1])
    finally:
        pipe.clip_skip, pipe.text_encoder = 1, encoder


# ---- what a job names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x.safetensors", ("x.safetensors", 1.0)),
        ("x.safetensors:0.8", ("x.safetensors", 0.8)),
        (r"C:\loras\x.safetensors", (r"C:\loras\x.safetensors", 1.0)),
        (r"C:\loras\x.safetensors:-0.5", (r"C:\loras\x.safetensors", -0.5)),
        ("C:/x.safetensors:1e-1", ("C:/x.safetensors", 0.1)),
        ("hf://owner/name", ("hf://owner/name", 1.0)),
        ("hf://owner/name@main/x.safetensors:0.7", ("hf://owner/name@main/x.safetensors", 0.7)),
        ("https://host:8080/x.safetensors", ("https://host:8080/x.safetensors", 1.0)),
        ("https://host:8080/x.safetensors:2", ("https://host:8080/x.safetensors", 2.0)),
        pytest.param("x" * 300 + ":0.8", ("x" * 300, 0.8), id="a name longer than file systems take"),
    ],
)
def test_a_colon_before_a_number_begins_a_scale(text, expected):
    assert split_scale(text) == expected


def test_fields_of_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path.as_posix()
    assert parse_field("lora", "a.safetensors; b.safetensors:0.5") == (
        f"{here}/a.safetensors:1.0",
        f"{here}/b.safetensors:0.5",
    )
    assert parse_field("lora", ["hf://o/n:2"]) == ("hf://o/n:2.0",)
    assert parse_field("lora", []) == ()
    assert parse_field("lora", parse_field("lora", "a:0.3")) == parse_field("lora", "a:0.3"), "as records have it"
    assert parse_field("vae", "stabilityai/sd-vae-ft-mse") == "stabilityai/sd-vae-ft-mse"
    assert parse_field("embedding", "bad=e.pt") == (f"bad={here}/e.pt",)
    for name, value, message in (
        ("lora", 3, "lora is 3"),
        ("lora", "x:much", "the scale 'much' is not a number"),
        ("lora", ["a", ""], "lora is ''"),
        ("vae", "", "vae is ''"),
        ("embedding", "file.pt", "not a word and a file"),
        ("clip_skip", 0, "clip_skip is 0"),
    ):
        with pytest.raises(EmtError, match=message):
            parse_field(name, value)


def test_content_and_scale_are_the_identity_and_paths_are_not(tmp_path):
    finder = AddonFinder(ContentIndex(tmp_path / "cache"))
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)

    def identity(**settings):
        own = Settings(**{name: parse_field(name, value) for name, value in settings.items()})
        job = Job(tmp_path / "x.mp4", "x", 0, own, ("lora",), addons=finder.find(own))
        return identify(job, reference="r", model="m", precision="auto"), output_name(job, "r")

    plain = identify(Job(tmp_path / "x.mp4", "x", 0, Settings()), reference="r", model="m", precision="auto")
    assert identity()[0] == plain == identity(lora=[], clip_skip=1)[0]
    a, b, c = (f"{tmp_path}/{name}" for name in "abc")
    assert identity(lora=[a]) == identity(lora=[f"{b}:1.0"]), "the same content elsewhere"
    assert identity(lora=[a, c]) == identity(lora=[c, b]), "sums do not depend on the order"
    several = [{"lora": [a]}, {"lora": [c]}, {"lora": [f"{a}:0.5"]}, {"lora": [a, c]}, {"vae": a}, {"clip_skip": 2}]
    several += [{"embedding": f"s={a}"}, {"embedding": f"t={a}"}, {}]
    assert len({identity(**settings)[0] for settings in several}) == len(several)
    with pytest.raises(EmtError, match="two embeddings have the word s"):
        identity(embedding=[f"s={a}", f"s={c}"])
    with pytest.raises(EmtError, match=r"nowhere.safetensors does not exist"):
        identity(lora=["nowhere.safetensors"])
    with pytest.raises(EmtError, match=r"cannot read x+: File name too long"):
        identity(vae="x" * 300)


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, pipe) -> Path:
    """A folder with jobs of two LoRAs, a VAE and a word, in turn, that were made."""
    folder = tmp_path_factory.mktemp("run")
    clip(folder / "a.mp4", 1)
    write_lora(folder / "one.safetensors", pipe, 1), write_lora(folder / "two.safetensors", pipe, 2)
    write_vae(folder / "vae.safetensors", pipe)
    save_file({"emb_params": draw(2, 32)}, folder / "word.safetensors")
    own = [{}, {"lora": "one.safetensors"}, {"lora": "two.safetensors:0.5"}, {"vae": "vae.safetensors"}]
    own += [{"embedding": "style=word.safetensors"}]
    rows = [{"reference": "a.mp4", "prompt": "a style x", "seed": 0, **more} for more in own]
    rows += [{**row, "seed": 1} for row in rows[:3]]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = transfer(folder, "--prompts", "jobs.jsonl", "--json")
    assert {line["state"] for line in lines(ended)} == {"done"}, ended.err
    return folder


def kind_of(line) -> str:
    return str({name: line["settings"][name] for name in ("lora", "vae", "embedding") if name in line["settings"]})


def frames(path: Path) -> np.ndarray:
    return read_clip(path, frames=FRAMES).frames


def test_jobs_with_the_same_files_are_made_one_after_another(run):
    kinds = [kind_of(line) for line in journal(run / "out")]
    assert len(kinds) == 8
    assert [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind] == list(dict.fromkeys(kinds))


def test_each_clip_is_made_with_its_own_files_and_says_so(run, tmp_path):
    made = journal(run / "out")
    assert len({line["id"] for line in made}) == len(made)
    assert len({frames(run / "out" / line["output"]).tobytes() for line in made}) == len(made)
    by_kind = {kind_of(line): line for line in made}
    [record] = [line["addons"] for kind, line in by_kind.items() if "two" in kind]
    sha256 = ContentIndex(tmp_path / "cache").sha256(run / "two.safetensors")
    assert record == [{"kind": "lora", "sha256": sha256, "file": "two.safetensors", "scale": 0.5}]
    assert "addons" not in by_kind["{}"]
    assert "lora" not in by_kind["{}"]["settings"]


def test_a_run_with_a_lora_alone_makes_the_same_clip_as_one_among_others(run, tmp_path):
    """And the motion of a reference that was read with other weights is not taken from the cache."""
    [wanted] = [x for x in journal(run / "out") if x["seed"] == 1 and "two" in kind_of(x)]
    options = ["a.mp4", "--prompt", "a style x", "--seeds", 1, "--lora", "two.safetensors:0.5", "--json", "-o", "alone"]
    [line] = lines(transfer(run, *options))
    assert line["id"] == wanted["id"]
    assert (frames(run / "alone" / line["output"]) == frames(run / "out" / wanted["output"])).all()
    ended = emt(
        "plan", *map(str, options), "--model", str(model()), "--device", "cpu", folder=run, environment=environment(run)
    )
    assert json.loads(ended.out.splitlines()[0])["state"] == "done"


def test_rerun_takes_the_files_that_made_a_clip_by_their_content(run, tmp_path):
    by_kind = {kind_of(line): line for line in journal(run / "out")}
    [two] = [line for kind, line in by_kind.items() if "two" in kind]
    words = ["rerun", f"out/{two['output']}", "--device", "cpu", "-o"]

    def again(*more):
        return emt(*words, str(tmp_path / "again.mp4"), "--overwrite", *more, folder=run, environment=environment(run))

    ended = again()
    assert "identical with the original" in ended.err, ended.err
    (run / "two.safetensors").rename(run / "moved.safetensors")
    try:
        shutil.copy(run / "one.safetensors", run / "two.safetensors")
        ended = again()
        assert ended.code == 1
        assert "the LoRA two.safetensors that made it is not where it was, or is another now" in ended.err
        for option in ("--addon", "--lora"):
            ended = again(option, "moved.safetensors")
            assert "identical with the original" in ended.err, ended.err
        ended = again("--lora", "moved.safetensors", "--lora", "one.safetensors")
        assert (ended.code, "one.safetensors is none of the files that made it" in ended.err) == (1, True), ended.err
    finally:
        (run / "moved.safetensors").replace(run / "two.safetensors")


def test_a_file_that_is_not_there_or_does_not_fit_is_one_line(run):
    ended = transfer(run, "a.mp4", "--prompt", "x", "--lora", "nowhere.safetensors", "-o", "bad")
    assert ended.code == 1
    assert "the LoRA" in ended.err
    assert "nowhere.safetensors does not exist" in ended.err
    ended = transfer(run, "a.mp4", "--prompt", "x", "--lora", "vae.safetensors", "-o", "bad", "--json")
    assert [line["error"] for line in lines(ended)] == [f"{run}/vae.safetensors is a VAE, not a LoRA"]
    ended = transfer(run, "a.mp4", "--prompt", "x", "--clip-skip", 2, "-o", "bad", "--json")
    assert [line["error"] for line in lines(ended)] == ["clip_skip is 2"]


def test_a_file_behind_a_url_is_fetched_and_on_the_word_of_a_plan_it_is_not(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with fsspec.open("memory://loras/a.safetensors", "wb") as file:
        file.write(b"content")
    settings = Settings(lora=parse_field("lora", "memory://loras/a.safetensors:0.5"))
    index = ContentIndex(tmp_path / "cache")
    with pytest.raises(EmtError, match=r"a\.safetensors is not on this machine"):
        AddonFinder(index, download=False).find(settings)
    [(path, scale)] = AddonFinder(index).find(settings).loras
    assert (path.read_bytes(), scale) == (b"content", 0.5)
    assert AddonFinder(index, download=False).find(settings).loras == [(path, scale)]


def test_secrets_in_the_url_of_a_file_are_in_no_record():
    signed = "https://me:secret@host:8080/a.safetensors?sig=secret&se=2026-11-30T00:00:00Z"
    given = {"lora": [f"{signed}:0.8"], "vae": signed, "embedding": [f"style={signed}"]}
    settings = Settings(**{name: parse_field(name, value) for name, value in given.items()})
    assert split_scale(settings.lora[0]) == (signed, 0.8)
    kept = settings.as_dict()
    assert "secret" not in json.dumps(kept)
    assert kept["lora"] == ["https://host:8080/a.safetensors?…:0.8"]
    assert kept["embedding"] == ["style=https://host:8080/a.safetensors?…"]
    assert split_scale(signed) == (signed, 1.0), "a time is no scale"


# ---- LoRAs of few steps --------------------------------------------------------------------------------------------


def test_a_distilled_lora_brings_its_sampling_and_says_so_once(tmp_path):
    """As in an import; what the clip sets for itself holds."""
    said: list[str] = []

    def settings(lora, **given):
        given = {name: parse_field(name, value) for name, value in given.items()}
        options = TransferOptions(["-"], settings={"lora": parse_field("lora", lora), **given})
        options = replace(options, references=[str(clip(tmp_path / "a.mp4", 1))], prompt=["x"])
        [job], _ = expand(options, DEFAULTS, said.append)
        return job.settings.scheduler.value, job.settings.steps, job.settings.guidance

    for lora in ("lcm-lora-sdv1-5.safetensors:0.9", "hf://latent-consistency/lcm-lora-sdv1-5"):
        said.clear()
        assert settings(lora) == ("lcm", 6, 1.0)
        assert said == [
            "note: a LoRA of latent consistency: --scheduler lcm --steps 6 --guidance 1.0 "
            "(options of the clip change them)"
        ]
    said.clear()
    assert settings("x/AnimateLCM_sd15_t2v_lora.safetensors", steps=4) == ("lcm", 4, 1.5)
    assert "--scheduler lcm --guidance 1.5" in said[0]
    assert settings("lcm/other.safetensors") == ("ddim", 25, 6.0), "the folder of a file says nothing"

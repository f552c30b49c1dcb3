"""The recipe of the small diffusion transformer at toy size: every stage runs, and its parts are what they claim."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from test_recipes import drifting_textures

from emt import demo
from emt.backbones.wan21.transformer import WanMotionTransferTransformer
from emt.backends.codec import ImageCodec, pack, unpack
from emt.pipeline import MotionTransferPipeline, load_pipeline
from emt.train.objective import FlowObjective
from recipes import ablations_dit, assemble_dit, train_dit, train_dit_all
from recipes.dit import (
    SMALL,
    TINY,
    SharedParts,
    adapter_loss,
    backbone_loss,
    known_places,
    make_reader,
    make_transformer,
    one_frame_of_each,
    packed,
)
from recipes.hints import MotionHints
from recipes.muon import Muon, orthogonalized
from recipes.optimizer import GraphTrainer


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all stages, a few steps each."""
    folder = tmp_path_factory.mktemp("dit")
    options = ["--tiny", "--device", "cpu", "--steps", "3", "--batch", "8", "--motions", "16", "--clips", "0"]
    train_dit_all.main(["--out", str(folder), *options])
    return folder


@pytest.fixture(scope="module")
def pipeline(out: Path) -> MotionTransferPipeline:
    return load_pipeline(out / "model")


@pytest.fixture(scope="module")
def parts() -> SharedParts:
    return SharedParts.load(demo.path())


class TestLatents:
    """A latent frame is of neighbouring frames, channels of one after those of the other."""

    @given(frames=st.integers(1, 4), k=st.integers(1, 3), channels=st.integers(1, 3), n=st.integers(1, 2))
    @settings(max_examples=30, deadline=None)
    def test_unpacking_undoes_packing(self, frames, k, channels, n):
        latents = torch.randn(n, channels, k * frames, 2, 3)
        assert pack(latents, frames).shape == (n, frames * channels, k, 2, 3)
        assert torch.equal(unpack(pack(latents, frames), frames), latents)

    def test_channels_of_a_latent_frame_are_frame_by_frame(self):
        latents = torch.arange(4).view(1, 1, 4, 1, 1).expand(1, 3, 4, 1, 1)  # each frame holds its number
        assert pack(latents, 2)[0, :, :, 0, 0].tolist() == [[0, 2]] * 3 + [[1, 3]] * 3

    def test_frames_come_back_in_order(self, pipeline):
        assert isinstance(pipeline.codec, ImageCodec)
        assert pipeline.codec.frames == 2
        clip = np.zeros((4, 32, 32, 3), np.uint8) + np.array([20, 90, 160, 230], np.uint8)[:, None, None, None]
        latents = pipeline.encode_frames(clip, torch.Generator().manual_seed(0))
        assert latents.shape == (1, 16, 2, 4, 4)
        back = pipeline.decode_latents(latents[0])
        assert np.abs(back.mean((1, 2, 3)) - [20, 90, 160, 230]).max() < 30

    def test_a_number_of_frames_that_leaves_a_remainder(self, pipeline):
        with pytest.raises(ValueError, match="3 frames, allowed are 2, 4, …"):
            pipeline.extract_motion(np.zeros((3, 32, 32, 3), np.uint8))

    def test_a_batch_is_packed_with_its_truths(self):
        g = torch.Generator().manual_seed(0)
        latents, subject = torch.randn(2, 3, 4, 2, 2, generator=g), torch.rand(2, 1, 4, 2, 2, generator=g)
        displacement = torch.randn(2, 4, 2, 2, 2, generator=g)
        batch = packed({"latents": latents, "subject": subject, "displacement": displacement}, 2)
        weighted = unpack(batch["latents"] * batch["subject"], 2)
        assert torch.equal(weighted, latents * subject)
        assert torch.equal(batch["displacement"], displacement[:, [1, 3]])

    def test_of_each_clip_one_latent_frame_is_drawn_with_its_caption(self):
        latents = torch.arange(64.0).view(64, 1, 1, 1, 1) + torch.tensor([0.0, 0.25, 0.5]).view(1, 1, 3, 1, 1)
        tokens = torch.arange(64)[:, None]
        batch = {"latents": latents, "subject": 2 * latents, "tokens": tokens, "displacement": latents}
        single = one_frame_of_each(batch, torch.Generator().manual_seed(0))
        assert single["latents"].shape == (64, 1, 1, 1, 1)
        assert torch.equal(single["subject"], 2 * single["latents"])
        assert torch.equal(single["latents"].flatten().floor().long(), single["tokens"].flatten())
        assert set((single["latents"] % 1).flatten().tolist()) == {0.0, 0.25, 0.5}


class TestStages:
    def test_the_model_opens_and_makes_clips(self, pipeline):
        assert isinstance(pipeline.unet, WanMotionTransferTransformer)
        motion = pipeline.extract_motion(np.zeros((4, 32, 32, 3), np.uint8))
        assert pipeline.generate("a red cat in the desert", motion, steps=2)[0].shape == (4, 32, 32, 3)
        assert pipeline.generate("a red cat in the desert", steps=2)[0].shape == (4, 32, 32, 3)
        with pytest.raises(Exception, match="zebracorn"):
            pipeline.generate("a zebracorn")

    def test_the_backbone_is_frozen_while_the_adapter_learns(self, out):
        video = train_dit.weights_of(out / "video.safetensors", "transformer")
        model = load_file(out / "model" / "unet" / "diffusion_pytorch_model.safetensors")
        learnt = train_dit.weights_of(out / "adapter.safetensors", "adapter")
        assert model.keys() == video.keys() | learnt.keys()
        assert all(".adapter." in name for name in learnt)
        for name, tensor in (video | learnt).items():
            assert torch.equal(model[name].float(), tensor), name
        assert any(tensor.abs().sum() > 0 for name, tensor in learnt.items() if name.endswith("up.weight"))

    def test_what_is_done_is_not_done_again(self, out, capsys):
        before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
        options = ["--tiny", "--device", "cpu", "--steps", "3", "--batch", "8", "--clips", "0"]
        train_dit_all.main(["--out", str(out), *options])
        assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before
        assert "[video] is done" in capsys.readouterr().out

    def test_what_there_is_so_far_is_kept(self, out, tmp_path, monkeypatch):
        """A stage that is killed leaves its last saving, from which `--start-from` goes on."""
        kept = []
        original = train_dit.save_weights

        def save(path, *args, **kwargs):
            kept.append(path.name)
            original(path, *args, **kwargs)

        monkeypatch.setattr(train_dit, "save_weights", save)
        options = [
            "--out",
            str(out),
            "--tiny",
            "--device",
            "cpu",
            "--steps",
            "2",
            "--batch",
            "8",
            "--save-minutes",
            "0",
        ]
        train_dit.main(["video", *options])
        assert kept[0] == "video-so-far.safetensors"
        assert kept[-1] == "video.safetensors"
        assert not (out / "video-so-far.safetensors").exists()
        train_dit.main(["video", *options, "--start-from", str(out / "video.safetensors")])

    def test_going_on_from_a_model_folder(self, out, tmp_path, monkeypatch):
        """Its backbone is what the video stage starts with; the parts that it shares stay as they are."""
        seen = {}
        original = GraphTrainer.__init__

        def look(self, loss, groups, **options):
            seen.setdefault("first", [p.detach().clone() for p in options["matrices"][0][0]])
            original(self, loss, groups, **options)

        monkeypatch.setattr(GraphTrainer, "__init__", look)
        options = ["--tiny", "--device", "cpu", "--steps", "2", "--batch", "8", "--motions", "8", "--clips", "0"]
        train_dit_all.main(["--out", str(tmp_path), *options, "--start-from", str(out / "model")])
        model = load_file(out / "model" / "unet" / "diffusion_pytorch_model.safetensors")
        matrices = [v for k, v in model.items() if k.startswith("blocks.") and ".adapter." not in k and v.ndim == 2]
        assert sorted(x.float().sum().item() for x in seen["first"]) == sorted(x.float().sum().item() for x in matrices)
        assert not (tmp_path / "frames.safetensors").exists()
        for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
            assert (tmp_path / "model" / part).read_bytes() == (out / "model" / part).read_bytes()

    def test_a_stage_whose_clips_are_told_keeps_what_tells_them(self, out, tmp_path):
        """For the next run of the stage, which goes on with it; the model has nothing of it."""
        options = ["--tiny", "--device", "cpu", "--steps", "2", "--batch", "8", "--told", "0.5"]
        (tmp_path / "latents.safetensors").symlink_to(out / "latents.safetensors")
        start = ["--start-from", str(out / "video.safetensors")]
        train_dit.main(["video", "--out", str(tmp_path), *options, *start])
        log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert all(record["plain"] > 0 and record["told"] > 0 for record in log if "loss" in record)
        saved = tmp_path / "video.safetensors"
        hints = train_dit.weights_of(saved, "hints")
        assert hints["map.weight"].abs().sum() > 0
        assert (
            train_dit.weights_of(saved, "transformer").keys()
            == train_dit.weights_of(out / "video.safetensors", "transformer").keys()
        )
        train_dit.main(["video", "--out", str(tmp_path), *options, "--start-from", str(saved)])
        assert not torch.equal(train_dit.weights_of(saved, "hints")["map.weight"], hints["map.weight"])

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--blocks", "2", "--neighbours", "0"], {"reference_blocks": [2], "reference_neighbours": 0}),
            (["--no-scaler", "--reference-timestep", "300"], {"reference_timestep": "300"}),
            (["--muon"], {"reference_blocks": [1, 2]}),
        ],
    )
    def test_ablations_of_the_adapter(self, out, options, expected):
        common = ["--out", str(out), "--tiny", "--device", "cpu", "--steps", "2", "--batch", "8"]
        train_dit.main(["adapter", *common, "--name", "ablation", *options])
        with safe_open(str(out / "ablation.safetensors"), "pt") as file:
            assert json.loads(file.metadata()["options"]).items() >= expected.items()
            scalers = [file.get_tensor(name) for name in file.keys() if "scaler.out" in name]  # noqa: SIM118
        if "--no-scaler" in options:
            assert all((tensor == 0).all() for tensor in scalers)
        assemble_dit.assemble(out, out / "model-ablation", demo.path(), tiny=True, adapter="ablation")

    def test_an_adapter_taught_by_the_backbone_that_is_told_the_truth(self, out, tmp_path):
        """It learns something else than from the clips alone; the hints and the backbone stay as they are."""
        options = ["--out", str(tmp_path), "--tiny", "--device", "cpu", "--steps", "2", "--batch", "8"]
        for part in ("latents", "frames"):
            (tmp_path / f"{part}.safetensors").symlink_to(out / f"{part}.safetensors")
        train_dit.main(["video", *options, "--told", "0.5"])
        video = (tmp_path / "video.safetensors").read_bytes()
        for name, share in (("alone", "0"), ("taught", "0.7")):
            train_dit.main(["adapter", *options, "--name", name, "--taught", share])
        alone, taught = (
            train_dit.weights_of(tmp_path / f"{name}.safetensors", "adapter") for name in ("alone", "taught")
        )
        assert alone.keys() == taught.keys()
        assert any(not torch.equal(alone[name], taught[name]) for name in alone)
        assert (tmp_path / "video.safetensors").read_bytes() == video


class TestAblations:
    def test_options_and_trained_variants_are_rows_of_one_table(self, out):
        names = ["full", "backbone", "until-0.6", "early-only", "same-frame-only", "level-400", "trained-middle"]
        options = ["--tiny", "--eager", "--device", "cpu", "--steps", "2", "--batch", "4", "--clips", "3"]
        further = ["--sampler-steps", "2", "--repeats", "1", "--workers", "1", "--names", *names]
        ablations_dit.main(["--out", str(out), *options, *further])
        rows = json.loads((out / "ablations.json").read_text())
        assert [row["steps"] for row in rows.values()] == [3, 0, 3, 3, 3, 3, 2]
        assert all(row["seconds"]["value"] > 0 for row in rows.values())
        with safe_open(str(out / "trained-middle.safetensors"), "pt") as file:
            assert json.loads(file.metadata()["options"])["reference_blocks"] == [2]
        table = (out / "ablations.md").read_text()
        assert "middle blocks (2), trained so | 2 |" in table

    def test_an_option_changes_what_it_says(self, out):
        blocks = TINY.blocks
        options = ablations_dit.options_of(blocks)
        opened = {
            name: ablations_dit.with_option(out / "model", options[name], torch.device("cpu"), torch.float32)
            for name in ("full", "early-only", "one-neighbour-only", "level-200")
        }
        assert opened["full"].unet.reference_layers() == ["blocks.1", "blocks.2"]
        assert opened["early-only"].unet.reference_layers() == ["blocks.1"]
        assert opened["one-neighbour-only"].unet.config.reference_neighbours == 1
        assert opened["level-200"].config.reference_timestep == 200

    def test_thirds_leave_no_block_out(self):
        assert ablations_dit.thirds(SMALL.blocks) == {"early": [1, 2], "middle": [3, 4, 5], "late": [6, 7]}

    def test_two_blocks_are_as_far_from_the_first_as_from_the_last(self):
        assert ablations_dit.parts_of(range(1, 7))["two"] == [3, 4]

    def test_unknown_rows_are_refused(self, out):
        with pytest.raises(SystemExit, match=r"no rows are \['sideways'\]"):
            ablations_dit.main(["--out", str(out), "--names", "sideways"])


class TestMuon:
    @pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 6), (2, 6, 16)])
    def test_singular_values_are_about_one_and_vectors_stay(self, shape):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found = orthogonalized(matrices)
        assert ((torch.linalg.svdvals(found) > 0.6) & (torch.linalg.svdvals(found) < 1.25)).all()
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        turned = u.mT @ found @ v.mT
        assert (turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).abs().max() < 0.05

    def test_a_step_is_that_of_the_published_optimizer(self):
        """PyTorch's, of one matrix at a time, which computes in bfloat16 everywhere."""
        torch.manual_seed(0)
        ours, rate = torch.randn(2, 12, 8), torch.tensor(1e-2)
        theirs = [torch.nn.Parameter(x.clone()) for x in ours]
        published = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        gradients = torch.zeros_like(ours)
        muon = Muon([(ours, gradients, rate)], weight_decay=0.1)
        for _ in range(4):
            gradients.copy_(torch.randn(2, 12, 8))
            for p, gradient in zip(theirs, gradients, strict=True):
                p.grad = gradient.clone()
            muon.step()
            published.step()
        assert (ours - torch.stack([p.detach() for p in theirs])).abs().max() < 4e-4  # steps are of 2e-3

    def test_the_trainer_gives_matrices_of_any_shapes_their_steps_and_the_rest_to_adamw(self):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Linear(9, 9), torch.nn.Linear(9, 5))
        before = [p.detach().clone() for p in model.parameters()]
        matrices = [p for p in model.parameters() if p.ndim == 2]
        trainer = GraphTrainer(
            lambda x: (model(x) - x).square().mean(),
            [([p for p in model.parameters() if p.ndim == 1], 1e-2)],
            matrices=[(matrices, 1e-2)],
        )
        losses = []
        for step in range(150):
            trainer.step({"x": torch.randn(32, 5)}, 1.0)
            if step == 0:
                changes = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
            losses.append(trainer.read()["loss"])
        # A step of Muon has singular values near the rate · 0.2 · √(the longer side), as many as the gradient's rank,
        # which is that of the input; one of AdamW has the rate everywhere.
        for change in changes:
            if change.ndim == 2:
                values = torch.linalg.svdvals(change) / (1e-2 * 0.2 * max(change.shape) ** 0.5)
                assert ((values[:5] > 0.5) & (values[:5] < 1.4)).all()
            else:
                assert change.abs().max() == pytest.approx(1e-2, rel=1e-2)
        assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


class TestLosses:
    def test_the_small_model_and_what_it_shares_are_small(self, parts):
        model = make_transformer(SMALL, parts, SMALL.blocks, 16)
        shared = sum(p.numel() for part in (parts.vae, parts.text) for p in part.parameters())
        own = sum(p.numel() for p in model.parameters())
        assert own < 12e6
        assert 2 * (own + shared) < 24 * 2**20

    def test_a_perfect_prediction_has_no_loss_but_that_of_reading(self):
        objective, g = FlowObjective(), torch.Generator().manual_seed(0)
        latents, noise = torch.randn(2, 3, 4, 2, 2, 2, generator=g)
        timestep = torch.tensor([0.0, 500.0, 1000.0])
        subject = torch.full((3, 1, 1, 1, 1), 3.0)
        assert objective.loss(noise - latents, latents, noise, timestep) == 0
        off = [objective.loss((noise - latents)[i : i + 1] + 1, latents[i : i + 1], noise[i : i + 1], t, subject[:1])
               for i, t in enumerate(timestep[:, None])]  # fmt: skip
        assert [x.item() for x in off] == pytest.approx([4.0, 1.75, 1.0], rel=1e-5)
        assert torch.equal(objective.add_noise(latents, noise, timestep)[2], noise[2])

    def test_clips_that_are_read_are_not_denoised(self, parts):
        """The denoising loss leaves them out; the reader's loss includes them."""
        torch.manual_seed(0)
        model = make_transformer(TINY, parts, (), 4)
        torch.nn.init.normal_(model.proj_out.weight, std=0.02)
        reader = make_reader(model, 3, "cpu", torch.float32)
        batch = drifting_textures(3, torch.Generator().manual_seed(0))
        batch["latents"] = batch["latents"].repeat(1, 2, 1, 1, 1)
        batch = packed(batch, 2)
        batch |= {"noise": torch.randn_like(batch["latents"]), "timestep": torch.tensor([50.0, 300.0, 900.0])}
        batch = {key: value for key, value in batch.items() if key != "tokens"}
        given = {"text": torch.zeros(3, 3, parts.text.config.hidden_size)}

        def loss(weight, read, **changed):
            return backbone_loss(model, FlowObjective(), reader, weight, read=read, **given, **batch | changed)

        louder = {"noise": batch["noise"] * torch.tensor([2.0, 1.0, 1.0]).view(3, 1, 1, 1, 1)}
        assert torch.equal(loss(0.0, 1), loss(0.0, 1, **louder))
        assert not torch.equal(loss(0.0, 0), loss(0.0, 0, **louder))
        displaced = {"displacement": batch["displacement"] * torch.tensor([2.0, 1.0, 1.0]).view(3, 1, 1, 1, 1)}
        assert not torch.equal(loss(1.0, 1), loss(1.0, 1, **displaced))

    def test_what_clips_are_told_is_added_to_the_last_ones_alone(self, parts):
        """Before the first block that takes a reference; a map that has learned nothing adds nothing."""
        torch.manual_seed(0)
        model = make_transformer(TINY, parts, (), 4).requires_grad_(False)
        torch.nn.init.normal_(model.proj_out.weight, std=0.02)
        batch = packed(pairs_of_textures(3), 2)
        truth = {name: batch[name] for name in ("displacement", "pose", "upright")}
        text = torch.zeros(3, 3, parts.text.config.hidden_size)
        hints = MotionHints(TINY.heads * TINY.head_channels)

        def prediction(told: int, **changed: torch.Tensor) -> torch.Tensor:
            with hints.told(model.blocks[0], told, 4, 4, **truth | changed):
                return model(batch["latents"], torch.full((3,), 500.0), text)

        plain = prediction(0)
        assert torch.equal(prediction(2), plain)
        torch.nn.init.normal_(hints.map.weight)
        found = prediction(2)
        assert torch.equal(found[:1], plain[:1])
        assert all((found[i] - plain[i]).abs().max() > 1e-3 for i in (1, 2))
        further = truth["displacement"] * torch.tensor([1.0, 1.0, 2.0]).view(3, 1, 1, 1, 1)
        other = prediction(2, displacement=further)
        assert torch.equal(other[:2], found[:2])
        assert not torch.equal(other[2], found[2])
        assert torch.equal(prediction(0), plain)

    def test_clips_that_are_told_are_denoised_and_not_read(self, parts):
        torch.manual_seed(0)
        model = make_transformer(TINY, parts, (), 4)
        torch.nn.init.normal_(model.proj_out.weight, std=0.02)
        reader, hints = make_reader(model, 3, "cpu", torch.float32), MotionHints(TINY.heads * TINY.head_channels)
        batch = packed(pairs_of_textures(3), 2)
        batch |= {"noise": torch.randn_like(batch["latents"]), "timestep": torch.tensor([50.0, 300.0, 900.0])}
        batch["text"] = torch.zeros(3, 3, parts.text.config.hidden_size)
        how = {"read": 1, "told": 1, "hints": hints, "first": 1}

        def loss(weight: float, **changed: torch.Tensor) -> torch.Tensor:
            return backbone_loss(model, FlowObjective(), reader, weight, **how, **batch | changed)

        louder = {"noise": batch["noise"] * torch.tensor([1.0, 1.0, 2.0]).view(3, 1, 1, 1, 1)}
        assert not torch.equal(loss(0.0), loss(0.0, **louder))
        displaced = {"displacement": batch["displacement"] * torch.tensor([1.0, 1.0, 2.0]).view(3, 1, 1, 1, 1)}
        assert torch.equal(loss(1.0), loss(1.0, **displaced))  # the map has learned nothing yet
        loss(1.0).backward()
        assert hints.map.weight.grad.abs().sum() > 0
        noted = hints.losses()
        assert noted.keys() == {"plain", "told"}
        assert hints.losses() == {}

    @pytest.mark.parametrize(("timestep", "expected"), [(0.0, 4.0), (500.0, 4.0), (850.0, 4.0), (1000.0, 1.0)])
    def test_subjects_in_known_places_count_the_same_at_all_noise_levels(self, timestep, expected):
        """Three times more than the rest, and no more where nothing of them is left."""
        objective, level = FlowObjective(), torch.tensor([timestep])
        zero, subject = torch.zeros(1, 2, 1, 2, 2), torch.full((1, 1, 1, 1, 1), 3.0)
        known = known_places(objective, subject, level)
        assert objective.loss(zero + 1, zero, zero, level, known).item() == pytest.approx(expected, rel=1e-4)

    def test_gradients_reach_the_adapter_alone_and_through_the_scaler(self, parts):
        torch.manual_seed(0)
        model = make_transformer(TINY, parts, TINY.blocks, 4).requires_grad_(False)
        torch.nn.init.normal_(model.proj_out.weight, std=0.02)
        adapter = dict(model.adapter_parameters())
        for p in adapter.values():
            p.requires_grad_(True)
            torch.nn.init.normal_(p, std=0.1)
        batch = drifting_textures(2, torch.Generator().manual_seed(0))
        batch |= {
            "latents": batch["latents"].repeat(1, 2, 1, 1, 1),
            "reference": batch["latents"].repeat(1, 2, 1, 1, 1),
        }
        batch = packed(batch, 2)
        text = torch.zeros(2, 3, parts.text.config.hidden_size)
        names = ("reference", "latents", "subject", "displacement", "pose")
        loss = adapter_loss(
            model,
            FlowObjective(),
            make_reader(model, 2, "cpu", torch.float32),
            0.5,
            reference_noise=torch.zeros_like(batch["latents"]),
            reference_timestep=50.0,
            empty=text[:1],
            text=text,
            noise=torch.randn_like(batch["latents"]),
            timestep=torch.tensor([300.0, 900.0]),
            **{name: batch[name] for name in names},
        )
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in adapter.values())
        assert all(p.grad is None for name, p in model.named_parameters() if name not in adapter)


def pairs_of_textures(n: int) -> dict[str, torch.Tensor]:
    """Clips of drifting textures with as many channels as the demo model's latents, without tokens."""
    batch = drifting_textures(n, torch.Generator().manual_seed(0))
    batch["latents"] = batch["latents"].repeat(1, 2, 1, 1, 1)
    return {key: value for key, value in batch.items() if key not in ("tokens", "noise", "timestep")}


@pytest.mark.slow
def test_the_backbone_learns_to_see_what_moves(parts) -> None:
    """Of textures that it has never seen, and which say nothing but by moving: two minutes on two cores."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = WanMotionTransferTransformer(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=8,
        out_channels=8,
        text_dim=8,
        freq_dim=64,
        ffn_dim=128,
        num_layers=4,
        reference_blocks=[],
        frames_per_latent=2,
        first_frames=2,
    )
    torch.nn.init.zeros_(model.proj_out.weight)
    reader, objective = make_reader(model, 4, "cpu", torch.float32), FlowObjective()
    trainer = GraphTrainer(
        lambda **batch: backbone_loss(model, objective, reader, 5.0, text=torch.zeros(16, 4, 8), **batch),
        [(list(model.parameters()), 1e-3), (list(reader.parameters()), 3e-3)],
    )
    for step in range(1000):
        batch = packed(drifting_textures(16, generator), 2)
        batch |= {"noise": torch.randn(batch["latents"].shape, generator=generator)}
        batch["timestep"] = batch["timestep"].float()
        trainer.step({key: value for key, value in batch.items() if key != "tokens"}, min(1, (step + 1) / 100))
        if step == 899:
            reader.explained()
    read = reader.explained()
    assert min(read["r2_x"], read["r2_y"]) > 0.5


def test_a_long_clip_is_made_in_windows_of_packed_frames(pipeline):
    """Latent frames of two frames each; the network takes two latent frames at once."""
    clip = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    windows = pipeline.windows_over(10)
    latents = pipeline.encode_frames(clip, torch.Generator().manual_seed(0), windows)
    assert (windows.frames, windows.size, latents.shape[2]) == (5, 2, 5)
    ((made,), back) = pipeline.generate("a red cat", pipeline.extract_motion(clip), steps=2), latents[0]
    assert made.shape == clip.shape
    assert pipeline.decode_clips([back], windows)[0].shape == clip.shape

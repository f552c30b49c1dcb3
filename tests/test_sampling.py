"""Samplers: where they begin, that a step lands where the next one starts, and that opening a model changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from emt.backbones.sd15.stable_diffusion import animatediff_scheduler
from emt.errors import EmtError
from emt.presets import TWICE
from emt.sampling import (
    FLOW_SCHEDULERS,
    SCHEDULERS,
    make_sampler,
    noise_generator,
    run_sampler,
    scheduler_options,
)
from emt_cli.batch.options import Scheduler, parse_field

SHAPE = (2, 4, 3, 5, 5)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def scheduler(request):
    return animatediff_scheduler(request.param)


@pytest.fixture(scope="module", params=["leading", "trailing"])
def spaced(request):
    return DDIMScheduler.from_config(animatediff_scheduler("epsilon").config, timestep_spacing=request.param)


@pytest.mark.parametrize("steps", [1, 4, 8, 25])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_k2_a_sampler_is_the_same_however_the_model_was_opened(tmp_path, scheduler, name, steps):
    scheduler.save_pretrained(tmp_path)
    opened = DDIMScheduler.from_pretrained(tmp_path)
    made, again = make_sampler(name, scheduler, steps), make_sampler(name, opened, steps)
    assert made.timesteps.tolist() == again.timesteps.tolist()
    assert made.config.prediction_type == again.config.prediction_type == scheduler.config.prediction_type


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 25, 50])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ddim"])
def test_samplers_begin_at_the_end_of_the_schedule(name, steps):
    assert int(make_sampler(name, animatediff_scheduler("epsilon"), steps).timesteps[0]) == 999


@pytest.mark.parametrize(
    ("name", "steps", "spacing"),
    [
        ("euler", 1, "trailing"),
        ("euler", 60, "trailing"),
        ("euler", 61, "linspace"),
        ("dpm++_2m_karras", 1, "trailing"),  # there is no way to go down to 0 in one
        ("dpm++_2m_karras", 2, "linspace"),
        ("ddim", 1, "trailing"),
        ("ddim", 2, None),  # the model's own
        ("lcm", 1, None),
    ],
)
def test_where_the_timesteps_of_a_sampler_lie(name, steps, spacing):
    assert scheduler_options(name, steps).get("timestep_spacing") == spacing


def test_k2_one_step_of_ddim_is_not_the_first_noise(spaced):
    assert make_sampler("ddim", spaced, 1).timesteps.tolist() == [999]
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    latents = run_sampler(knowing(image, spaced), make_sampler("ddim", spaced, 1), torch.randn(SHAPE), 1.0)
    assert (latents - image).abs().max() < 0.02 * 999


@pytest.mark.parametrize("steps", [32, 61, 150, 201, 251, 333, 334, 400, 499, 500])
@pytest.mark.parametrize("name", ["ddim", "dpm++", "unipc", "euler"])
def test_k2_more_steps_do_not_begin_later_and_are_as_many(spaced, name, steps):
    timesteps = make_sampler(name, spaced, steps).timesteps
    assert len(timesteps) == steps
    assert int(timesteps[0]) >= 999 - 1000 / steps
    assert int(timesteps[-1]) >= 0
    assert (timesteps.diff() < 0).all()


@pytest.mark.parametrize("steps", [2, 3, 5, 10, 25, 40, 100])
def test_steps_of_ddim_are_the_published_ones(steps):
    """Also few ones, which begin long before the end: clips of two or three steps stay those that they were."""
    published = DDIMScheduler(1000, 0.00085, 0.012, "linear", steps_offset=1, clip_sample=False)
    published.set_timesteps(steps)
    assert make_sampler("ddim", published, steps).timesteps.tolist() == published.timesteps.tolist()


def knowing(image: Tensor, scheduler: DDIMScheduler):
    """A network that knows the image: it predicts the noise that is in a sample, exactly."""

    def predict(sample: Tensor, timestep: Tensor, step: int, guided: bool) -> Tensor:
        signal = scheduler.alphas_cumprod[int(timestep)]
        return (sample - signal.sqrt() * image) / (1 - signal).sqrt()

    return predict


@pytest.mark.parametrize("steps", [25, 150, 334])
def test_each_step_lands_at_the_timestep_of_the_next_one(steps):
    """With the true noise predicted, every sample is the image and the first noise in that timestep's shares."""
    scheduler = animatediff_scheduler("epsilon")
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    sampler = make_sampler("ddim", scheduler, steps)
    predict = knowing(image, scheduler)
    sample = scheduler.add_noise(image, noise, sampler.timesteps[0])
    for here, following in zip(sampler.timesteps, sampler.timesteps[1:]):
        sample = sampler.step(predict(sample, here, 0, False), here, sample).prev_sample
        torch.testing.assert_close(sample, scheduler.add_noise(image, noise, following), rtol=1e-3, atol=1e-3)
    last = sampler.timesteps[-1]
    torch.testing.assert_close(
        sampler.step(predict(sample, last, 0, False), last, sample).prev_sample, image, atol=0.04, rtol=0
    )


@pytest.mark.parametrize("steps", [1, 2, 9, 61])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("ddim", "lcm", "tcd")])
def test_every_sampler_arrives_at_an_image_that_the_network_knows(name, steps):
    """Whatever noise it adds on the way: the noise that is predicted is the one in its sample, at its own timestep."""
    scheduler = animatediff_scheduler("epsilon")
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    levels = scheduler.alphas_cumprod.double().numpy()

    def predict(sample: Tensor, timestep: Tensor, step: int, guided: bool) -> Tensor:
        signal = torch.tensor(np.interp(float(timestep), np.arange(1000), levels))  # some stand between two
        return ((sample - signal.sqrt() * image) / (1 - signal).sqrt()).float()

    sampler = make_sampler(name, scheduler, steps)
    assert len(sampler.timesteps) == (2 * steps - 1 if name in TWICE else steps)
    generators = [noise_generator(seed) for seed in range(len(image))]
    found = run_sampler(predict, sampler, noise, 1.0, generators=generators)
    torch.testing.assert_close(found, image, atol=0.1 if name == "deis" else 0.02, rtol=0)


@pytest.mark.parametrize("name", sorted(FLOW_SCHEDULERS))
def test_a_flow_begins_with_the_noise_as_it_is(name):
    noise, seen = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)), []

    def predict(sample: Tensor, timestep: Tensor, step: int, guided: bool) -> Tensor:
        seen.append(sample)
        return torch.zeros_like(sample)

    sampler = make_sampler(name, FlowMatchEulerDiscreteScheduler(), 4)
    run_sampler(predict, sampler, noise, 1.0, generators=[noise_generator(seed) for seed in range(len(noise))])
    torch.testing.assert_close(seen[0], noise)


def test_every_seed_is_another_noise_and_those_of_32_bits_are_torchs_own():
    first = {seed: torch.randn(4, generator=noise_generator(seed)) for seed in (0, 1, 2**32 - 1, 2**32, 2**32 + 1)}
    assert len({tuple(values.tolist()) for values in first.values()}) == 5
    for seed in (0, 1, 2**32 - 1):
        assert torch.equal(first[seed], torch.randn(4, generator=torch.Generator().manual_seed(seed)))


def test_the_order_at_the_end_is_lowered_for_the_sampler_that_needs_it_alone():
    lowered = {name for name in SCHEDULERS if "lower_order_final" in scheduler_options(name, 9)}
    assert lowered == {name for name, kind in SCHEDULERS.items() if "Singlestep" in kind.name}
    assert lowered


def test_samplers_are_those_of_the_options_and_of_diffusers_table():
    """By the names of other programs, as diffusers' documentation maps them to its classes and options."""
    assert {member.value for member in Scheduler} == SCHEDULERS.keys()
    table = {
        "euler_a": ("EulerAncestralDiscreteScheduler", {}),
        "dpm2_a_karras": ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
        "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        "dpm++_2m_sde_karras": (
            "DPMSolverMultistepScheduler",
            {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
        ),
        "dpm++_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    }
    for name, (kind, options) in table.items():
        sampler = make_sampler(name, animatediff_scheduler("epsilon"), 8)
        assert SCHEDULERS[name].name == kind
        assert {option: sampler.config[option] for option in options} == options


@pytest.mark.parametrize(
    ("spelled", "name"),
    [("DPM++ 2M Karras", "dpm++_2m_karras"), ("Euler a", "euler_a"), ("DPM2 a", "dpm2_a"), ("DDIM", "ddim")],
)
def test_jobs_may_spell_samplers_as_the_web_ui_does(spelled, name):
    assert parse_field("scheduler", spelled).value == name
    with pytest.raises(EmtError, match="scheduler is 'PLMS'"):
        parse_field("scheduler", "PLMS")


def test_guidance_leads_from_the_first_half_to_the_second():
    """The halves of a doubled batch have one order: away from what the first predicts, towards the second."""
    noise = torch.randn(1, 2, generator=torch.Generator().manual_seed(0))
    without, with_prompt = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])

    def clip(guidance: float, alone: Tensor = with_prompt) -> Tensor:
        sampler = make_sampler("ddim", animatediff_scheduler("epsilon"), 4)
        both = torch.cat([without, with_prompt])
        return run_sampler(lambda x, t, i, guided: both if guided else alone, sampler, noise, guidance)

    away, towards = clip(1.0, without), clip(1.0)
    torch.testing.assert_close(clip(0.0), away)
    torch.testing.assert_close(clip(3.0), away + 3 * (towards - away))


def test_steps_that_a_sampler_does_not_take_are_an_error():
    with pytest.raises(EmtError, match="lcm does not take 51 steps"):
        make_sampler("lcm", animatediff_scheduler("epsilon"), 51)
    with pytest.raises(EmtError, match="no scheduler 'plms'"):
        make_sampler("plms", animatediff_scheduler("epsilon"), 5)

"""Latents of Wan's VAE in chunks against diffusers' own encoding and decoding."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st

from emt.backbones.wan21.random_model import draw_weights
from emt.backends.video_vae import decode_frames, encode_frames, latent_frames
from emt.errors import EmtError


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    model = AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval()
    draw_weights(model, 0)
    return model


def clip(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), generator=g, dtype=torch.uint8)


def statistics(vae):
    return (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))


@given(n=st.integers(0, 4), height=st.sampled_from([16, 32]), width=st.sampled_from([16, 48]))
@settings(max_examples=8, deadline=None)
@torch.no_grad()
def test_encoded_in_chunks_it_is_what_diffusers_encodes(vae, n, height, width):
    frames = clip(4 * n + 1, height, width)
    mean, std = statistics(vae)
    pixels = frames.permute(3, 0, 1, 2).unsqueeze(0) / 127.5 - 1
    expected = (vae.encode(pixels).latent_dist.mode() - mean) / std
    got = encode_frames(vae, frames)
    assert got.shape == (1, 16, n + 1, height // 8, width // 8)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@given(latents=st.integers(1, 5), height=st.integers(2, 4), width=st.integers(2, 5))
@settings(max_examples=8, deadline=None)
@torch.no_grad()
def test_decoded_in_chunks_it_is_what_diffusers_decodes(vae, latents, height, width):
    z = torch.randn(1, 16, latents, height, width, generator=torch.Generator().manual_seed(1))
    mean, std = statistics(vae)
    expected = ((vae.decode(z * std + mean).sample[0] + 1) * 127.5).round().permute(1, 2, 3, 0)
    chunks = list(decode_frames(vae, z))
    assert [len(chunk) for chunk in chunks] == [1] + [4] * (latents - 1)
    got = torch.cat(chunks)
    assert got.dtype == torch.uint8
    assert (got.float() - expected).abs().max() <= 1


@torch.no_grad()
def test_memory_does_not_grow_with_the_clip(vae):
    """The networks see one latent frame, and at most four frames, at a time."""
    seen = []
    hooks = [
        network.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
        for network in (vae.encoder, vae.decoder)
    ]
    latents = encode_frames(vae, clip(17, 16, 16))
    first = next(decode_frames(vae, latents))
    for hook in hooks:
        hook.remove()
    assert seen == [1, 4, 4, 4, 4, 1]  # nothing of the rest is decoded before it is wanted
    assert first.shape == (1, 16, 16, 3)


@torch.no_grad()
def test_the_latents_of_a_frame_do_not_see_later_ones(vae):
    frames, other = clip(9, 16, 16), clip(9, 16, 16)
    other[5:] = 255 - other[5:]
    a, b = encode_frames(vae, frames), encode_frames(vae, other)
    assert torch.equal(a[:, :, :2], b[:, :, :2])
    assert not torch.equal(a[:, :, 2], b[:, :, 2])


def test_frames_that_are_not_4n_plus_1(vae):
    assert [latent_frames(n) for n in (1, 5, 17, 81)] == [1, 2, 5, 21]
    for frames in (0, 2, 16):
        with pytest.raises(ValueError, match=f"a clip has {frames} frames, allowed are 1, 5, 9"):
            encode_frames(vae, clip(frames, 16, 16))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@torch.no_grad()
def test_k2_a_vae_that_makes_nan_is_an_error_that_names_it(vae, part):
    harmed = copy.deepcopy(vae)
    getattr(harmed, part).conv_out.bias[0] = torch.nan
    with pytest.raises(EmtError, match="the VAE AutoencoderKLWan makes no pictures"):
        list(decode_frames(harmed, encode_frames(harmed, clip(5, 16, 16))))


@torch.no_grad()
def test_k2_a_clip_of_one_colour_is_an_error(vae):
    black = copy.deepcopy(vae)
    black.decoder.conv_out.weight.zero_()
    black.decoder.conv_out.bias.fill_(-3.0)
    with pytest.raises(EmtError, match="of one colour"):
        list(decode_frames(black, torch.zeros(1, 16, 2, 2, 2)))

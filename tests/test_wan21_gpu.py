"""Wan's network on a CUDA GPU: fused attention against its definition, and captured calls against eager ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_wan21_attention import by_definition, tensors

from emt.backbones.wan21.attention import attention_with_reference
from emt.backbones.wan21.random_model import random_model
from emt.backends.torch import TorchBackend
from emt.pipeline import load_pipeline

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("neighbours", [None, 0, 1])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 2e-3), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("channels", [16, 64, 128])
@pytest.mark.parametrize("gradients", [False, True])
def test_attention_is_what_its_definition_says(neighbours, dtype, off, channels, gradients):
    given = tensors(2, 3, 5, 24, channels, seed=0)
    expected = by_definition(*given, 5, neighbours)
    with torch.set_grad_enabled(gradients):
        moved = [t.to("cuda", dtype).requires_grad_(gradients) for t in given]
        got = attention_with_reference(*moved, 5, neighbours)
        if gradients:
            got.square().sum().backward()
            assert all(t.grad.isfinite().all() for t in moved)
    torch.testing.assert_close(got.detach().float().cpu(), expected, atol=off, rtol=0)


@pytest.mark.parametrize("neighbours", [None, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_captured_calls_are_the_eager_ones(tmp_path, neighbours, dtype):
    folder = random_model(tmp_path / "model", reference_neighbours=neighbours, frames=9, height=64, width=64, steps=4)
    pipe = load_pipeline(folder, "cuda", dtype)
    pipe.prompt_encoder.cache = None
    clip = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    made = {}
    for graphs in (False, True):
        pipe.backend = TorchBackend(pipe, graphs=graphs)
        for _ in range(2):  # the reference pass is captured when it comes again
            motion = pipe.extract_motion(clip)
        made[graphs] = pipe.generate(["a cat", "a dog"], motion, scheduler="unipc")
    for eager, captured in zip(made[False], made[True], strict=True):
        assert np.abs(eager.astype(int) - captured.astype(int)).mean() < 1


def test_a_clip_with_little_memory(tmp_path):
    pipe = load_pipeline(random_model(tmp_path / "model"))
    pipe.prompt_encoder.cache = None
    clip = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    expected = pipe.generate("a cat", pipe.extract_motion(clip))[0]
    pipe.save_memory("cuda")
    made = pipe.generate("a cat", pipe.extract_motion(clip))[0]
    assert np.abs(expected.astype(int) - made.astype(int)).mean() < 2

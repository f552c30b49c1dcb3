"""A LoRA with which a model needs few steps: latent consistency distillation of the model itself.

Luo et al. 2023 (arXiv 2310.04378, algorithm 1; as a LoRA: arXiv 2311.05556). The student is the model with a LoRA in
every layer, reference pass and adapter too. At two neighbouring timesteps of a DDIM trajectory of 50 steps it is to
predict the same clip; the trajectory's step is made by the model without the LoRA, with classifier-free guidance, so
that the student needs none. Clips are pairs of references and targets, as the adapter's stage draws them.

    python -m recipes.render_latents --out build/lcm --minutes 0.7      # OUT/vae is the model's
    python -m recipes.distil --out build/lcm --model emt/demo --minutes 2.5
    python -m recipes.samplers --out build/lcm --model emt/demo --lora build/lcm/lcm-lora.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from emt.features import MotionFeatures
from emt.train.objective import Objective, stratified
from recipes.distributed import leave, rank, wait_for_ranks
from recipes.latents import Clips
from recipes.networks import REFERENCE_TIMESTEP
from recipes.opening import Frozen
from recipes.optimizer import GraphTrainer
from recipes.stage import Stage, kernel_attention, save_on_signals, stage_parser, train

STEPS = 50
"""Steps of the trajectory; `LCMScheduler.original_inference_steps`."""
SIGMA, TIMESTEP_SCALE = 0.5, 10.0
"""Of the boundary condition: `LCMScheduler`'s."""


class LoraNetwork(nn.Module):
    """A network with a LoRA in each linear and convolutional layer but the scalers'.

    Args:
        unet: frozen, in the dtype that it computes in.
        rank: of every layer.
        generator: for the first halves; the second ones begin at zero, so that the network begins as it is.
    """

    def __init__(self, unet: nn.Module, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.unet = unet
        self.layers = [
            name
            for name, module in unet.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and ".scaler." not in name
        ]
        down, up = [], []
        for name in self.layers:
            weight = unet.get_submodule(name).weight
            inputs = weight[0].numel()
            first = torch.randn(rank, inputs, generator=generator, device=generator.device) * inputs**-0.5
            down.append(nn.Parameter(first.to(weight.device)))
            up.append(nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device)))
        self.down, self.up = nn.ParameterList(down), nn.ParameterList(up)

    def keep(self, used: Sequence[bool]) -> None:
        """Drop the LoRA of layers that are not used."""
        chosen = [i for i, it_is in enumerate(used) if it_is]
        self.layers = [self.layers[i] for i in chosen]
        self.down, self.up = (nn.ParameterList([part[i] for i in chosen]) for part in (self.down, self.up))

    def merged(self) -> dict[str, Tensor]:
        """Weights of the network with the LoRA, by their names in this module; differentiable in the LoRA."""
        found = {}
        for name, down, up in zip(self.layers, self.down, self.up, strict=True):
            weight = self.unet.get_submodule(name).weight
            changed = weight.detach().float() + (up @ down).view(weight.shape)
            found[f"unet.{name}.weight"] = changed.to(weight.dtype)
        return found

    def forward(
        self,
        noisy: Tensor,
        timestep: Tensor,
        text: Tensor,
        reference: Tensor,
        reference_timestep: Tensor,
        empty: Tensor,
        motion: MotionFeatures | None = None,
    ) -> tuple[Tensor, MotionFeatures]:
        """The prediction for noisy clips, and the features of noisy references, which are read unless given."""
        if motion is None:
            motion = self.unet.encode_reference(reference, reference_timestep, empty)
        return self.unet(noisy, timestep, text, motion), motion

    def state(self) -> dict[str, Tensor]:
        """The LoRA as diffusers and PEFT name its tensors, in half precision; alpha is the rank."""
        found = {}
        for name, down, up in zip(self.layers, self.down, self.up, strict=True):
            weight = self.unet.get_submodule(name).weight
            around = weight.shape[1:] if weight.ndim == 4 else (down.shape[1],)
            found[f"unet.{name}.lora_A.weight"] = down.detach().view(-1, *around)
            found[f"unet.{name}.lora_B.weight"] = up.detach().view(*up.shape, *[1] * (weight.ndim - 2))
        return {name: tensor.half().cpu().contiguous() for name, tensor in found.items()}


def boundary(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the noisy clip and of the predicted one in what a consistency model returns: c_skip, c_out."""
    scaled = TIMESTEP_SCALE * timestep.float()
    return SIGMA**2 / (scaled**2 + SIGMA**2), scaled / (scaled**2 + SIGMA**2).sqrt()


def clip_and_noise(objective: Objective, prediction: Tensor, noisy: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """The clip and the noise that a prediction means, float32."""
    signal, sigma = (share[timestep].view(-1, 1, 1, 1, 1) for share in (objective.signal, objective.noise))
    prediction, noisy = prediction.float(), noisy.float()
    if objective.prediction_type == "v_prediction":
        return signal * noisy - sigma * prediction, sigma * noisy + signal * prediction
    return (noisy - sigma * prediction) / signal.clamp(min=1e-4), prediction


def consistent(objective: Objective, prediction: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
    """The clip of a consistency model from the network's prediction, float32."""
    skip, out = (share.view(-1, 1, 1, 1, 1) for share in boundary(timestep))
    clip, _ = clip_and_noise(objective, prediction, noisy, timestep)
    return skip * noisy.float() + out * clip


def consistency_loss(
    student: LoraNetwork,
    objective: Objective,
    guidance: float,
    *,
    latents: Tensor,
    noise: Tensor,
    timestep: Tensor,
    text: Tensor,
    empty: Tensor,
    reference: Tensor,
    reference_noise: Tensor,
    subject: Tensor,
) -> Tensor:
    """Distance between the student's clips at two neighbouring timesteps of the model's trajectory: a float32 scalar.

    Args:
        student: the network with its LoRA.
        objective: of the network.
        guidance: classifier-free guidance scale of the trajectory.
        latents: clips, (batch, channels, frames, height, width).
        noise: theirs.
        timestep: (batch,) the later ones of the neighbours, of the trajectory.
        text: encodings of captions, (batch, tokens, width).
        empty: that of the empty prompt, (1, tokens, width).
        reference: latents that move as the clips.
        reference_noise: theirs.
        subject: extra weight on parts of the clips.
    """
    unet, batch = student.unet, len(latents)
    away = empty.expand(batch, -1, -1)
    level = torch.full_like(timestep, REFERENCE_TIMESTEP)
    read = objective.add_noise(reference, reference_noise, REFERENCE_TIMESTEP)
    noisy = objective.add_noise(latents, noise, timestep)
    before = (timestep - 1000 // STEPS).clamp(min=0)
    with torch.no_grad():
        motion = unet.encode_reference(read, level, away)
        both = unet(torch.cat([noisy, noisy]), timestep.repeat(2), torch.cat([away, text]), motion)
        without, given = both.float().chunk(2)
        clip, left = clip_and_noise(objective, without + guidance * (given - without), noisy, timestep)
        signal, sigma = (share[before].view(-1, 1, 1, 1, 1) for share in (objective.signal, objective.noise))
        earlier = (signal * clip + sigma * left).to(latents.dtype)
    merged = student.merged()
    prediction, own = functional_call(student, merged, (noisy, timestep, text, read, level, away))
    with torch.no_grad():
        known = functional_call(student, merged, (earlier, before, text, read, level, away, own))[0]
        goal = consistent(objective, known, earlier, before)
    off = consistent(objective, prediction, noisy, timestep) - goal
    return ((1 + subject) * ((off.square() + 1e-6).sqrt() - 1e-3)).mean()


def main(arguments: Sequence[str] | None = None) -> None:
    """Distil a model into a LoRA; writes OUT/lcm-lora.safetensors."""
    parser = stage_parser(main.__doc__, minutes=2.5, batch=48)
    parser.add_argument("--model", type=Path, required=True, help="model folder to distil")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance that it takes over")
    options = parser.parse_args(arguments)
    stage = Stage("distil", options)

    clips = Clips.load(stage.out, stage.device)
    model = Frozen.open(stage, options.model)
    encoder, empty, objective = model.encoder, model.empty, model.objective
    student = LoraNetwork(model.unet, options.rank, stage.generator)

    def loss(tokens: Tensor, **batch: Tensor) -> Tensor:
        with torch.no_grad():
            text = encoder(tokens)[0]
        return consistency_loss(student, objective, options.guidance, text=text, empty=empty, **batch)

    def draw() -> dict[str, Tensor]:
        references, targets = clips.draw_pairs(options.batch, stage.generator, drop=0.0, realistic=0.35)
        batch = {"reference": references["latents"]} | {k: targets[k] for k in ("latents", "tokens", "subject")}
        batch = {k: v.to(stage.dtype) if v.is_floating_point() else v for k, v in batch.items()}
        for name in ("noise", "reference_noise"):
            batch[name] = torch.randn(batch["latents"].shape, generator=stage.generator, device=stage.device)
        which = (stratified(options.batch, stage.generator, stage.device) * STEPS).long().clamp(max=STEPS - 1)
        return batch | {"timestep": (which + 1) * (1000 // STEPS) - 1}

    with kernel_attention(stage):
        # What the last features of a reference do not depend on is trained by nothing.
        reached = torch.autograd.grad(loss(**draw()), [*student.up], allow_unused=True)
        student.keep([gradient is not None for gradient in reached])
        trained = [*student.down, *student.up]
        trainer = GraphTrainer(loss, [(trained, options.rate)], average=0.995, graph=stage.graph)
        train(stage, trainer, draw)
    if rank() == 0:
        metadata = {"format": "pt", "steps": str(trainer.step_count), "rank": str(options.rank)}
        save_file(student.state(), stage.out / "lcm-lora.safetensors", metadata)
    wait_for_ranks()


if __name__ == "__main__":
    save_on_signals()
    main()
    leave()

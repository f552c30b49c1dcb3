"""PyTorch as a backend, with CUDA graphs where there is a CUDA GPU.

A denoising step launches some 2,000 kernels, most of them shorter than a launch takes the host. A CUDA graph replays
all launches at once but reads fixed addresses. `TorchBackend` therefore owns static input buffers and copies what
changed into them before each replay.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from emt.backbone import PLAIN, Constants, Execution
from emt.backends.base import Networks, PipelineBackend
from emt.backends.cuda_graphs import Calls, CapturedCall, CudaGraphs, Recorder, StaticInput, out_of_memory, shapes_of
from emt.backends.low_memory import FEED_FORWARD_TOKENS, LayerByLayer, each_sample
from emt.backends.vae import VAE_FRAMES, VAE_PIXELS, convert_to_channels_last, prepare_vae
from emt.features import MotionFeatures, PreparedMotion, TextFeatures, layer_tensors, tensors_of
from emt_kernels.precompile import record_launches
from emt_kernels.selection import use_triton

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Fastest first: for 4,096 tokens of 40 channels a head cuDNN takes half the time of flash attention.
ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


class TorchBackend(PipelineBackend):
    """PyTorch itself. On a CUDA GPU the network's call is captured as a CUDA graph for each shape, and replayed.

    Results are those of the eager network: the same kernels run on the same numbers.

    Args:
        pipe: the pipeline whose network and VAE it runs.
        graphs: capture CUDA graphs on a CUDA GPU.
        fuse_projections: compute query, key and value of a self-attention in one matmul on a CUDA GPU; the weights
            stay where `state_dict` finds them.
        fuse_residual_adds: let matmuls add to the residual stream themselves on a CUDA GPU.
        defer_conv_biases: with that, leave biases of convolutions to the norms that read what they made.
        join_skips: with fused residual adds, leave skip connections where they are (`Execution.join_skips`).
        share_guidance: compute what the halves of guidance have in common once (`Execution.share_guidance`).
        keep_constants: keep what follows from weights alone, if `graphs` are captured (`Execution.constants`).
        channels_last: convert the network's weights to channels-last memory on a CUDA GPU.
        channels_last_vae: the VAE's too, with its group norms and SiLUs by `group_norm_silu`.
        attention: implementations of spatial attention on a CUDA GPU, the preferred one first.
        compile: let `torch.compile` make the network's kernels; the first call of a shape then takes minutes.
        low_memory: spare memory at the expense of time (`MotionTransferPipeline.save_memory`).
        max_calls: captured calls that are kept; the one that was not used for longest gives way.
        recorder: makes recorders, in place of `CudaGraphs` on a CUDA GPU and none elsewhere.

    Attributes:
        capture_at_once: capture the first step of a shape, for measurements of replays (`Calls`).
    """

    name = "torch"

    def __init__(
        self,
        pipe: Networks,
        *,
        graphs: bool = True,
        fuse_projections: bool = True,
        fuse_residual_adds: bool = True,
        defer_conv_biases: bool = True,
        join_skips: bool = True,
        share_guidance: bool = True,
        keep_constants: bool = True,
        channels_last: bool = True,
        channels_last_vae: bool = True,
        attention: Sequence[SDPBackend] = ATTENTION,
        compile: bool = False,
        low_memory: bool = False,
        max_calls: int = 8,
        recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        super().__init__(pipe)
        self.graphs = graphs and not low_memory
        self.low_memory = low_memory
        self.max_calls = max_calls
        self.fuse_projections = fuse_projections and not low_memory  # what moves between memories comes apart
        self.execution = Execution(
            fuse_residual_adds=fuse_residual_adds,
            defer_conv_biases=defer_conv_biases,
            feed_forward_tokens=FEED_FORWARD_TOKENS if low_memory else PLAIN.feed_forward_tokens,
            features_on_host=low_memory,
            join_skips=join_skips,
            share_guidance=share_guidance,
        )
        self.keep_constants = keep_constants and not compile
        self.channels_last = channels_last
        self.channels_last_vae = channels_last_vae
        self.attention = attention
        self.capture_at_once = False
        self._make_recorder = recorder
        self._recorder: Recorder | None = None
        self._compiled = torch.compile(pipe.unet, dynamic=False) if compile else None
        self._calls: OrderedDict[tuple[Any, ...], CapturedCall] = OrderedDict()
        self._motions: dict[tuple[Any, ...], StaticInput] = {}  # by the shapes of prepared motion
        self._prepared: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # those shapes, by the shapes of features
        self._references: dict[tuple[Any, ...], dict[str, int]] = {}  # features of each layer, by shapes that were met
        self._made: dict[tuple[Any, ...], Calls] = {}  # by shape, of calls that are not captured yet
        self._rehearsed: set[tuple[Any, ...]] = set()  # shapes whose kernels have been compiled ahead
        self._weights: list[Tensor] = []
        self._constants = Constants()
        self._refresh: tuple[int, Callable[[], None] | None] = 0, None  # what computes so many constants, once captured
        self._text: weakref.ref[TextFeatures] | None = None

    @property
    def reuses(self) -> bool:  # type: ignore[override]
        """Return whether the network has deep features that serve several steps."""
        return hasattr(self.unet, "denoise_deep")

    # ------------------------------------------------------------------------------------------------- the network

    def encode_reference(self, latents: Tensor, timestep: Tensor, text: Tensor) -> MotionFeatures:
        """Read the motion of references; where calls are captured, this one is when its shape comes again.

        Not so where it keeps the device busy: a captured one has a second copy of all features.
        """
        self._prepare_weights(latents.device)
        key = ("reference", latents.shape, latents.dtype, timestep.shape, timestep.dtype, text.shape)
        inputs = (latents, timestep, text)
        if not self._captures(latents.device):
            return self._read_reference(key, *inputs)
        self._refresh_constants(latents.device)
        call = self._calls.get(key)
        if call is None:
            made = self._calls_of(key, latents.device, of_reference=True)
            if not made.is_capture_due:
                return made.make(self._recorder_on(latents.device), lambda: self._read_reference(key, *inputs))
            try:
                call = self._calls[key] = self._capture(lambda: self._capture_reference(*inputs))
            except (torch.OutOfMemoryError, MemoryError):  # it has been made without before
                return self._read_reference(key, *inputs)
        else:
            self._calls.move_to_end(key)
        for static, tensor in zip(call.inputs, inputs, strict=True):
            static.copy_(tensor)
        call.replay()
        found = iter(call.kept)
        return MotionFeatures(
            {path: tuple(next(found).clone() for _ in range(count)) for path, count in self._references[key].items()}
        )

    def _read_reference(self, key: tuple[Any, ...], latents: Tensor, timestep: Tensor, text: Tensor) -> MotionFeatures:
        with self._execution_context(latents.device) as execution:
            features = self.unet.encode_reference(latents, timestep, text, execution=execution)
        self._references[key] = {path: len(layer) for path, layer in features.layers.items()}
        return features

    def _capture_reference(self, *inputs: Tensor) -> CapturedCall:
        own = [x.clone() for x in inputs]
        found: list[Tensor] = []

        def compute(execution: Execution) -> Tensor:
            features = self.unet.encode_reference(*own, execution=execution)
            found[:] = tensors_of(features)
            return found[-1]

        replay, output = self._compute_and_capture(inputs[0].device, compute)
        return CapturedCall(replay, own, output, kept=found)

    def prepare_motion(self, features: MotionFeatures) -> PreparedMotion:
        """Prepare the constants of references for all steps; good until motion of the same shape is prepared.

        Where calls are captured it is written to the static input of its shape, layer by layer, so that there is never
        a second one in memory (1 GiB for one reference of 16 frames at 512×512).
        """
        if self.low_memory:
            return PreparedMotion(LayerByLayer(self.unet, features))
        device = self.unet.device
        self._prepare_weights(device)
        features = features.to(device)
        if not self._captures(device):
            return self.unet.prepare(features)
        key = shapes_of(features)
        static = self._motions.get(self._prepared.get(key, ()))
        if static is None:
            prepared = self.unet.prepare(features)
            self._prepared[key] = shapes_of(prepared)
            self._motions[self._prepared[key]] = StaticInput(prepared, weakref.ref(prepared))
            return prepared
        prepared = PreparedMotion(dict(static.value.layers))
        static.source = weakref.ref(prepared)  # first: if the rest fails, nobody's motion is there
        for path, layer in prepared.layers.items():
            new = self.unet.prepare_layer(path, features.layers[path])
            torch._foreach_copy_(list(layer_tensors(layer)), list(layer_tensors(new)))
        return prepared

    def denoise(self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None) -> Tensor:
        """One call of the network; where calls are captured, the replay of the one of this shape.

        Raises:
            RuntimeError: `motion` has given way to another one (`prepare_motion`).
            ValueError: as the network does, for a wrong shape.
        """
        self._compile_for_step(sample, timestep, text, motion)

        def compute() -> Tensor:
            with self._execution_context(sample.device) as execution:
                if not self.low_memory:
                    return self._run(sample, timestep, text, motion, execution)
                each = each_sample(sample, text, motion)
                return torch.cat([self._run(x, timestep, own, moved, execution) for x, own, moved in each])

        found = self._call(compute, (sample, timestep), text, motion)
        return found.output.clone() if isinstance(found, CapturedCall) else found  # the next replay overwrites it

    def denoise_controlled(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: TextFeatures,
        motion: PreparedMotion | None,
        control: Sequence[Tensor],
    ) -> Tensor:
        """`Backend.denoise_controlled`; not captured."""
        self._compile_for_step(sample, timestep, text, motion)
        self._begin_clip(text, sample.device)
        frames = sample.shape[2]
        with self._execution_context(sample.device) as execution:
            if not self.low_memory:
                return self.unet(sample, timestep, text, motion, control=control, execution=execution)
            found = []
            for (x, own, moved), *residuals in zip(
                each_sample(sample, text, motion), *(residual.split(frames) for residual in control), strict=True
            ):
                found.append(self.unet(x, timestep, own, moved, control=residuals, execution=execution))
            return torch.cat(found)

    def denoise_deep(
        self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None
    ) -> tuple[Tensor, Tensor]:
        """`ReusingBackbone.denoise_deep`; the deep features are good until the next call of the same shape."""
        self._compile_for_step(sample, timestep, text, motion)

        def compute() -> tuple[Tensor, Tensor]:
            with self._execution_context(sample.device) as execution:
                if not self.low_memory:
                    return self.unet.denoise_deep(sample, timestep, text, motion, execution=execution)
                each = each_sample(sample, text, motion)
                parts = [self.unet.denoise_deep(x, timestep, *known, execution=execution) for x, *known in each]
                predictions, deep = zip(*parts)
                return torch.cat(predictions), torch.cat(deep)

        found = self._call(compute, (sample, timestep), text, motion, keep=True)
        return (found.output.clone(), found.kept[0]) if isinstance(found, CapturedCall) else found

    def denoise_shallow(
        self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None, deep: Tensor
    ) -> Tensor:
        """`ReusingBackbone.denoise_shallow`."""

        def compute() -> Tensor:
            with self._execution_context(sample.device) as execution:
                if not self.low_memory:
                    return self.unet.denoise_shallow(sample, timestep, text, motion, deep, execution=execution)
                each = zip(each_sample(sample, text, motion), deep.chunk(len(sample)), strict=True)
                return torch.cat(
                    [
                        self.unet.denoise_shallow(x, timestep, *known, part, execution=execution)
                        for (x, *known), part in each
                    ]
                )

        found = self._call(compute, (sample, timestep, deep), text, motion)
        return found.output.clone() if isinstance(found, CapturedCall) else found

    def _call(
        self,
        compute: Callable[[], T],
        inputs: tuple[Tensor, ...],
        text: TextFeatures,
        motion: PreparedMotion | None,
        *,
        keep: bool = False,
    ) -> CapturedCall | T:
        """The captured call of this shape, replayed; what `compute` returns where none is captured, or none yet.

        One that keeps deep features is another one.
        """
        sample = inputs[0]
        if not self._captures(sample.device):
            return compute()
        self._begin_clip(text, sample.device)
        shapes = shapes_of(text), motion and shapes_of(motion)
        key = (*((x.shape, x.dtype) for x in inputs), keep, text.guided, *shapes)
        call = self._calls.get(key)
        if call is not None:
            self._calls.move_to_end(key)
            for static, tensor in zip(call.inputs, inputs, strict=True):
                static.copy_(tensor)
            if call.text is not None:
                call.text.fill(text)
            if call.motion is not None and motion is not None:
                call.motion.fill(motion)
            call.replay()
            return call
        made = self._calls_of(key, sample.device)
        if not made.is_capture_due:
            if motion is not None and (here := self._motions.get(shapes_of(motion))):
                here.check(motion)
            return made.make(self._recorder_on(sample.device), compute)
        self._drop_motions(keep=motion)
        call = self._calls[key] = self._capture(lambda: self._capture_denoising(inputs, text, motion, keep))
        return call

    def _calls_of(self, key: tuple[Any, ...], device: torch.device, *, of_reference: bool = False) -> Calls:
        """The calls of a shape that have not been captured; one of a reference is never captured at once."""
        before = self._recorder_on(device).calls_before
        if of_reference:
            return self._made.setdefault(key, Calls(max(before, 1), often=None))
        return self._made.setdefault(key, Calls(0 if self.capture_at_once else before))

    def _recorder_on(self, device: torch.device) -> Recorder:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self._recorder = self._recorder or (self._make_recorder or CudaGraphs)()
        return self._recorder

    def reset(self) -> None:
        """Drop all captured calls and their static inputs."""
        self._calls.clear()
        self._made.clear()
        self._motions.clear()
        self._weights = []
        self._constants, self._refresh = Constants(), (0, None)
        self._recorder = self._text = None

    @contextlib.contextmanager
    def prepared(self) -> Iterator[Execution]:
        """Context manager: weights and attention as calls on the pipeline's device have them, for a compiler."""
        self._prepare_weights(self.pipe.device)
        with self._execution_context(self.pipe.device) as execution:
            self._vae(self.pipe.device)
            yield execution

    def _run(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: TextFeatures,
        motion: PreparedMotion | None,
        execution: Execution,
    ) -> Tensor:
        # A compiled module has no truth value: it takes `if` for a question about its length.
        network = self.unet if self._compiled is None else self._compiled
        return network(sample, timestep, text, motion, execution=execution)

    def _captures(self, device: torch.device) -> bool:
        return self.graphs and (device.type == "cuda" or self._make_recorder is not None)

    def _capture(self, capture: Callable[[], CapturedCall]) -> CapturedCall:
        """Capture a call, giving up as many others as that needs."""
        with self.phase("capturing graphs"):
            return self._capture_beside(capture)

    def _capture_beside(self, capture: Callable[[], CapturedCall]) -> CapturedCall:
        while len(self._calls) >= self.max_calls:
            self._calls.popitem(last=False)
        if not self._calls:
            self._recorder = None  # a memory pool that no graph is left of cannot be shared any more
        try:
            return capture()
        except Exception as error:
            problem = out_of_memory(error)
            if problem is None:
                raise
        problem.__traceback__ = problem.__context__ = None  # they hold what is to be freed
        others = len(self._calls)
        # Nothing may be left of it: what comes next is a smaller batch.
        weights = self._weights
        self.reset()
        self._weights = weights
        torch.cuda.empty_cache()
        if not others:
            raise problem
        return capture()

    def _capture_denoising(
        self, inputs: tuple[Tensor, ...], text: TextFeatures, motion: PreparedMotion | None, keep: bool
    ) -> CapturedCall:
        own = [x.clone() for x in inputs]
        layers = {path: (key.clone(), value.clone()) for path, (key, value) in text.layers.items()}
        own_text = TextFeatures(layers, text.guided)
        static = self._static_motion(motion) if motion is not None else None
        deep: list[Tensor] = []

        def compute(execution: Execution) -> Tensor:
            sample, timestep, *taken = own
            arguments = (sample, timestep, own_text, static.value if static else None)
            if taken:
                return self.unet.denoise_shallow(*arguments, taken[0], execution=execution)
            if not keep:
                return self._run(*arguments, execution)
            prediction, found = self.unet.denoise_deep(*arguments, execution=execution)
            if not deep:  # the first time, which is not captured
                deep.append(torch.empty_like(found))
            deep[0].copy_(found)
            return prediction

        replay, output = self._compute_and_capture(own[0].device, compute)
        return CapturedCall(replay, own, output, StaticInput(own_text, weakref.ref(text)), static, deep)

    def _compute_and_capture(
        self, device: torch.device, compute: Callable[[Execution], Tensor]
    ) -> tuple[Callable[[], None], Tensor]:
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with here, self._execution_context(device) as execution:
            return self._recorder_on(device).record(lambda: compute(execution))

    def _begin_clip(self, text: TextFeatures, device: torch.device) -> None:
        """Find out whether anybody has moved or written weights, if the prompts are others than before."""
        if self._text is None or self._text() is not text:
            self._prepare_weights(device)
            self._refresh_constants(device)
            self._text = weakref.ref(text)

    def _refresh_constants(self, device: torch.device) -> None:
        """Compute anew what is kept of weights, which may have been written in place; captured from the second on."""
        count = len(self._constants)
        if not count:
            return
        known, replay = self._refresh
        if known == count and replay is None:
            replay, _ = self._compute_and_capture(device, lambda execution: self._constants.refresh())
        elif known != count:
            replay = None
        (replay or self._constants.refresh)()
        self._refresh = count, replay

    def _static_motion(self, motion: PreparedMotion) -> StaticInput:
        """The static input for motion of this shape, with this one in it."""
        key = shapes_of(motion)
        static = self._motions.get(key)
        if static is None:
            static = self._motions[key] = StaticInput(motion, weakref.ref(motion))
        static.fill(motion)
        return static

    def _drop_motions(self, keep: PreparedMotion | None) -> None:
        """Forget static inputs of motion that no captured call reads any more."""
        used = {id(call.motion) for call in self._calls.values() if call.motion}
        kept = shapes_of(keep) if keep is not None else None
        self._motions = {key: static for key, static in self._motions.items() if id(static) in used or key == kept}

    def _prepare_weights(self, device: torch.device) -> None:
        """Bring the weights into the layout that the GPU reads; drop calls captured with weights moved since."""
        if device.type == "cuda" and self.channels_last:
            convert_to_channels_last(self.unet)
        if device.type == "cuda" and self.fuse_projections:
            self.unet.fuse_projections()
        if not self._captures(device):
            return
        weights = [parameter.data for parameter in self.unet.parameters()]
        if [w.data_ptr() for w in weights] != [w.data_ptr() for w in self._weights]:
            self.reset()
            self._weights = weights  # kept, so that a weight that is moved cannot be given the same address again

    @contextlib.contextmanager
    def _execution_context(self, device: torch.device) -> Iterator[Execution]:
        """Context manager: how the network runs on `device`, with its spatial attention chosen meanwhile."""
        if device.type == "cuda":
            with sdpa_kernel(list(self.attention), set_priority=True):
                keeps = self.keep_constants and self._captures(device)
                yield replace(self.execution, constants=self._constants) if keeps else self.execution
        else:
            yield Execution(features_on_host=self.low_memory)

    # ------------------------------------------------------------------------------------------- compiling ahead

    def _compile_ahead(self, x: Tensor, key: tuple[Any, ...], rehearse: Callable[[], object]) -> None:
        """Before the first call of a shape, compile the kernels that `rehearse` launches, all at the same time."""
        if key in self._rehearsed or self.low_memory or not use_triton(x):
            return
        self._rehearsed.add(key)
        begun = time.perf_counter()
        with self.phase("compiling kernels"):
            try:
                with torch.no_grad(), record_launches() as launches:
                    rehearse()
            except torch.OutOfMemoryError:
                return  # if the call itself has no room either, it says so
            rehearsed = time.perf_counter()
            launches.compile(x.device)
        seconds = rehearsed - begun, time.perf_counter() - rehearsed
        logger.info(
            "%s: rehearsed in %.2f s, %d kernels compiled in %.2f s", key[0], seconds[0], len(launches), seconds[1]
        )

    def _compile_for_step(
        self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None
    ) -> None:
        def rehearse() -> None:
            self._prepare_weights(sample.device)
            with self._execution_context(sample.device) as execution:
                self.unet(sample, timestep, text, motion, execution=execution)

        if self._compiled is None:
            self._compile_ahead(sample, _step_key(sample.shape, motion is not None), rehearse)

    def _rehearse_clip(self, images: Tensor) -> None:
        """All parts of a transfer from these frames to one clip with classifier-free guidance, of arbitrary numbers."""
        mean, _ = self._encode_images(images[: self._frames_at_once(images, pixels=1)])
        frames, unet = len(images), self.unet
        latents = mean.new_zeros((frames, *mean.shape[1:]))
        some = latents[: self._frames_at_once(latents, pixels=self.pipe.vae_scale_factor**2)]
        self._decode_images(some)
        self._rehearsed.add(("decode", latents.shape))
        packed = unet.latent_channels != mean.shape[1]
        if self._compiled is not None or packed or not unet.facts.takes_frames(frames):
            return
        self._prepare_weights(images.device)
        sample = latents.transpose(0, 1).unsqueeze(0).to(unet.dtype)
        timestep = torch.ones(1, dtype=torch.long, device=sample.device)
        text = sample.new_zeros((2, self.pipe.tokenizer.model_max_length, unet.text_width))
        with self._execution_context(sample.device) as execution:
            motion = unet.prepare(unet.encode_reference(sample, timestep, text[:1], execution=execution))
            twice = torch.cat([sample, sample])
            features = unet.encode_text(text)
            features.guided = True
            unet(twice, timestep[0], features, motion, execution=execution)
        self._rehearsed.add(_step_key(sample.shape, True))

    def prepare_shape(self, frames: int, height: int, width: int) -> None:
        """Compile the kernels of clips of a shape, or load those compiled before."""
        device = self.pipe.device
        if use_triton(torch.empty(0, device=device)):
            images = torch.zeros(frames, 3, height, width, device=device, dtype=self.pipe.vae.dtype)
            with torch.no_grad():
                self._compile_ahead(images, ("clip", images.shape), lambda: self._rehearse_clip(images))

    # ----------------------------------------------------------------------------------------------------- the VAE

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents (n, channels, h/8, w/8) of images (n, 3, h, w) from -1 to 1."""
        self._compile_ahead(images, ("clip", images.shape), lambda: self._rehearse_clip(images))
        return self._encode_images(images)

    def _encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        vae = self._vae(images.device)
        chunks = images.split(self._frames_at_once(images, pixels=1))
        posteriors = [vae.encode(chunk).latent_dist for chunk in chunks]
        return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])

    def decode_images(self, latents: Tensor) -> Tensor:
        """Images (n, 3, h, w) from about -1 to 1 of latents (n, channels, h/8, w/8), not scaled."""
        some = latents[: self._frames_at_once(latents, pixels=self.pipe.vae_scale_factor**2)]
        self._compile_ahead(latents, ("decode", latents.shape), lambda: self._decode_images(some))
        return self._decode_images(latents)

    def _decode_images(self, latents: Tensor) -> Tensor:
        vae = self._vae(latents.device)
        chunks = latents.split(self._frames_at_once(latents, pixels=self.pipe.vae_scale_factor**2))
        return torch.cat([vae.decode(chunk).sample for chunk in chunks])

    def _vae(self, device: torch.device) -> Any:
        vae = self.pipe.vae
        if device.type == "cuda" and self.channels_last_vae:
            prepare_vae(vae)
        return vae

    def _frames_at_once(self, x: Tensor, pixels: int) -> int:
        if self.low_memory:
            return 1
        return max(1, VAE_PIXELS // (pixels * x.shape[2] * x.shape[3])) if x.is_cuda else VAE_FRAMES


def _step_key(sample: torch.Size, motion: bool) -> tuple[Any, ...]:
    """Key under which compiled kernels are remembered; the batch size is left out: kernels do not depend on it."""
    return "step", sample[1:], motion

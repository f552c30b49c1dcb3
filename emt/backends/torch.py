"""What executes the network and the VAE for the pipeline: PyTorch, with CUDA graphs where there is a CUDA GPU.

A denoising step launches some 2,000 kernels, most of them shorter than the time that the host needs to ask for one.
A CUDA graph asks for all of them at once. It reads its inputs where they lay when it was recorded, so `TorchBackend`
keeps a place for each of them and copies into it what has changed since the last step.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emt.backbones.sd15.motion_module import (
    MotionFeatures,
    PreparedMotion,
    PreparedReference,
    feed_forward_in_parts,
    residuals_in_products,
)
from emt.backbones.sd15.unet import MotionTransferUNet, TextFeatures
from emt.errors import EmtError
from emt_kernels.group_norm_silu import group_norm_silu
from emt_kernels.precompile import record_launches
from emt_kernels.selection import use_triton

if TYPE_CHECKING:
    from emt.pipeline import MotionTransferPipeline

logger = logging.getLogger(__name__)

#: Fastest first: for 4,096 tokens of 40 channels a head cuDNN takes half the time of flash attention.
ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)

#: Pixels that the VAE takes at once on a GPU: two frames of 512×512 fill it, and take one GiB of activations.
_VAE_PIXELS = 2 * 512 * 512
#: Frames that it takes at once elsewhere.
_VAE_FRAMES = 4
#: Tokens that a feed-forward layer takes at once where memory is short: 30 MB in place of 250 at 512×512.
_LOW_MEMORY_TOKENS = 4096


class Backend(Protocol):
    """What executes the network for a pipeline (`MotionTransferPipeline.backend`)."""

    name: str
    #: Whether it has `denoise_deep` and `denoise_shallow`.
    reuses: bool = False

    @property
    def unet(self) -> MotionTransferUNet:
        """The network, whose weights prepare text and motion in every case."""
        ...

    def encode_reference(self, latents: Tensor, timestep: Tensor, text: Tensor) -> MotionFeatures:
        """`MotionTransferUNet.encode_reference`."""
        ...

    def prepare_motion(self, features: MotionFeatures) -> PreparedMotion:
        """What every step needs of references; good until motion of the same shape is prepared.

        Classes that derive from this one inherit it.
        """
        return features.prepare(self.unet)

    def denoise(self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None) -> Tensor:
        """One call of the network, `MotionTransferUNet.forward`, on a guided batch."""
        ...

    def denoise_deep(
        self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None
    ) -> tuple[Tensor, Tensor]:
        """`MotionTransferUNet.denoise_deep`; the deep features are good until the next call of the same shape."""
        raise NotImplementedError(f"the backend {self.name} does not give deep features")

    def denoise_shallow(
        self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None, deep: Tensor
    ) -> Tensor:
        """`MotionTransferUNet.denoise_shallow`."""
        raise NotImplementedError(f"the backend {self.name} does not take deep features")

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of latents (n, channels, h/8, w/8) of images (n, 3, h, w) from -1 to 1."""
        ...

    def decode_images(self, latents: Tensor) -> Tensor:
        """Images (n, 3, h, w) from about -1 to 1 of latents (n, channels, h/8, w/8), not scaled."""
        ...


class PipelineBackend(Backend):
    """A backend of one pipeline, which it does not keep alive: the pipeline has the backend."""

    def __init__(self, pipe: MotionTransferPipeline) -> None:
        self._pipe = weakref.ref(pipe)

    @property
    def pipe(self) -> MotionTransferPipeline:
        """The pipeline whose parts it runs."""
        pipe = self._pipe()
        assert pipe is not None, "the pipeline of this backend is gone"
        return pipe

    @property
    def unet(self) -> MotionTransferUNet:
        """The pipeline's network, which prepares text and motion."""
        return self.pipe.unet


class Recorder(Protocol):
    """Records a computation once, so that it can be done again at less cost; its graphs share one memory pool."""

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What does the computation again, on the tensors that it read, and the tensor that receives its result."""
        ...


class CudaGraphs:
    """Records CUDA graphs on the current device."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Replay and result of a computation that waits for nothing on the host.

        Raises:
            EmtError: if the first replay gives another result than the computation itself.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # libraries choose their kernels now, and Triton compiles its own
            expected = compute()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads go on using the GPU meanwhile: they save references.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = compute()
        finally:
            torch.cuda.set_stream(current)  # which it does not come back to by itself if ending the capture fails
        graph.replay()
        change = torch.linalg.vector_norm(output.float() - expected.float())
        allowed = 1e-2 * torch.linalg.vector_norm(expected.float())
        if bool(change > allowed):  # not so if there are NaN, which are reported of the clip
            raise EmtError(
                f"a recorded call of the network does not repeat its result: off by {change:.3g} of {allowed:.3g}",
                "Use --memory low, which records nothing, and report this with the output of: emt doctor",
            )
        return graph.replay, output


@dataclass
class _Place:
    """Where recorded calls read text or motion, and whose content is there."""

    value: Any
    source: weakref.ref[Any]

    def fill(self, value: TextFeatures | PreparedMotion) -> None:
        """Have the content of `value` here.

        Raises:
            RuntimeError: `value` lies in this very place, and another one has been written over it.
        """
        if self.source() is value:
            return
        here, there = list(_tensors(self.value)), list(_tensors(value))
        if any(a is b for a, b in zip(here, there)):
            raise RuntimeError("this prepared motion has given way to another one of its shape: prepare it again")
        torch._foreach_copy_(here, there)
        self.source = weakref.ref(value)


@dataclass
class _Call:
    """A recorded call of the network."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    output: Tensor
    text: _Place | None = None
    motion: _Place | None = None
    deep: list[Tensor] = field(default_factory=list)  # where it puts deep features, if it gives them


class TorchBackend(PipelineBackend):
    """PyTorch itself. On a CUDA GPU the network's call is recorded as a CUDA graph for each shape, and replayed.

    Results are those of the eager network: the same kernels run on the same numbers.

    Args:
        pipe: the pipeline whose network and VAE it runs.
        graphs: record CUDA graphs on a CUDA GPU.
        fuse: have query, key and value of a self-attention from one product on a CUDA GPU; the weights stay where
            `state_dict` finds them.
        sums_in_products: have products add to the residual stream themselves on a CUDA GPU.
        biases_in_norms: with them, leave biases of convolutions to the norms that read what they made.
        channels_last: lay the network's weights out as the GPU reads them.
        channels_last_vae: the VAE's too, with its group norms and SiLUs by `group_norm_silu`.
        attention: implementations of spatial attention on a CUDA GPU, the preferred one first.
        compile: let `torch.compile` make the network's kernels; the first call of a shape then takes minutes.
        low_memory: spare memory at the expense of time (`MotionTransferPipeline.save_memory`).
        max_calls: recorded calls that are kept; the one that was not used for longest gives way.
        recorder: what makes recorders, in place of `CudaGraphs` on a CUDA GPU and none elsewhere.
    """

    name = "torch"
    reuses = True

    def __init__(
        self,
        pipe: MotionTransferPipeline,
        *,
        graphs: bool = True,
        fuse: bool = True,
        sums_in_products: bool = True,
        biases_in_norms: bool = True,
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
        self.fuse = fuse and not low_memory  # what moves between memories comes apart
        self.sums_in_products = sums_in_products and not low_memory
        self.biases_in_norms = biases_in_norms
        self.channels_last = channels_last
        self.channels_last_vae = channels_last_vae
        self.attention = attention
        self._make_recorder = recorder
        self._recorder: Recorder | None = None
        self._compiled = torch.compile(pipe.unet, dynamic=False) if compile else None
        self._calls: OrderedDict[tuple[Any, ...], _Call] = OrderedDict()
        self._motions: dict[tuple[Any, ...], _Place] = {}
        self._references: dict[tuple[Any, ...], dict[str, torch.Size]] = {}  # shapes that were met
        self._rehearsed: set[tuple[Any, ...]] = set()  # shapes whose kernels have been compiled ahead
        self._weights: list[Tensor] = []
        self._text: weakref.ref[TextFeatures] | None = None

    # ------------------------------------------------------------------------------------------------- the network

    def encode_reference(self, latents: Tensor, timestep: Tensor, text: Tensor) -> MotionFeatures:
        """Read the motion of references; where calls are recorded, this one is when its shape comes again."""
        self._prepare_weights(latents.device)
        key = ("reference", latents.shape, latents.dtype, timestep.shape, timestep.dtype, text.shape)
        inputs = (latents, timestep, text)
        if not self._records(latents.device) or key not in self._references:
            return self._read_reference(key, *inputs)
        call = self._calls.get(key)
        if call is None:
            try:
                call = self._calls[key] = self._record(lambda: self._record_reference(*inputs))
            except (torch.OutOfMemoryError, MemoryError):  # it has been made without before
                return self._read_reference(key, *inputs)
        else:
            self._calls.move_to_end(key)
        for place, tensor in zip(call.inputs, inputs, strict=True):
            place.copy_(tensor)
        call.replay()
        shapes = self._references[key]
        parts = call.output.clone().split([shape.numel() for shape in shapes.values() for _ in range(2)])
        layers = zip(shapes.items(), parts[::2], parts[1::2])
        return MotionFeatures({path: (a.view(shape), b.view(shape)) for (path, shape), a, b in layers})

    def _read_reference(self, key: tuple[Any, ...], latents: Tensor, timestep: Tensor, text: Tensor) -> MotionFeatures:
        away = _features_leave(self.unet) if self.low_memory else contextlib.nullcontext()
        with self._way_to_run(latents.device), away:
            features = self.unet.encode_reference(latents, timestep, text)
        self._references[key] = {path: a.shape for path, (a, _) in features.layers.items()}
        return features

    def _record_reference(self, *inputs: Tensor) -> _Call:
        own = [x.clone() for x in inputs]
        replay, output = self._compute_and_record(
            inputs[0].device,
            lambda: torch.cat([x.flatten() for x in _tensors(self.unet.encode_reference(*own))]),
        )
        return _Call(replay, own, output)

    def prepare_motion(self, features: MotionFeatures) -> PreparedMotion:
        """What every step needs of references; good until motion of the same shape is prepared.

        Where calls are recorded it is written to where those of its shape read it, layer by layer, so that there is
        never a second one in memory (1 GiB for one reference of 16 frames at 512×512).
        """
        if self.low_memory:
            return PreparedMotion(_LayerByLayer(self.unet, features))
        device = self.unet.device
        self._prepare_weights(device)
        if not self._records(device):
            return features.prepare(self.unet)
        place = self._motions.get(_motion_shape(features))
        if place is None:
            prepared = features.prepare(self.unet)
            self._motions[_motion_shape(features)] = _Place(prepared, weakref.ref(prepared))
            return prepared
        prepared = PreparedMotion(dict(place.value.layers))
        place.source = weakref.ref(prepared)  # first: if the rest fails, what is there is nobody's
        for path, module in self.unet.fusion_modules().items():
            layer = PreparedMotion({path: module.prepare(features.layers[path])})
            here = PreparedMotion({path: prepared.layers[path]})
            torch._foreach_copy_(list(_tensors(here)), list(_tensors(layer)))
        return prepared

    def denoise(self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None) -> Tensor:
        """One call of the network; where calls are recorded, the replay of the one of this shape.

        Raises:
            RuntimeError: `motion` has given way to another one (`prepare_motion`).
            ValueError: as the network does, for a wrong shape.
        """
        self._compile_for_step(sample, timestep, text, motion)
        if not self._records(sample.device):
            with self._way_to_run(sample.device):
                if not self.low_memory:
                    return self._run(sample, timestep, text, motion)
                return torch.cat([self._run(x, timestep, *known) for x, *known in _each(sample, text, motion)])
        call = self._replay(sample, timestep, text, motion)
        return call.output.clone()  # the next replay overwrites it

    def denoise_deep(
        self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None
    ) -> tuple[Tensor, Tensor]:
        """`MotionTransferUNet.denoise_deep`; the deep features are good until the next call of the same shape."""
        self._compile_for_step(sample, timestep, text, motion)
        if not self._records(sample.device):
            with self._way_to_run(sample.device):
                if not self.low_memory:
                    return self.unet.denoise_deep(sample, timestep, text, motion)
                found = [self.unet.denoise_deep(x, timestep, *known) for x, *known in _each(sample, text, motion)]
                predictions, deep = zip(*found)
                return torch.cat(predictions), torch.cat(deep)
        call = self._replay(sample, timestep, text, motion, keep=True)
        return call.output.clone(), call.deep[0]

    def denoise_shallow(
        self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None, deep: Tensor
    ) -> Tensor:
        """`MotionTransferUNet.denoise_shallow`."""
        if not self._records(sample.device):
            with self._way_to_run(sample.device):
                if not self.low_memory:
                    return self.unet.denoise_shallow(sample, timestep, text, motion, deep)
                each = zip(_each(sample, text, motion), deep.split(sample.shape[2]), strict=True)
                return torch.cat([self.unet.denoise_shallow(x, timestep, *known, part) for (x, *known), part in each])
        return self._replay(sample, timestep, text, motion, deep=deep).output.clone()

    def _replay(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: TextFeatures,
        motion: PreparedMotion | None,
        *,
        keep: bool = False,
        deep: Tensor | None = None,
    ) -> _Call:
        """The recorded call of this shape, done; one that keeps deep features, or takes them, is another one."""
        inputs = (sample, timestep) if deep is None else (sample, timestep, deep)
        if self._text is None or self._text() is not text:  # a new clip: has anybody moved the weights?
            self._prepare_weights(sample.device)
            self._text = weakref.ref(text)
        shapes = [tuple(_tensors(text))[i].shape for i in (0, -1)]
        key = (*((x.shape, x.dtype) for x in inputs), keep, *shapes, motion and _motion_shape(motion))
        call = self._calls.get(key)
        if call is None:
            self._drop_motions(keep=motion)
            call = self._record(lambda: self._record_denoising(inputs, text, motion, keep))
            self._calls[key] = call
        else:
            self._calls.move_to_end(key)
            for place, tensor in zip(call.inputs, inputs, strict=True):
                place.copy_(tensor)
            if call.text is not None:
                call.text.fill(text)
            if call.motion is not None and motion is not None:
                call.motion.fill(motion)
        call.replay()
        return call

    def reset(self) -> None:
        """Drop all recorded calls and what they read."""
        self._calls.clear()
        self._motions.clear()
        self._weights = []
        self._recorder = self._text = None

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Weights laid out and attention chosen as calls on the pipeline's device have them, for who compiles those."""
        self._prepare_weights(self.pipe.device)
        with self._way_to_run(self.pipe.device):
            self._vae(self.pipe.device)
            yield

    def _run(self, sample: Tensor, timestep: Tensor, text: TextFeatures, motion: PreparedMotion | None) -> Tensor:
        # A compiled module has no truth value: asked for one, it wants a length.
        network = self.unet if self._compiled is None else self._compiled
        return network(sample, timestep, text, motion)

    def _records(self, device: torch.device) -> bool:
        return self.graphs and (device.type == "cuda" or self._make_recorder is not None)

    def _record(self, record: Callable[[], _Call]) -> _Call:
        """Record a call, with as many others given up as that needs."""
        while len(self._calls) >= self.max_calls:
            self._calls.popitem(last=False)
        if not self._calls:
            self._recorder = None  # a memory pool that no graph is left of cannot be shared any more
        try:
            return record()
        except Exception as error:
            problem = _out_of_memory(error)
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
        return record()

    def _record_denoising(
        self, inputs: tuple[Tensor, ...], text: TextFeatures, motion: PreparedMotion | None, keep: bool
    ) -> _Call:
        own = [x.clone() for x in inputs]
        own_text = TextFeatures({path: (key.clone(), value.clone()) for path, (key, value) in text.layers.items()})
        moved = self._motion_place(motion) if motion is not None else None
        deep: list[Tensor] = []

        def compute() -> Tensor:
            sample, timestep, *taken = own
            arguments = (sample, timestep, own_text, moved.value if moved else None)
            if taken:
                return self.unet.denoise_shallow(*arguments, taken[0])
            if not keep:
                return self._run(*arguments)
            prediction, found = self.unet.denoise_deep(*arguments)
            if not deep:  # the first time, which is not recorded
                deep.append(torch.empty_like(found))
            deep[0].copy_(found)
            return prediction

        replay, output = self._compute_and_record(own[0].device, compute)
        return _Call(replay, own, output, _Place(own_text, weakref.ref(text)), moved, deep)

    def _compute_and_record(
        self, device: torch.device, compute: Callable[[], Tensor]
    ) -> tuple[Callable[[], None], Tensor]:
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with here, self._way_to_run(device):
            self._recorder = self._recorder or (self._make_recorder or CudaGraphs)()
            return self._recorder.record(compute)

    def _motion_place(self, motion: PreparedMotion) -> _Place:
        """Where recorded calls read motion of this shape, with this one in it."""
        place = self._motions.get(_motion_shape(motion))
        if place is None:
            place = self._motions[_motion_shape(motion)] = _Place(motion, weakref.ref(motion))
        place.fill(motion)
        return place

    def _drop_motions(self, keep: PreparedMotion | None) -> None:
        """Forget places of motion that no recorded call reads any more."""
        used = {id(call.motion) for call in self._calls.values() if call.motion}
        kept = _motion_shape(keep) if keep is not None else None
        self._motions = {shape: place for shape, place in self._motions.items() if id(place) in used or shape == kept}

    def _prepare_weights(self, device: torch.device) -> None:
        """Lay the weights out as the GPU reads them; drop calls that were recorded with weights moved since."""
        if device.type == "cuda" and self.channels_last:
            _lay_channels_last(self.unet, self.unet.conv_in)
        if device.type == "cuda" and self.fuse:
            self.unet.fuse_projections()
        if not self._records(device):
            return
        weights = [parameter.data for parameter in self.unet.parameters()]
        if [w.data_ptr() for w in weights] != [w.data_ptr() for w in self._weights]:
            self.reset()
            self._weights = weights  # kept, so that a weight that is moved cannot be given the same address again

    @contextlib.contextmanager
    def _way_to_run(self, device: torch.device) -> Iterator[None]:
        """How the network is run on `device`: its spatial attention, its residual sums, and how much of it at once."""
        with contextlib.ExitStack() as ways:
            if self.low_memory:
                ways.enter_context(feed_forward_in_parts(_LOW_MEMORY_TOKENS))
            if device.type == "cuda":
                ways.enter_context(sdpa_kernel(list(self.attention), set_priority=True))
                if self.sums_in_products:
                    ways.enter_context(residuals_in_products(self.biases_in_norms))
            yield

    # ------------------------------------------------------------------------------------------- compiling ahead

    def _compile_ahead(self, x: Tensor, key: tuple[Any, ...], rehearse: Callable[[], object]) -> None:
        """Before the first call of a shape, compile the kernels that `rehearse` launches, all at the same time."""
        if key in self._rehearsed or self.low_memory or not use_triton(x):
            return
        self._rehearsed.add(key)
        begun = time.perf_counter()
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
            with self._way_to_run(sample.device):
                self.unet(sample, timestep, text, motion)

        if self._compiled is None:
            self._compile_ahead(sample, _step_key(sample.shape, motion is not None), rehearse)

    def _rehearse_clip(self, images: Tensor) -> None:
        """All parts of a transfer from these frames to one guided clip, of numbers that mean nothing."""
        mean, _ = self._encode_images(images[: self._frames_at_once(images, pixels=1)])
        frames, unet = len(images), self.unet
        latents = mean.new_zeros((frames, *mean.shape[1:]))
        some = latents[: self._frames_at_once(latents, pixels=self.pipe.vae_scale_factor**2)]
        self._decode_images(some)
        self._rehearsed.add(("decode", latents.shape))
        if self._compiled is not None or frames > unet.config.motion_max_frames:
            return
        self._prepare_weights(images.device)
        sample = latents.transpose(0, 1).unsqueeze(0).to(unet.dtype)
        timestep = torch.ones(1, dtype=torch.long, device=sample.device)
        text = sample.new_zeros((2, self.pipe.tokenizer.model_max_length, unet.config.cross_attention_dim))
        with self._way_to_run(sample.device):
            motion = unet.encode_reference(sample, timestep, text[:1]).prepare(unet)
            unet(torch.cat([sample, sample]), timestep[0], unet.encode_text(text), motion)
        self._rehearsed.add(_step_key(sample.shape, True))

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
        return max(1, _VAE_PIXELS // (pixels * x.shape[2] * x.shape[3])) if x.is_cuda else _VAE_FRAMES


def _step_key(sample: torch.Size, motion: bool) -> tuple[Any, ...]:
    """What tells calls of the network whose kernels have been compiled: kernels of one batch serve another."""
    return "step", sample[1:], motion


class _LayerByLayer(Mapping[str, tuple[PreparedReference, PreparedReference]]):
    """Prepares what a layer needs of references when it is asked for, and keeps nothing."""

    def __init__(self, unet: MotionTransferUNet, features: MotionFeatures) -> None:
        self.features = features
        self._modules = unet.fusion_modules()
        self._unet = unet

    def __getitem__(self, path: str) -> tuple[PreparedReference, PreparedReference]:
        module = self._modules[path]
        device = next(module.parameters()).device
        first, second = self.features.layers[path]
        return module.prepare((first.to(device), second.to(device)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def part(self, i: int) -> _LayerByLayer:
        """The same for the reference of sample i of a batch."""
        layers = {}
        for path, (first, second) in self.features.layers.items():
            j = i % len(first)
            layers[path] = first[j : j + 1], second[j : j + 1]
        return _LayerByLayer(self._unet, MotionFeatures(layers))


@contextlib.contextmanager
def _features_leave(unet: MotionTransferUNet) -> Iterator[None]:
    """Within, the features of references go to the computer's memory as they are read: 450 MB at 16×512×512."""

    def move(_: nn.Module, __: Any, output: tuple[Any, Any]) -> tuple[Any, Any]:
        x, read = output
        return x, tuple(feature.cpu() for feature in read)

    hooks = [module.register_forward_hook(move) for module in unet.fusion_modules().values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _each(sample: Tensor, text: TextFeatures, motion: PreparedMotion | None) -> Iterator[tuple[Any, ...]]:
    """Each sample of a batch with its own text and motion."""
    for i, part in enumerate(sample.split(1)):
        own = TextFeatures({path: (key[i : i + 1], value[i : i + 1]) for path, (key, value) in text.layers.items()})
        if motion is None:
            yield part, own, None
            continue
        assert isinstance(motion.layers, _LayerByLayer), "this motion was prepared by another backend"
        yield part, own, PreparedMotion(motion.layers.part(i))


class _GroupNormSiLU(nn.GroupNorm):
    """A group norm, and the SiLU after it, of images in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=True)


def prepare_vae(vae: Any) -> None:
    """Lay the weights of a diffusers VAE out channels-last, and let its group norms compute the SiLUs after them.

    Its state dict stays as it is.
    """
    _lay_channels_last(vae, vae.encoder.conv_in)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D) and isinstance(module.nonlinearity, nn.SiLU):
            pairs = [("norm1", "nonlinearity"), ("norm2", "nonlinearity")]
        elif isinstance(getattr(module, "conv_act", None), nn.SiLU):
            pairs = [("conv_norm_out", "conv_act")]
        else:
            continue
        for norm, activation in pairs:
            plain = getattr(module, norm)
            fused = _GroupNormSiLU(plain.num_groups, plain.num_channels, plain.eps, device="meta")
            fused.weight, fused.bias = plain.weight, plain.bias
            setattr(module, norm, fused)
            setattr(module, activation, nn.Identity())


def _lay_channels_last(module: nn.Module, first: Any) -> None:
    """Lay the weights of all convolutions out channels-last, if `first`, one of them, is not."""
    if not first.weight.is_contiguous(memory_format=torch.channels_last):
        for parameter in module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _tensors(value: TextFeatures | PreparedMotion | MotionFeatures | None) -> Iterator[Tensor]:
    """All tensors of features, in a fixed order."""
    for pair in value.layers.values() if value is not None else ():
        for part in pair:
            if isinstance(part, Tensor):
                yield part
            else:
                yield from (getattr(part, f.name) for f in fields(part))


def _motion_shape(motion: MotionFeatures | PreparedMotion) -> tuple[Any, ...]:
    """References, frames, height, width and type: what decides the shapes of all of a motion's tensors."""
    if not motion.layers:  # a network without fusion blocks
        return ()
    if isinstance(motion, MotionFeatures):
        feature = next(iter(motion.layers.values()))[0]
        return (*feature.shape[:4], feature.dtype)
    prepared = next(iter(motion.layers.values()))[0]
    return (*prepared.scaler.shape[:2], *prepared.scaler.shape[3:], prepared.key.dtype)


def _out_of_memory(error: BaseException | None) -> BaseException | None:
    """The want of memory that made a recording fail: ending it can fail in turn."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError | MemoryError):
        error = error.__context__
    return error

"""What EfficientMT adds to AnimateDiff: motion modules with a scaler and the temporal integration.

Everything here works on tokens: (batch, frames, height·width, channels), the channels-last memory of the
convolutions around it, so that neither spatial nor temporal attention needs a permuted copy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emt_kernels.add_matmul import add_matmul_
from emt_kernels.geglu import geglu
from emt_kernels.geglu_linear import fuses, geglu_linear
from emt_kernels.group_norm_silu import group_norm_silu
from emt_kernels.layer_norm import layer_norm
from emt_kernels.quantize import Quantized, layer_norm_quantized
from emt_kernels.temporal_attention import temporal_attention

if TYPE_CHECKING:
    from emt.backbones.sd15.unet import MotionTransferUNet


#: Tokens that inference takes through a feed-forward layer at once.
_FEED_FORWARD_TOKENS = 32_768


@contextlib.contextmanager
def feed_forward_in_parts(tokens: int) -> Iterator[None]:
    """Within, inference takes `tokens` at once through a feed-forward layer: fewer take less memory and more time."""
    global _FEED_FORWARD_TOKENS
    before, _FEED_FORWARD_TOKENS = _FEED_FORWARD_TOKENS, tokens
    try:
        yield
    finally:
        _FEED_FORWARD_TOKENS = before


#: Whether inference sums residuals in products, and whether it leaves biases of convolutions to norms.
_RESIDUALS_IN_PRODUCTS = _BIASES_IN_NORMS = False


@contextlib.contextmanager
def residuals_in_products(biases_in_norms: bool) -> Iterator[None]:
    """Within, inference has residual sums from the products that make their second terms (`ResidualStream`).

    Args:
        biases_in_norms: have biases of convolutions, too, added by the norms that read what they made (`ImageStream`).
    """
    global _RESIDUALS_IN_PRODUCTS, _BIASES_IN_NORMS
    before = _RESIDUALS_IN_PRODUCTS, _BIASES_IN_NORMS
    _RESIDUALS_IN_PRODUCTS, _BIASES_IN_NORMS = True, biases_in_norms
    try:
        yield
    finally:
        _RESIDUALS_IN_PRODUCTS, _BIASES_IN_NORMS = before


def _in_products(x: Tensor) -> bool:
    """Whether a product adds to `x` in place: not where gradients, `torch.compile` or autocast need products apart."""
    return (
        _RESIDUALS_IN_PRODUCTS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_dynamo_compiling()  # false in an export, which is not strict
        and not torch.is_autocast_enabled(x.device.type)
    )


def sinusoidal_positions(frames: int, channels: int) -> Tensor:
    """Sinusoidal encoding over time, sine and cosine interleaved (Vaswani et al. 2017, section 3.5).

    Returns:
        (frames, channels), float32.
    """
    time = torch.arange(frames, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, channels, 2, dtype=torch.float32) * (-math.log(10_000.0) / channels))
    positions = torch.zeros(frames, channels)
    positions[:, 0::2] = torch.sin(time * rate)
    positions[:, 1::2] = torch.cos(time * rate)
    return positions


class QuantizingLayerNorm(nn.LayerNorm):
    """A layer norm before products in float8 (`emt.backbones.sd15.fp8`)."""


class ResidualStream:
    """The tokens that the layers of a transformer block read, and add to (Elhage et al. 2021, "residual stream").

    A norm adds up what it reads: `values` and the output of the layer before. Within `residuals_in_products` that
    layer's last product has added it already, onto `values` where they lie, but for its bias: a product takes either a
    bias or a matrix to add to. Biases wait in `bias` for whoever reads the stream.

    Args:
        values: (…, tokens, channels), the caller's own; inference overwrites them.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.bias: Tensor | None = None  # (channels,), to be added to all tokens
        self._term: Tensor | None = None  # to be added by the next norm

    def norm(
        self, norm: nn.LayerNorm, positions: Tensor | None = None, plain: bool = False, exact: bool = False
    ) -> tuple[Tensor | None, Any]:
        """`norm` of the stream (None unless `plain`), and that with `positions` (frames, channels) added.

        The last is `Quantized` if the norm is a `QuantizingLayerNorm`, with the norm as it was if `exact`; with
        `plain`, which the reference pass asks for, it is a tensor in every case.
        """
        given = self.values, norm.weight, norm.bias, norm.eps, positions, self._term
        self._term = None
        if isinstance(norm, QuantizingLayerNorm) and not plain:
            self.values, rows = layer_norm_quantized(*given, exact, self.bias)
            return None, rows
        self.values, normalized, positioned = layer_norm(*given, plain, self.bias)
        return normalized, positioned

    def add(self, layer: nn.Module, x: Tensor) -> None:
        """Add a linear layer's output for `x` (…, inputs); a norm is to follow."""
        if isinstance(layer, nn.Linear) and _in_products(self.values):
            self.values = self.values.contiguous()
            _add_product_of(self.values.view(-1, self.values.shape[-1]), layer, x.flatten(0, -2))
            self.bias = _sum(self.bias, layer.bias)
        else:
            self._term = layer(x)

    def add_feed_forward(self, layer: FeedForward, x: Tensor | Quantized) -> None:
        """Add a feed-forward layer's output for `x`, which is a norm of the stream.

        Inference goes through it in parts: at the highest resolution the wide tensor in between is the largest of the
        network, 0.7 GB for a guided clip of 16 frames at 512×512.
        """
        channels, last = self.values.shape[-1], layer.net[2]
        in_products = isinstance(last, nn.Linear) and _in_products(self.values)
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() or not self.values.is_contiguous() or (compiling and not in_products):
            self.values = self.values + layer(x)
            return
        rows = self.values.view(-1, channels), x if isinstance(x, Quantized) else x.reshape(-1, channels)
        # Compiled code takes any number of tokens, at once.
        pairs = [rows] if compiling else zip(*(part.split(_FEED_FORWARD_TOKENS) for part in rows), strict=True)
        for whole, part in pairs:
            if in_products:
                _add_product_of(whole, last, layer.net[0](part))
            else:
                whole += layer(part)
        if in_products:
            self.bias = _sum(self.bias, last.bias)


class ImageStream:
    """What residual blocks, transformers and motion modules read, and add to: images and a bias not yet added.

    Args:
        values: (frames, channels, height, width).
        bias: (channels,), to be added to all pixels; None for none. There is one within `residuals_in_products` with
            `biases_in_norms`, where a convolution leaves its bias to the norm after it, which reads all values anyway.
    """

    def __init__(self, values: Tensor, bias: Tensor | None = None) -> None:
        self.values = values
        self.bias = bias

    @property
    def in_products(self) -> bool:
        """Whether sums are made by products, in place."""
        return _in_products(self.values)

    @staticmethod
    def of(conv: nn.Conv2d, x: Tensor) -> ImageStream:
        """The images that a convolution makes of `x`."""
        if _BIASES_IN_NORMS and _in_products(x):
            return ImageStream(F.conv2d(x, conv.weight, None, conv.stride, conv.padding), conv.bias)
        return ImageStream(conv(x))

    @staticmethod
    def cat(streams: Sequence[ImageStream]) -> ImageStream:
        """Streams beside each other along channels."""
        values = torch.cat([x.values for x in streams], dim=1)
        if all(x.bias is None for x in streams):
            return ImageStream(values)
        zeros = (x.values.new_zeros(x.values.shape[1]) for x in streams)
        return ImageStream(values, torch.cat([z if x.bias is None else x.bias for x, z in zip(streams, zeros)]))

    def norm(self, norm: nn.GroupNorm, silu: bool = False, shift: Tensor | None = None) -> Tensor:
        """`norm` of the images, plus `shift` (frames, channels) before and SiLU after."""
        x = self.values
        if self.bias is not None:
            shift = self.bias.expand(x.shape[0], -1) if shift is None else shift + self.bias
        return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu, shift)

    def whole(self) -> Tensor:
        """The images with their bias, from here on in `values`."""
        if self.bias is not None:
            self.values += self.bias[:, None, None]
            self.bias = None
        return self.values

    def plus(self, other: ImageStream) -> ImageStream:
        """The sum with other images; this one's are overwritten where products overwrite theirs."""
        if not self.in_products:
            return ImageStream(self.values + other.values)
        self.values += other.values
        return ImageStream(self.values, _sum(self.bias, other.bias))

    def plus_product(self, layer: nn.Linear | nn.Conv2d, x: Tensor, bias: Tensor | None) -> ImageStream:
        """The sum with what a linear layer or 1×1 convolution makes of ``x + bias``.

        Args:
            layer: with a bias.
            x: tokens (frames, height·width, inputs) or (batch, frames, height·width, inputs).
            bias: (inputs,) or None.
        """
        if not self.in_products:
            output = layer(x).flatten(0, -3).unflatten(1, self.values.shape[2:])
            return ImageStream(self.values + output.permute(0, 3, 1, 2))
        values = self.values.contiguous(memory_format=torch.channels_last)
        _add_product_of(values.permute(0, 2, 3, 1).view(-1, values.shape[1]), layer, x.flatten(0, -2))
        added = layer.bias if bias is None else torch.addmv(layer.bias, layer.weight.flatten(1), bias)
        total = ImageStream(values, _sum(self.bias, added))
        return total if _BIASES_IN_NORMS else ImageStream(total.whole())


def _add_product_of(total: Tensor, layer: nn.Linear | nn.Conv2d, x: Tensor) -> None:
    """Add to `total`, in the product itself, what a linear layer or 1×1 convolution makes of `x`, but for its bias."""
    add_matmul_(total, layer.weight.flatten(1), x)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


@dataclass
class PreparedReference:
    """What one temporal attention needs of a reference at every step, computed once (`MotionFeatures.prepare`).

    With s the scale of a token, f its feature and p its position: ``W(s·f + p) = s·(W f) + W p``.
    """

    key: Tensor  # W_k f: (n, frames, tokens, channels)
    value: Tensor  # W_v f: (n, frames, tokens, channels)
    position_key: Tensor  # W_k p: (frames, channels)
    position_value: Tensor  # W_v p: (frames, channels)
    scaler: (
        Tensor  # what the scaler's first convolution adds to the clip's half: (n, frames, channels/4, height, width)
    )


@dataclass
class PreparedMotion:
    """A reference's motion, ready for denoising: two `PreparedReference` for each motion module that takes it."""

    layers: Mapping[str, tuple[PreparedReference, PreparedReference]]

    def prepare(self, unet: MotionTransferUNet) -> PreparedMotion:
        """Itself: it is prepared."""
        return self


@dataclass
class MotionFeatures:
    """The motion of a reference: what `MotionTransferUNet.encode_reference` read in one pass over it.

    `layers` maps the path of a motion module, such as ``up_blocks.1.motion_modules.0``, to the layer-normed
    hidden states before its two temporal attentions, each (n, frames, height, width, channels), n references at
    once, before the position encoding is added.
    """

    layers: dict[str, tuple[Tensor, Tensor]]

    def prepare(self, unet: MotionTransferUNet) -> PreparedMotion:
        """Compute once what does not change from step to step. Results are those of the unprepared features."""
        modules = unet.fusion_modules()
        if modules.keys() != self.layers.keys():
            raise ValueError(
                f"the motion was read in {sorted(self.layers)}, but this network takes it in {sorted(modules)}"
            )
        return PreparedMotion({path: module.prepare(self.layers[path]) for path, module in modules.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MotionFeatures:
        """The same features on another device or in another type."""
        return MotionFeatures(
            {path: (a.to(device, dtype), b.to(device, dtype)) for path, (a, b) in self.layers.items()}
        )


for _dataclass in (PreparedReference, PreparedMotion, MotionFeatures):
    torch.export.register_dataclass(_dataclass)


class Scaler(nn.Module):
    """Scale map of the reference: which tokens carry motion (EfficientMT, section 3.3).

    Convolutions over [clip features, reference features] along channels, with a sinusoidal encoding over time of
    double width: 3×3 2C → C/4, GELU, 3×3 C/4 → C/16, GELU, 3×3 C/16 → 1, then ``sigmoid(x − 5)``.
    """

    positions: Tensor

    def __init__(self, channels: int, max_frames: int) -> None:
        super().__init__()
        middle, narrow = max(channels // 4, 1), max(channels // 16, 1)
        self.spatial_convs = nn.ModuleList(
            [
                nn.Conv2d(2 * channels, middle, 3, padding=1),
                nn.Conv2d(middle, narrow, 3, padding=1),
                nn.Conv2d(narrow, 1, 3, padding=1),
            ]
        )
        self.register_buffer("positions", sinusoidal_positions(max_frames, 2 * channels), persistent=False)

    def _half(self, x: Tensor, height: int, width: int, first: bool) -> Tensor:
        # The first convolution is linear, so that the clip's half and the reference's can be computed apart.
        conv, channels = self.spatial_convs[0], x.shape[3]
        half = slice(0, channels) if first else slice(channels, 2 * channels)
        image = x.flatten(0, 1).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return F.conv2d(image, conv.weight[:, half], None if first else conv.bias, padding=1)

    def prepare(self, feature: Tensor, added: Tensor) -> Tensor:
        """All that the first convolution adds to the clip's half.

        Args:
            feature: of the reference, (n, frames, height, width, channels).
            added: position encoding that the clip's features come with, (frames, channels).

        Returns:
            (n, frames, channels/4, height, width).
        """
        n, frames, height, width, channels = feature.shape
        own, positions = self.positions[:frames].split(channels, dim=1)
        prepared = self._half(feature.flatten(2, 3) + positions[:, None], height, width, first=False)
        # The clip's features have the attention's encoding where they should have the scaler's own.
        missing = (own - added)[None, :, None].expand(1, frames, height * width, channels)
        correction = self._half(missing, height, width, first=True)
        return prepared.unflatten(0, (n, frames)) + correction

    def forward(self, x: Tensor, prepared: Tensor) -> Tensor:
        """Scale of every reference token for clips `x`.

        Args:
            x: the clip's layer-normed features with the attention's position encoding, (batch, frames, tokens,
                channels).
            prepared: the rest of the first convolution, (n, frames, channels/4, height, width); n divides batch.

        Returns:
            (batch, frames, tokens), between 0 and 1.
        """
        batch, n, (height, width) = x.shape[0], prepared.shape[0], prepared.shape[3:]
        own = self._half(x, height, width, first=True).unflatten(0, (batch // n, n, -1))
        h = F.gelu((own + prepared).flatten(0, 2))
        last = self.spatial_convs[2]
        # The 5 goes into the bias: subtracted afterwards, it would cost bfloat16 the digits of a small difference.
        h = F.conv2d(F.gelu(self.spatial_convs[1](h)), last.weight, last.bias - 5, padding=1)
        return torch.sigmoid(h).flatten(1).unflatten(0, (batch, -1))


class QKV(nn.Module):
    """Query, key and value projections without biases; keys and values of `context_channels`."""

    fused: Tensor | None

    def __init__(self, channels: int, context_channels: int | None = None) -> None:
        super().__init__()
        self.fp8: nn.Module | None = None  # the three in one float8 product (`emt.backbones.sd15.fp8`)
        context_channels = context_channels or channels
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.register_buffer("fused", None, persistent=False)

    def fuse(self) -> None:
        """Let inference have the three from one product; the weights become parts of one tensor, not copies of it."""
        layers = (self.to_q, self.to_k, self.to_v)
        if self.fused is not None and self.fused.data_ptr() == self.to_q.weight.data_ptr():
            return
        self.fused = torch.cat([layer.weight.data for layer in layers])
        for layer, part in zip(layers, self.fused.chunk(3), strict=True):
            layer.weight.data = part

    def project(self, x: Tensor | Quantized) -> tuple[Tensor, ...]:
        """Query, key and value of the same (…, channels)."""
        if self.fp8 is not None:
            return self.fp8(x).chunk(3, dim=-1)
        if self.fused is None or torch.is_grad_enabled():
            return self.to_q(x), self.to_k(x), self.to_v(x)
        return F.linear(x, self.fused).chunk(3, dim=-1)


class TemporalAttention(QKV):
    """Attention over time at every pixel, with a second set of projections where the adapter is trained.

    The backbone's own projections read the reference; the adapter's denoise, and see
    [own frames, scale · reference frames] (EfficientMT, section 3.3, temporal integration).
    """

    positions: Tensor

    def __init__(self, channels: int, heads: int, max_frames: int, adapter: bool) -> None:
        super().__init__(channels)
        self.heads = heads
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.adapter = QKV(channels) if adapter else None
        self.register_buffer("positions", sinusoidal_positions(max_frames, channels), persistent=False)

    def projections(self, adapted: bool) -> QKV:
        """The adapter's projections if they are wanted and exist, otherwise the backbone's."""
        return self.adapter if adapted and self.adapter is not None else self

    def prepare(self, feature: Tensor, scaler: Tensor) -> PreparedReference:
        """Project the reference's feature, (n, frames, height, width, channels), once."""
        qkv = self.projections(adapted=True)
        feature = feature.flatten(2, 3)
        # The positions of the reference part start again at 0.
        positions = self.positions[: feature.shape[1]].to(feature.dtype)
        return PreparedReference(qkv.to_k(feature), qkv.to_v(feature), qkv.to_k(positions), qkv.to_v(positions), scaler)

    def forward(
        self, x: Tensor | Quantized, reference: PreparedReference | None, scale: Tensor | None, adapted: bool
    ) -> Tensor:
        """What `to_out` takes: (batch, frames, tokens, channels) with position encoding → the same.

        `scale` is (batch, frames, tokens).
        """
        q, k, v = self.projections(adapted).project(x)
        if reference is None:
            return temporal_attention(q, k, v, self.heads)
        return temporal_attention(
            q,
            k,
            v,
            self.heads,
            reference.key,
            reference.value,
            reference.position_key,
            reference.position_value,
            scale,
        )


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020): twice the width out of one product, one half gating the other."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → (…, inner)."""
        if type(self.proj) is nn.Linear and fuses(x, self.proj.weight):
            return geglu_linear(x, self.proj.weight, self.proj.bias)
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU and a linear layer back, four times the width between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Published names count the dropout between the two: `net.0.proj` and `net.2`.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor | Quantized) -> Tensor:
        """(…, channels) → (…, channels)."""
        return self.net[2](self.net[0](x))


class TemporalTransformerBlock(nn.Module):
    """Two temporal attentions and a feed-forward layer; one scaler serves both attentions."""

    def __init__(self, channels: int, heads: int, max_frames: int, adapter: bool) -> None:
        super().__init__()
        self.attention_blocks = nn.ModuleList(
            [TemporalAttention(channels, heads, max_frames, adapter) for _ in range(2)]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(2)])
        self.ff = FeedForward(channels)
        self.ff_norm = nn.LayerNorm(channels)
        self.scaler = Scaler(channels, max_frames) if adapter else None

    def forward(
        self, x: Tensor, reference: tuple[PreparedReference, PreparedReference] | None, adapted: bool
    ) -> tuple[ResidualStream, tuple[Tensor, Tensor] | None]:
        """(batch, frames, tokens, channels) → the same, and the features that a reference pass keeps."""
        features, stream = [], ResidualStream(x)
        for i, (attention, norm) in enumerate(zip(self.attention_blocks, self.norms, strict=True)):
            prepared = reference[i] if reference else None
            positions = attention.positions[: x.shape[1]]
            feature, h = stream.norm(norm, positions, not adapted, exact=prepared is not None)
            if feature is not None:
                features.append(feature)
            read = h.exact if isinstance(h, Quantized) else h
            scale = self.scaler(read, prepared.scaler) if prepared else None
            stream.add(attention.to_out[0], attention(h, prepared, scale, adapted))
        stream.add_feed_forward(self.ff, stream.norm(self.ff_norm)[1])
        return stream, (features[0], features[1]) if features else None


class TemporalTransformer(nn.Module):
    """Group norm, projection in, temporal transformer block, projection out, residual."""

    def __init__(self, channels: int, heads: int, groups: int, max_frames: int, adapter: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TemporalTransformerBlock(channels, heads, max_frames, adapter)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(
        self, x: ImageStream, frames: int, reference: tuple[PreparedReference, PreparedReference] | None, adapted: bool
    ) -> tuple[ImageStream, tuple[Tensor, Tensor] | None]:
        """(batch·frames, channels, height, width) → the same, and a reference pass's features in image shape.

        Raises:
            ValueError: if the reference has another number of frames or another size than the clip.
        """
        height, width = x.values.shape[2:]
        if reference is not None:
            _, reference_frames, _, *grid = reference[0].scaler.shape
            if (reference_frames, *grid) != (frames, height, width):
                raise ValueError(
                    f"the motion has (frames, height, width) = {(reference_frames, *grid)} where the sample has "
                    f"{(frames, height, width)}: a sample and its reference have the same shape"
                )
        h = x.norm(self.norm)  # per frame: the published network folds frames into the batch here
        h = h.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, (-1, frames))  # (batch, frames, tokens, channels)
        stream, features = self.transformer_blocks[0](self.proj_in(h), reference, adapted)
        x = x.plus_product(self.proj_out, stream.values, stream.bias)
        if features is None:
            return x, None
        return x, (features[0].unflatten(2, (height, width)), features[1].unflatten(2, (height, width)))


class MotionModule(nn.Module):
    """AnimateDiff's motion module (Guo et al. 2023), with the temporal integration where `adapter` is set.

    `path` is the module's own name in the network, the key of its layer in `MotionFeatures`.
    """

    def __init__(self, path: str, channels: int, heads: int, groups: int, max_frames: int, adapter: bool) -> None:
        super().__init__()
        self.path = path
        self.temporal_transformer = TemporalTransformer(channels, heads, groups, max_frames, adapter)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names (within this module) and parameters of what EfficientMT trains: adapter projections and scaler."""
        for name, parameter in self.named_parameters():
            if ".adapter." in name or ".scaler." in name:
                yield name, parameter

    def prepare(self, features: tuple[Tensor, Tensor]) -> tuple[PreparedReference, PreparedReference]:
        """What denoising needs of a reference, from its two features (n, frames, height, width, channels)."""
        block = self.temporal_transformer.transformer_blocks[0]
        first, second = (
            attention.prepare(feature, block.scaler.prepare(feature, attention.positions[: feature.shape[1]]))
            for attention, feature in zip(block.attention_blocks, features, strict=True)
        )
        return first, second

    def forward(
        self, x: ImageStream, frames: int, reference: tuple[PreparedReference, PreparedReference] | None, adapted: bool
    ) -> tuple[ImageStream, tuple[Tensor, Tensor] | None]:
        """(batch·frames, channels, height, width) → the same, and the features that a reference pass keeps."""
        return self.temporal_transformer(x, frames, reference, adapted)

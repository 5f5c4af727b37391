"""Rewrites a trained PartialNet for inference: norms folded, one image size, static shapes.

``deploy`` gives the same numbers as the model in eval mode, up to rounding, in one of two forms:

- concat       few large operations; for runtimes where splitting a tensor costs little
- two-stream   the r convolved and the u attended channels travel as two tensors, and weights are
               split instead of maps; for runtimes that accept only simple operations (XNNPACK)

B batch   C channels of a block   r convolved   u attended   h = C // 2
H, W map size   N = H * W   heads, D = u // heads   a = C - h channels that the spatial gate scales

Folding runs in float64. The batch stays free: nothing here reads it. This is one file because the
two forms are two arrangements of the same folded layers, and a change to one needs the other seen.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit_zoo.partialnet import (
    MLP,
    Block,
    ChannelAttention,
    Head,
    PartialNet,
    PartialNetConfig,
    Patches,
    PATConv,
    PConv,
    SelfAttention,
    TwoResidualBlock,
)

Streams = tuple[Tensor, ...]  # the channels of one map, in order, in one tensor or in two


def deploy(
    model: PartialNet, *, form: Literal["concat", "two-stream"], size: tuple[int, int]
) -> nn.Module:
    """Return the inference form of ``model`` for images of ``size`` (height, width).

    It maps (B, in_channels, *size) to what the model returns in eval mode, keeps the model's
    dtype and shares nothing with it. ValueError for a size that is too small, weights that are
    not finite, or a model that is still searching for its splits.
    """
    if form not in ("concat", "two-stream"):
        raise ValueError(f"form must be 'concat' or 'two-stream', not {form!r}")
    _check_size(model.config, size)
    _check_weights(model)
    exact = deepcopy(model).eval().double().requires_grad_(False)
    net = DeployedNet(exact, size, ConcatBlock if form == "concat" else TwoStreamBlock)
    return net.to(next(model.parameters()).dtype).eval().requires_grad_(False)


def map_sizes(config: PartialNetConfig, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (height, width) of the four stages' maps for images of ``size``."""
    height, width = (side // config.patch_size for side in size)
    return [(height >> stage, width >> stage) for stage in range(4)]


def _check_size(config: PartialNetConfig, size: tuple[int, int]) -> None:
    least = 8 * config.patch_size
    if min(size) < least:
        raise ValueError(f"images of {size} vanish before stage 4; use at least {least} by {least}")


def _check_weights(model: PartialNet) -> None:
    for module in model.modules():
        if isinstance(module, (Block, TwoResidualBlock)) and not isinstance(
            module.mixer, (PConv, PATConv)
        ):
            raise ValueError("this model still searches for its splits; freeze it first")
    for name, tensor in model.state_dict().items():
        # A meta tensor has no values to look at; folding one still tells shapes and counts.
        if not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite; this training diverged")


# Folding. A layer is a kernel (out, in, height, width) and a bias (out,) or None, in float64.


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution as plain tensors, to be cut into rows (outputs) and columns (inputs)."""

    weight: Tensor
    bias: Tensor | None = None

    def rows(self, start: int, stop: int) -> "Layer":
        """Return the layer that computes only outputs ``start`` to ``stop``."""
        return Layer(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])

    def columns(self, start: int, stop: int) -> "Layer":
        """Return what inputs ``start`` to ``stop`` add; the first columns carry the bias."""
        return Layer(self.weight[:, start:stop], self.bias if start == 0 else None)

    def convolution(self, *, stride: int = 1) -> nn.Conv2d:
        """Return it as a module; a 3x3 kernel is padded, others are not."""
        outputs, inputs, height, width = self.weight.shape
        module = nn.Conv2d(
            inputs,
            outputs,
            (height, width),
            stride=stride,
            padding=1 if height == 3 else 0,
            bias=self.bias is not None,
            device="meta",
        )
        module.weight = _constant(self.weight)
        module.bias = None if self.bias is None else _constant(self.bias)
        return module


def _constant(tensor: Tensor) -> nn.Parameter:
    # A copy: a slice would keep the whole tensor alive and in saved files.
    return nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=False)


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return s, t (C,) with norm(x) = s * x + t in eval mode."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = norm.weight / (variance + norm.eps).sqrt()
    return scale, norm.bias - mean * scale


def fold_patches(patches: Patches) -> Layer:
    """Return the convolution with the norm that follows it."""
    scale, shift = scale_and_shift(patches.norm)
    return Layer(patches.conv.weight * scale[:, None, None, None], shift)


def fold_gate(attention: ChannelAttention, pixels: int) -> Layer:
    """Return one 1x1 kernel (u, 2u) for [mean | biased deviation], with the gate's norm."""
    scale, shift = scale_and_shift(attention.gate_norm)
    unbiased = (pixels / (pixels - 1)) ** 0.5
    mean, deviation = attention.gate.weight[:, :, 0, 0], attention.gate.weight[:, :, 0, 1]
    kernel = torch.cat((mean, deviation * unbiased), dim=1) * scale[:, None]
    return Layer(kernel[:, :, None, None], shift)


def fold_expand(mlp: MLP, mixer: PConv | PATConv) -> Layer:
    """Return the MLP's first layer, with its norm and the norm of the channel attention before."""
    weight = mlp.expand.weight
    bias = weight.new_zeros(weight.shape[0])
    if isinstance(mixer, PATConv) and isinstance(mixer.attention, ChannelAttention):
        scale, shift = scale_and_shift(mixer.attention.norm)
        convolved, attended = torch.split(weight, mixer.sizes, dim=1)
        bias = attended[:, :, 0, 0] @ shift
        weight = torch.cat((convolved, attended * scale[:, None, None]), dim=1)
    scale, shift = scale_and_shift(mlp.norm)
    return Layer(weight * scale[:, None, None, None], bias * scale + shift)


@dataclass(frozen=True, slots=True)
class Projection:
    """The MLP's second layer with the spatial gate in it.

    Output c < a is ``gated`` row c times the gate plus ``shift``; the others are ``plain``. All
    is linear up to the gate, so the gate's own convolutions vanish into the rows.
    """

    gated: Layer  # (a, 2C), no bias
    logit: Layer  # (1, 2C), no bias
    shift: Tensor  # (a,)
    plain: Layer  # (h, 2C)


def fold_projection(mlp: MLP) -> Projection | Layer:
    """Return the MLP's second layer; a plain Layer if there is no spatial gate."""
    weight, gate = mlp.project.weight, mlp.gate
    if gate is None:
        return Layer(weight)
    upper, lower = (part[:, :, 0, 0] for part in torch.split(weight, gate.sizes))
    upper_scale, upper_shift = scale_and_shift(gate.gated_norm)
    lower_scale, lower_shift = scale_and_shift(gate.conv_norm)
    mix = gate.conv.weight[:, :, 0, 0]
    return Projection(
        gated=_pointwise(upper * upper_scale[:, None]),
        logit=_pointwise(gate.logit.weight[:, :, 0, 0] @ upper),
        shift=upper_shift,
        plain=_pointwise(mix @ (lower * lower_scale[:, None]), mix @ lower_shift),
    )


def fold_qkv(attention: SelfAttention) -> Layer:
    """Return the 1x1 kernel (3u, u) with the layer norm's scale and shift and the logits' scale."""
    weight = attention.qkv.weight * attention.norm.weight
    bias = attention.qkv.weight @ attention.norm.bias
    channels = weight.shape[1]
    scale = torch.ones_like(bias)
    scale[:channels] = attention.scale
    return _pointwise(weight * scale[:, None], bias * scale)


def _pointwise(weight: Tensor, bias: Tensor | None = None) -> Layer:
    return Layer(weight[:, :, None, None], bias)


# What both forms share.


def hard_sigmoid(x: Tensor) -> Tensor:
    """Return clip(x / 6 + 1 / 2, 0, 1), in operations that every delegate knows."""
    return torch.clamp(x * (1.0 / 6.0) + 0.5, 0.0, 1.0)


class ChannelGate(nn.Module):
    """Scales each channel of (B, u, H, W) by a gate of all channels' mean and deviation."""

    def __init__(self, attention: ChannelAttention, size: tuple[int, int]) -> None:
        super().__init__()
        self.gate = fold_gate(attention, size[0] * size[1]).convolution()

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        mean = x.mean((2, 3), keepdim=True)
        # Two passes: the mean of squares minus the squared mean loses half the digits.
        centred = x - mean
        deviation = (centred * centred).mean((2, 3), keepdim=True).sqrt()
        return x * hard_sigmoid(self.gate(torch.cat((mean, deviation), dim=1)))


class NativeNorm(nn.Module):
    """Layer norm over the channels of each pixel, without scale or shift, as one operation."""

    def __init__(self, channels: int, epsilon: float) -> None:
        super().__init__()
        self.channels, self.epsilon = channels, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape (B, u, H, W)."""
        y = F.layer_norm(x.permute(0, 2, 3, 1), (self.channels,), eps=self.epsilon)
        return y.permute(0, 3, 1, 2)


class AveragingNorm(nn.Module):
    """As NativeNorm, with the means written as a convolution by 1 / u."""

    def __init__(self, channels: int, epsilon: float) -> None:
        super().__init__()
        share = torch.full((1, channels), 1 / channels, dtype=torch.float64)
        self.average = _pointwise(share).convolution()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape (B, u, H, W)."""
        centred = x - self.average(x)
        normal: Tensor = centred * torch.rsqrt(self.average(centred * centred) + self.epsilon)
        return normal


class PixelAttention(nn.Module):
    """Self-attention over the pixels of (B, u, H, W); the position bias is a constant."""

    bias: Tensor  # (1, heads, N, N)

    def __init__(
        self, attention: SelfAttention, size: tuple[int, int], norm: type[nn.Module]
    ) -> None:
        super().__init__()
        layer, channels = fold_qkv(attention), attention.proj.out_features
        self.norm = norm(channels, attention.norm.eps)
        self.query = layer.rows(0, channels).convolution()
        self.key = layer.rows(channels, 2 * channels).convolution()
        self.value = layer.rows(2 * channels, 3 * channels).convolution()
        self.proj = _pointwise(attention.proj.weight, attention.proj.bias).convolution()
        self.heads, self.depth = attention.heads, channels // attention.heads
        self.size, self.pixels = size, size[0] * size[1]
        self.register_buffer("bias", attention.position_bias(*size)[None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        y = self.norm(x)
        # Heads join the batch, (B * heads, D, N): a product of four-dimensional tensors would
        # bring expansions with it that delegates refuse.
        q, k, v = (
            layer(y).reshape(-1, self.depth, self.pixels)
            for layer in (self.query, self.key, self.value)
        )
        logits = torch.bmm(q.transpose(1, 2), k)
        logits = logits.reshape(-1, self.heads, self.pixels, self.pixels) + self.bias
        weights = logits.softmax(dim=-1).reshape(-1, self.pixels, self.pixels)
        mixed = torch.bmm(v, weights.transpose(1, 2))
        image: Tensor = self.proj(mixed.reshape(-1, self.heads * self.depth, *self.size))
        return image


def fold_attention(
    mixer: PConv | PATConv, size: tuple[int, int], norm: type[nn.Module]
) -> nn.Module:
    """Return what maps the attended channels (B, u, H, W) of a block; identity if nothing does."""
    if isinstance(mixer, PConv):
        return nn.Identity()
    if isinstance(mixer.attention, SelfAttention):
        return PixelAttention(mixer.attention, size, norm)
    return ChannelGate(cast(ChannelAttention, mixer.attention), size)


class Affine(nn.Module):
    """Scales and shifts the channels of (B, C, H, W): a norm that nothing can absorb."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale, shift = scale_and_shift(norm)
        self.scale, self.shift = _constant(scale[:, None, None]), _constant(shift[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        return x * self.scale + self.shift


class Scores(nn.Module):
    """The head. A map (B, C, H, W) in one tensor or several becomes scores (B, classes)."""

    def __init__(self, head: Head, sizes: Sequence[int]) -> None:
        super().__init__()
        self.features = Sum(Layer(head.features.weight), sizes)
        self.act = deepcopy(head.act)
        self.classifier = deepcopy(head.classifier)

    def forward(self, *streams: Tensor) -> Tensor:
        """Return scores before softmax."""
        pooled = [x.mean((2, 3), keepdim=True) for x in streams]
        # Not flatten(1): with a free batch that reads the batch size, and splits a delegate.
        hidden = self.act(self.features(*pooled)).reshape(-1, self.classifier.in_features)
        scores: Tensor = self.classifier(hidden)
        return scores


class Sum(nn.Module):
    """One convolution of channels that arrive in several tensors: a sum of convolutions."""

    def __init__(self, layer: Layer, sizes: Sequence[int], *, stride: int = 1) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            layer.columns(start, stop).convolution(stride=stride) for start, stop in spans(sizes)
        )

    def forward(self, *streams: Tensor) -> Tensor:
        """Return one map from maps (B, sizes[i], H, W)."""
        total: Tensor = self.parts[0](streams[0])
        for part, x in zip(self.parts[1:], streams[1:], strict=True):
            total = total + part(x)
        return total


def spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, stop) of each size when they are laid end to end."""
    return list(pairwise(accumulate(sizes, initial=0)))


# Form "concat".


class ConcatProjection(nn.Module):
    """The MLP's second layer with the spatial gate: one convolution, sliced. 2C to C channels."""

    def __init__(self, folded: Projection) -> None:
        super().__init__()
        layers = (folded.gated, folded.logit, folded.plain)
        silent = folded.shift.new_zeros(len(folded.shift) + 1)
        bias = torch.cat((silent, cast(Tensor, folded.plain.bias)))
        weight = torch.cat([layer.weight for layer in layers])
        self.conv = Layer(weight, bias).convolution()
        self.shift = _constant(folded.shift[:, None, None])
        self.gated = len(folded.shift)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (B, C, H, W) of (B, 2C, H, W)."""
        y = self.conv(hidden)
        gate = hard_sigmoid(y[:, self.gated : self.gated + 1])
        upper = y[:, : self.gated] * gate + self.shift
        return torch.cat((upper, y[:, self.gated + 1 :]), dim=1)


class ConcatBlock(nn.Module):
    """A block of either kind on one map (B, C, H, W). Shape kept."""

    def __init__(self, block: Block | TwoResidualBlock, size: tuple[int, int]) -> None:
        super().__init__()
        mixer, folded = block.mixer, fold_projection(block.mlp)
        self.convolved, self.attended = mixer.sizes
        self.streams = [sum(mixer.sizes)]
        self.conv = Layer(mixer.conv.weight).convolution()
        self.attention = fold_attention(mixer, size, NativeNorm)
        self.expand = fold_expand(block.mlp, mixer).convolution()
        self.act = deepcopy(block.mlp.act)
        self.project = (
            folded.convolution() if isinstance(folded, Layer) else ConcatProjection(folded)
        )
        self.two_residuals = isinstance(block, TwoResidualBlock)

    def forward(self, streams: Streams) -> Streams:
        """Return one map of the same shape."""
        (x,) = streams
        y = self.conv(x[:, : self.convolved])
        if self.attended:
            y = torch.cat((y, self.attention(x[:, self.convolved :])), dim=1)
        if self.two_residuals:
            x = y = x + y
        return (x + self.project(self.act(self.expand(y))),)


# Form "two-stream".


class Rows(nn.Module):
    """One convolution whose outputs leave in several tensors, of channels that may also arrive so.

    Maps (B, sources[i], H, W) become maps (B, targets[j], ...).
    """

    def __init__(
        self, layer: Layer, sources: Sequence[int], targets: Sequence[int], *, stride: int = 1
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            Sum(layer.rows(start, stop), sources, stride=stride) for start, stop in spans(targets)
        )

    def forward(self, *streams: Tensor) -> Streams:
        """Return the maps of the targets."""
        return tuple(part(*streams) for part in self.parts)


class GatedRows(nn.Module):
    """Outputs ``start`` to ``stop`` of the MLP's second layer: gated ones, then plain ones."""

    def __init__(self, folded: Projection, start: int, stop: int) -> None:
        super().__init__()
        border = len(folded.shift)
        gated, plain = (start, min(stop, border)), (max(start, border), stop)
        self.gated = self.plain = None
        if gated[0] < gated[1]:
            self.gated = folded.gated.rows(*gated).convolution()
            self.shift = _constant(folded.shift[slice(*gated), None, None])
        if plain[0] < plain[1]:
            self.plain = folded.plain.rows(plain[0] - border, plain[1] - border).convolution()

    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
        """Return (B, stop - start, H, W) of (B, 2C, H, W) and the gate (B, 1, H, W)."""
        parts = []
        if self.gated is not None:
            parts.append(self.gated(hidden) * gate + self.shift)
        if self.plain is not None:
            parts.append(self.plain(hidden))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class GatedProjection(nn.Module):
    """The MLP's second layer with the spatial gate; (B, 2C, H, W) to maps of ``sizes`` channels."""

    def __init__(self, folded: Projection, sizes: Sequence[int]) -> None:
        super().__init__()
        self.logit = folded.logit.convolution()
        self.rows = nn.ModuleList(GatedRows(folded, *span) for span in spans(sizes))

    def forward(self, hidden: Tensor) -> Streams:
        """Return one map per size."""
        gate = hard_sigmoid(self.logit(hidden))
        return tuple(row(hidden, gate) for row in self.rows)


class TwoStreamBlock(nn.Module):
    """A block of either kind on (B, r, H, W) and (B, u, H, W). Shapes kept."""

    def __init__(self, block: Block | TwoResidualBlock, size: tuple[int, int]) -> None:
        super().__init__()
        mixer, folded = block.mixer, fold_projection(block.mlp)
        self.streams = [channels for channels in mixer.sizes if channels]
        self.conv = Layer(mixer.conv.weight).convolution()
        self.attention = fold_attention(mixer, size, AveragingNorm)
        self.expand = Sum(fold_expand(block.mlp, mixer), self.streams)
        self.act = deepcopy(block.mlp.act)
        self.project = (
            Rows(folded, [folded.weight.shape[1]], self.streams)
            if isinstance(folded, Layer)
            else GatedProjection(folded, self.streams)
        )
        self.two_residuals = isinstance(block, TwoResidualBlock)

    def forward(self, streams: Streams) -> Streams:
        """Return maps of the same shapes; one map, of all C channels, if none is attended."""
        x = resplit(streams, self.streams)
        y: Streams = (self.conv(x[0]), *(self.attention(rest) for rest in x[1:]))
        if self.two_residuals:
            x = y = add(x, y)
        return add(x, self.project(self.act(self.expand(*y))))


def resplit(streams: Streams, sizes: Sequence[int]) -> Streams:
    """Return the same channels cut at other places; nothing happens where the cuts agree."""
    if [x.shape[1] for x in streams] == list(sizes):
        return streams
    whole = _whole(streams)
    return tuple(whole[:, start:stop] for start, stop in spans(sizes))


def _whole(streams: Streams) -> Tensor:
    return streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)


def add(left: Streams, right: Streams) -> Streams:
    """Return the sums, tensor by tensor."""
    return tuple(a + b for a, b in zip(left, right, strict=True))


# The network, of either form.


class DeployedNet(nn.Module):
    """The whole network, of blocks of one form. See ``deploy``."""

    def __init__(
        self,
        model: PartialNet,
        size: tuple[int, int],
        form: type[ConcatBlock] | type[TwoStreamBlock],
    ) -> None:
        super().__init__()
        self.size, config = size, model.config
        stages = [
            [form(block, shape) for block in stage]
            for stage, shape in zip(model.blocks(), map_sizes(config, size), strict=True)
        ]
        sources = [[config.in_channels], *(stage[-1].streams for stage in stages)]
        patches = [model.embed, *(cast(Patches, merge) for merge in model.merges)]
        self.patches = nn.ModuleList(
            Rows(fold_patches(patch), source, stage[0].streams, stride=patch.conv.stride[0])
            for patch, source, stage in zip(patches, sources, stages, strict=False)
        )
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.norms = nn.ModuleList(Affine(cast(nn.BatchNorm2d, n)) for n in model.output_norms)
        self.head = None if model.head is None else Scores(model.head, sources[-1])

    def forward(self, images: Tensor) -> Tensor | Streams:
        """Return scores (B, classes), or the four normalised maps."""
        _check_images(images, self.size)
        x: Streams = (images,)
        maps = []
        for patch, stage in zip(self.patches, self.stages, strict=True):
            x = stage(patch(*x))
            maps.append(x)
        if self.head is None:
            return tuple(norm(_whole(y)) for norm, y in zip(self.norms, maps, strict=True))
        scores: Tensor = self.head(*x)
        return scores


def _check_images(images: Tensor, size: tuple[int, int]) -> None:
    if tuple(images.shape[2:]) != size:
        raise ValueError(
            f"this network was deployed for images of {size} and got {tuple(images.shape[2:])}; "
            "deploy it again for that size"
        )

"""PartialNet: a four-stage image network that convolves a few channels and attends to the rest.

Paper: arXiv 2502.01303 ("PartialNet", AAAI 2026; earlier as "PATNet", arXiv 2503.03148).
FasterNet is the same network with both attentions and the spatial gate off.

B batch   C channels of a block   H, W map size   N = H * W
r convolved channels, the first ones   u = C - r attended channels   h = C // 2

Unusual here:
- The 3x3 convolution has no norm and no activation, and runs beside an attention that reads the
  other channels: a gate by mean and deviation in stages 1 to 3, self-attention in stage 4.
- The spatial gate splits its channels in halves, not at r.
- Stage 4 has two residuals around a block, the other stages have one.
- The distance table of the self-attention has 81 columns; only 40 to 80 can be read.

One file, as every model here, although it is long: half of it is the config and its checks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TABLE_COLUMNS = 81
TABLE_CENTRE = 40  # the column of distance 0, and the largest bucket number
EXACT_DISTANCE = 20  # farther pixels share logarithmic buckets
FARTHEST_RATIO = 8.0  # 8 * EXACT_DISTANCE pixels reach the last bucket


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What one block looks like. ``attention`` is None for a plain partial convolution."""

    stage: int
    channels: int
    convolved: int
    attention: Literal["channel", "self"] | None
    drop_path: float

    @property
    def attended(self) -> int:
        """The u channels that are not convolved."""
        return self.channels - self.convolved


@dataclass(frozen=True, slots=True)
class PartialNetConfig:
    """Every knob of the family. Impossible combinations raise ValueError when built."""

    width: int  # channels of stage 1; each later stage doubles them
    depths: tuple[int, int, int, int]
    activation: Literal["gelu", "relu"] = "gelu"
    drop_path: float = 0.0  # of the last block; the first has 0, linear between
    channel_attention: bool = True  # stages 1 to 3
    self_attention: bool = True  # stage 4; off, the stage also has the one-residual block
    spatial_gate: bool = True
    heads: int = 6
    n_div: int | tuple[int, ...] = 4  # r = C // n_div, one number or one per block
    classes: int = 1000
    in_channels: int = 3
    size: tuple[int, int] = (224, 224)  # what it is meant for; other sizes run too
    patch_size: int = 4
    features: int = 1280
    mlp_ratio: int = 2
    dropout: float = 0.1  # inside the self-attention, in training only
    drop_first_residual: bool = False  # the paper's code drops only the second one of stage 4
    dense: bool = False  # return four normalised maps (strides 1, 2, 4, 8 patches), no head

    def __post_init__(self) -> None:
        _check_numbers(self)
        for index, block in enumerate(self.blocks()):
            _check_block(index, block, self)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the four stages."""
        return tuple(self.width * 2**stage for stage in range(4))

    def blocks(self) -> tuple[BlockShape, ...]:
        """The shape of every block, in running order."""
        stages = [stage for stage, depth in enumerate(self.depths) for _ in range(depth)]
        total = len(stages)
        divisors = self.n_div if isinstance(self.n_div, tuple) else (self.n_div,) * total
        if len(divisors) != total:
            raise ValueError(
                f"n_div has {len(divisors)} entries and depths {self.depths} make {total} blocks; "
                "give one entry for each block, or a single number"
            )
        rates = [self.drop_path * index / max(1, total - 1) for index in range(total)]
        return tuple(
            self._block(stage, divisor, rate)
            for stage, divisor, rate in zip(stages, divisors, rates, strict=True)
        )

    def _block(self, stage: int, divisor: int, rate: float) -> BlockShape:
        if divisor < 1:
            raise ValueError(f"n_div must be 1 or more, not {divisor}")
        channels = self.widths[stage]
        kind: Literal["channel", "self"] = "self" if stage == 3 else "channel"
        wanted = self.self_attention if kind == "self" else self.channel_attention
        return BlockShape(stage, channels, channels // divisor, kind if wanted else None, rate)


def _check_numbers(config: PartialNetConfig) -> None:
    for name in ("width", "heads", "classes", "in_channels", "patch_size", "features", "mlp_ratio"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be 1 or more, not {getattr(config, name)}")
    if len(config.depths) != 4 or min(config.depths) < 1:
        raise ValueError(f"depths must be four numbers of 1 or more, not {config.depths}")
    if config.activation not in ("gelu", "relu"):
        raise ValueError(f"activation must be 'gelu' or 'relu', not {config.activation!r}")
    for name in ("drop_path", "dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), not {getattr(config, name)}")
    if config.spatial_gate and config.width < 2:
        raise ValueError("the spatial gate halves the channels; width must be 2 or more, or it off")


def _check_block(index: int, block: BlockShape, config: PartialNetConfig) -> None:
    if block.convolved < 1:
        raise ValueError(
            f"block {index} has {block.channels} channels and its n_div leaves none to convolve; "
            f"use an n_div of at most {block.channels}"
        )
    if block.attention == "self" and block.attended % config.heads:
        raise ValueError(
            f"block {index} attends to {block.attended} channels, which {config.heads} heads "
            "do not divide; change heads, width or n_div"
        )


class PConv(nn.Module):
    """3x3 convolution of the first ``convolved`` channels; the others pass. (B, C, H, W) kept."""

    def __init__(self, channels: int, convolved: int) -> None:
        super().__init__()
        self.sizes = [convolved, channels - convolved]
        self.conv = nn.Conv2d(convolved, convolved, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        head, rest = torch.split(x, self.sizes, dim=1)
        return torch.cat((self.conv(head), rest), dim=1)


class PATConv(nn.Module):
    """As PConv, but ``attention`` maps the other channels. (B, C, H, W) kept."""

    def __init__(self, channels: int, convolved: int, attention: nn.Module) -> None:
        super().__init__()
        self.sizes = [convolved, channels - convolved]
        self.conv = nn.Conv2d(convolved, convolved, 3, padding=1, bias=False)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        head, rest = torch.split(x, self.sizes, dim=1)
        return torch.cat((self.conv(head), self.attention(rest)), dim=1)


class ChannelAttention(nn.Module):
    """PAT_ch: gates each channel by all channels' mean and deviation. (B, u, H, W) kept.

    In training the gate is normalised over the batch alone, so a batch needs two images or more.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(channels, channels, (1, 2), bias=False)
        self.gate_norm = nn.BatchNorm2d(channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape. ValueError for a map of one pixel."""
        if x.shape[2] * x.shape[3] < 2:
            raise ValueError(
                "channel attention takes a deviation over the map, and this map has one pixel; "
                "use a larger image or a smaller patch_size"
            )
        mean = x.mean((2, 3), keepdim=True)
        deviation = x.std((2, 3), keepdim=True)  # unbiased, as trained by the authors
        logit = self.gate_norm(self.gate(torch.cat((mean, deviation), dim=3)))
        gated: Tensor = self.norm(x * F.hardsigmoid(logit))
        return gated


def distance_buckets(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return int64 (N, N): the bucket, 0 to 40, of the distance between two pixels of a map.

    Distances are rounded half to even; up to 20 they are their own bucket, beyond it buckets grow
    with the logarithm. Pixels are in row-major order.
    """
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    rows = (row[:, None] - row).square()[:, None, :, None]
    columns = (column[:, None] - column).square()[:, None, :]
    square = (rows + columns).reshape(height * width, height * width)  # from (H, W, H, W)
    distance = square.to(torch.float32).sqrt().round()
    octaves = (distance.clamp(min=1) / EXACT_DISTANCE).log() / math.log(FARTHEST_RATIO)
    far = (EXACT_DISTANCE * (1 + octaves)).round().clamp(max=TABLE_CENTRE)
    return torch.where(distance <= EXACT_DISTANCE, distance, far).to(torch.int64)


class SelfAttention(nn.Module):
    """PAT_sf: multi-head attention over pixels with a learned bias per distance. (B, u, H, W) kept.

    ``bias_table`` (heads, 81) is added to the logits at column 40 + bucket.
    """

    def __init__(self, channels: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.bias_table = nn.Parameter(torch.zeros(heads, TABLE_COLUMNS))
        self.proj = nn.Linear(channels, channels)
        self.weight_dropout = nn.Dropout(dropout)
        self.output_dropout = nn.Dropout(dropout)

    def position_bias(self, height: int, width: int) -> Tensor:
        """Return (heads, N, N): what is added to the logits on a map of this size."""
        buckets = distance_buckets(height, width, self.bias_table.device)
        return self.bias_table[:, TABLE_CENTRE + buckets]

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        height, width = x.shape[2], x.shape[3]
        tokens = self.norm(x.flatten(2).transpose(1, 2))  # (B, N, u)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = (q * self.scale) @ k.mT + self.position_bias(height, width)  # (B, heads, N, N)
        mixed = self.weight_dropout(logits.softmax(dim=-1)) @ v
        merged = self.output_dropout(self.proj(mixed.transpose(1, 2).flatten(2)))  # (B, N, u)
        image: Tensor = merged.transpose(1, 2).unflatten(2, (height, width))
        return image


class SpatialGate(nn.Module):
    """PAT_sp: gates the first half of the channels by pixel, convolves the second. Shape kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.sizes = [channels - half, half]
        self.logit = nn.Conv2d(channels - half, 1, 1, bias=False)
        self.gated_norm = nn.BatchNorm2d(channels - half)
        self.conv_norm = nn.BatchNorm2d(half)
        self.conv = nn.Conv2d(half, half, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape (B, C, H, W)."""
        gated, plain = torch.split(x, self.sizes, dim=1)
        gated = self.gated_norm(gated * F.hardsigmoid(self.logit(gated)))
        return torch.cat((gated, self.conv(self.conv_norm(plain))), dim=1)


class MLP(nn.Module):
    """Two 1x1 convolutions with a norm and an activation between, then the gate. Shape kept."""

    def __init__(self, channels: int, config: PartialNetConfig) -> None:
        super().__init__()
        hidden = channels * config.mlp_ratio
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.act = activation(config)
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.gate = SpatialGate(channels) if config.spatial_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape (B, C, H, W)."""
        y: Tensor = self.project(self.act(self.norm(self.expand(x))))
        if self.gate is not None:
            y = self.gate(y)
        return y


def activation(config: PartialNetConfig) -> nn.Module:
    """Return the activation the config names; GELU in its exact form."""
    return nn.GELU() if config.activation == "gelu" else nn.ReLU()


class DropPath(nn.Module):
    """Drops whole images of a residual branch in training. Any shape that starts with (B, C)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return x with some images zeroed and the others scaled up; x itself in eval mode."""
        if not self.training or self.rate == 0:
            return x
        kept = 1 - self.rate
        # A slice carries the batch size, which must not become a Python number.
        return x * torch.rand_like(x[:, :1, :1, :1]).lt(kept).to(x.dtype) / kept


class Block(nn.Module):
    """One residual around mixer and MLP: stages 1 to 3, and all of FasterNet. Shape kept."""

    def __init__(self, shape: BlockShape, config: PartialNetConfig) -> None:
        super().__init__()
        self.mixer = mixer(shape, config)
        self.mlp = MLP(shape.channels, config)
        self.drop_path = DropPath(shape.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape (B, C, H, W)."""
        y: Tensor = x + self.drop_path(self.mlp(self.mixer(x)))
        return y


class TwoResidualBlock(nn.Module):
    """A residual around the mixer and one around the MLP: stage 4. Shape kept."""

    def __init__(self, shape: BlockShape, config: PartialNetConfig) -> None:
        super().__init__()
        self.mixer = mixer(shape, config)
        self.mlp = MLP(shape.channels, config)
        self.drop_first = DropPath(shape.drop_path if config.drop_first_residual else 0.0)
        self.drop_path = DropPath(shape.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape (B, C, H, W)."""
        y = x + self.drop_first(self.mixer(x))
        z: Tensor = y + self.drop_path(self.mlp(y))
        return z


def mixer(shape: BlockShape, config: PartialNetConfig) -> PConv | PATConv:
    """Return the partial convolution of a block; without attention if no channel is left for it."""
    if shape.attention is None or shape.attended == 0:
        return PConv(shape.channels, shape.convolved)
    attention: nn.Module
    if shape.attention == "self":
        attention = SelfAttention(shape.attended, config.heads, config.dropout)
    else:
        attention = ChannelAttention(shape.attended)
    return PATConv(shape.channels, shape.convolved, attention)


class Patches(nn.Module):
    """Non-overlapping patches to channels, with a norm: the embedding and the merges.

    (B, source, H, W) becomes (B, target, H // patch, W // patch).
    """

    def __init__(self, source: int, target: int, patch: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(source, target, patch, stride=patch, bias=False)
        self.norm = nn.BatchNorm2d(target)

    def forward(self, x: Tensor) -> Tensor:
        """Return the smaller map."""
        y: Tensor = self.norm(self.conv(x))
        return y


class Head(nn.Module):
    """Mean over the map, one hidden layer, class scores. (B, C, H, W) becomes (B, classes)."""

    def __init__(self, channels: int, config: PartialNetConfig) -> None:
        super().__init__()
        self.features = nn.Conv2d(channels, config.features, 1, bias=False)
        self.act = activation(config)
        self.classifier = nn.Linear(config.features, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores before softmax."""
        pooled = x.mean((2, 3), keepdim=True)
        scores: Tensor = self.classifier(self.act(self.features(pooled)).flatten(1))
        return scores


class PartialNet(nn.Module):
    """The whole network. Images (B, in_channels, H, W) to scores (B, classes).

    With ``config.dense`` it returns four maps, (B, width * 2**i, ...) for i = 0 to 3, instead.
    ValueError where channel attention would see a map of one pixel.
    """

    def __init__(self, config: PartialNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.embed = Patches(config.in_channels, config.width, config.patch_size)
        self.stages = nn.ModuleList(_stage(stage, config) for stage in range(4))
        self.merges = nn.ModuleList(Patches(width, 2 * width, 2) for width in widths[:3])
        self.output_norms = nn.ModuleList(
            nn.BatchNorm2d(width) for width in (widths if config.dense else ())
        )
        self.head = None if config.dense else Head(widths[3], config)
        self.apply(_initialise)

    def blocks(self) -> list[list["Block | TwoResidualBlock"]]:
        """Return the blocks of the four stages, in running order."""
        return [list(cast(nn.Sequential, stage)) for stage in self.stages]  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return scores, or the four maps when ``config.dense``."""
        x: Tensor = self.embed(images)
        outputs = []
        for index, stage in enumerate(self.stages):
            x = stage(x if index == 0 else self.merges[index - 1](x))
            outputs.append(x)
        if self.head is None:
            return tuple(norm(y) for norm, y in zip(self.output_norms, outputs, strict=True))
        scores: Tensor = self.head(x)
        return scores


def _stage(stage: int, config: PartialNetConfig) -> nn.Sequential:
    shapes = [shape for shape in config.blocks() if shape.stage == stage]
    kind = TwoResidualBlock if stage == 3 and config.self_attention else Block
    return nn.Sequential(*(kind(shape, config) for shape in shapes))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        # The bounds of +-2 are absolute, a hundred deviations: nothing is cut off.
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def example_inputs(config: PartialNetConfig, *, batch: int = 1) -> tuple[Tensor]:
    """Return one tensor of standard normal images (batch, in_channels, *size), always the same."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, config.in_channels, *config.size, generator=generator),)


_FAMILY = ("t0", "t1", "t2", "s", "m", "l")
_DROP_PATH = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)


def _family(
    prefix: str,
    suffix: str,
    geometry: Sequence[tuple[int, tuple[int, int, int, int]]],
    base: PartialNetConfig,
) -> dict[str, PartialNetConfig]:
    family = {}
    for name, rate, (width, depths) in zip(_FAMILY, _DROP_PATH, geometry, strict=True):
        kind: Literal["gelu", "relu"] = "gelu" if name in ("t0", "t1") else "relu"
        family[f"{prefix}-{name}{suffix}"] = replace(
            base, width=width, depths=depths, activation=kind, drop_path=rate
        )
    return family


_LARGE = ((64, (2, 2, 6, 4)), (96, (2, 2, 9, 4)), (128, (2, 3, 16, 4)), (160, (2, 3, 20, 4)))
_PAPER = ((32, (1, 2, 6, 4)), (48, (1, 2, 6, 4)), *_LARGE)
_RELEASED = ((32, (1, 2, 8, 2)), (48, (1, 2, 8, 2)), *_LARGE)
_FASTERNET = (
    (40, (1, 2, 8, 2)),
    (64, (1, 2, 8, 2)),
    (96, (1, 2, 8, 2)),
    (128, (1, 2, 13, 2)),
    (144, (3, 4, 18, 3)),
    (192, (3, 4, 18, 3)),
)
_BASE = PartialNetConfig(width=32, depths=(1, 1, 1, 1), heads=4)

# "partialnet-*" follows the published parameter and MAC counts, "-repo" the released settings,
# which differ: no spatial gate except in t1, four heads, other depths for t0 and t1.
VARIANTS: dict[str, PartialNetConfig] = (
    _family("partialnet", "", _PAPER, _BASE)
    | _family("partialnet", "-repo", _RELEASED, replace(_BASE, spatial_gate=False))
    | _family(
        "fasternet",
        "",
        _FASTERNET,
        replace(_BASE, channel_attention=False, self_attention=False, spatial_gate=False),
    )
)
for _name in _FAMILY[1:]:
    VARIANTS[f"partialnet-{_name}"] = replace(VARIANTS[f"partialnet-{_name}"], heads=6)
VARIANTS["partialnet-t1-repo"] = replace(VARIANTS["partialnet-t1-repo"], spatial_gate=True)
VARIANTS["partialnet-nano"] = PartialNetConfig(
    width=16,
    depths=(2, 2, 4, 1),
    heads=4,
    classes=10,
    in_channels=1,
    size=(32, 32),
    patch_size=2,
    features=256,
)

"""Networks that are not ours, on every target: ``check`` refuses nothing, every proof holds.

They are written small, from the ideas that made each kind known, in the plainest PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit.capture import capture, reference_from
from edgekit.program import Program
from edgekit.recipe import FP16, FP32, Recipe
from edgekit.source import resolve


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut, strided, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(16), nn.BatchNorm2d(16)])
        self.first = nn.Conv2d(8, 16, 3, 2, 1, bias=False)
        self.second = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norms[0](self.stem(x)).relu(), 3, 2, 1)
        y = self.norms[2](self.second(self.norms[1](self.first(x)).relu()))
        scores: Tensor = self.head(
            F.adaptive_avg_pool2d((y + self.shortcut(x)).relu(), 1).flatten(1)
        )
        return scores


class Separable(nn.Module):
    """Depthwise and pointwise convolutions with ReLU6, as in MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.Hardswish(),
            nn.Conv2d(8, 12, 1),
            nn.AvgPool2d(2),
        )
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x).mean((2, 3)))
        return scores


class SqueezeExcite(nn.Module):
    """Channels weighted by what a pooled pair of layers says of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return x * gate


class VisionTransformer(nn.Module):
    """Patches, a class token, attention and an MLP, as in ViT."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norms[1](x))
        scores: Tensor = self.head(x[:, 0])
        return scores


class ConvNext(nn.Module):
    """A 7x7 depthwise convolution, channels last, layer scale, as in ConvNeXt."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        added: Tensor = x + y.permute(0, 3, 1, 2)
        return added


class Recurrent(nn.Module):
    """A GRU over the columns of convolutional features, as text recognisers have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, (2, 1), 1)
        self.gru = nn.GRU(32, 10, batch_first=True, bidirectional=True)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.relu(self.conv(x)).flatten(1, 2).transpose(1, 2)
        return F.log_softmax(self.head(self.gru(columns)[0]), -1)


class UNet(nn.Module):
    """Down, up by a transposed convolution and by resizing, joined by shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)])
        self.bottom = nn.Conv2d(16, 16, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.join = nn.Conv2d(24, 8, 3, padding=1)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.leaky_relu(self.down[0](x), 0.1)
        two = F.leaky_relu(self.down[1](F.max_pool2d(one, 2)), 0.1)
        three = F.relu(self.bottom(F.max_pool2d(two, 2)))
        y = F.relu(self.join(torch.cat([self.up(three), two], 1)))
        y = F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False)
        masks: Tensor = self.out(torch.cat([y, one], 1))
        return masks.sigmoid()


class SuperResolution(nn.Module):
    """Features at low resolution, then pixel shuffle, added to the resized picture."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.PReLU(8))
        self.expand = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_shuffle(self.expand(self.body(x)), 2)
        return (y + F.interpolate(x, scale_factor=2.0, mode="nearest")).clamp(-2, 2)


class GroupNormed(nn.Module):
    """Group norm and instance norm, reflected edges."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3)
        self.group = nn.GroupNorm(4, 12)
        self.again = nn.Conv2d(12, 6, 3, padding=1)
        self.instance = nn.InstanceNorm2d(6, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.group(self.conv(F.pad(x, (1, 1, 1, 1), mode="reflect"))))
        return torch.tanh(self.instance(self.again(x)))


class TwoInputs(nn.Module):
    """A picture and a vector that modulates its features, with two results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.condition = nn.Linear(6, 16)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, context: Tensor) -> dict[str, Tensor]:
        scale, shift = self.condition(context)[:, :, None, None].chunk(2, 1)
        features = F.softplus(self.conv(x)) * (1 + scale) + shift
        return {"features": features, "scores": self.head(features.amax((2, 3))).softmax(1)}


class Resampling(nn.Module):
    """Not a network: ops that exporters got wrong, under names that graphs use themselves."""

    def forward(self, relu: Tensor) -> dict[str, Tensor]:
        resized = F.interpolate(relu, scale_factor=1.3, mode="bilinear", align_corners=False)
        return {
            "add": F.pixel_unshuffle(relu, 2) + 1,
            "relu": F.relu(resized),
            "log_softmax": F.log_softmax(100 * relu.mean((2, 3)), 1),
        }


PICTURE = "x=1x3x16x16"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "residual": (Residual, (PICTURE,)),
    "separable": (Separable, (PICTURE,)),
    "squeeze-excite": (SqueezeExcite, (PICTURE,)),
    "vision-transformer": (VisionTransformer, (PICTURE,)),
    "convnext": (ConvNext, (PICTURE,)),
    "recurrent": (Recurrent, (PICTURE,)),
    "u-net": (UNet, (PICTURE,)),
    "super-resolution": (SuperResolution, (PICTURE,)),
    "group-norm": (GroupNormed, (PICTURE,)),
    "two-inputs": (TwoInputs, (PICTURE, "context=1x6")),
    "resampling": (Resampling, ("relu=1x3x10x10",)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Program:
    make, inputs = NETWORKS[request.param]
    torch.manual_seed(0)
    module = make().eval()
    _settle(module)
    model = resolve(module, list(inputs))
    return capture(model, reference_from(model))


def _settle(module: nn.Module) -> None:
    """Norms that have seen something: means of 0 and variances of 1 would hide a dropped one."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)


@pytest.mark.parametrize("recipe", [FP32, FP16], ids=["fp32", "fp16"])
def test_it_is_proven(backend: edgekit.Backend, network: Program, recipe: Recipe) -> None:
    artifact = backend.lower(network, recipe)
    proof = edgekit.verify(backend, artifact, network.reference).require()
    assert proof.level in ("executed", "emulated"), proof.notes


def test_check_refuses_nothing_of_it(backend: edgekit.Backend, network: Program) -> None:
    findings = backend.check(network, FP32)
    assert [finding for finding in findings if finding.effect == "refused"] == []

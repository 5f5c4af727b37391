"""The golden fill of PartialNet's tests, and a counter of multiply-accumulates."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgekit_zoo.partialnet import PartialNet, PartialNetConfig, SelfAttention


def count_macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of convolutions, linear layers and matrix products in one run."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return int(counter.get_total_flops()) // 2


def wave(shape: tuple[int, ...], role: int, base: float, amplitude: float) -> Tensor:
    count = torch.Size(shape).numel()
    position = torch.arange(1, count + 1, dtype=torch.float64)
    return (base + amplitude * torch.sin(0.7 * position + 1.3 * role)).reshape(shape)


def golden_input(*shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(0.11 * torch.arange(1, count + 1, dtype=torch.float64)).reshape(shape)


# The end of a module's name in the state dict, and its role in the golden fill.
ROLES = {
    "embed.conv": 1,
    "embed.norm": 2,
    "merges.#.conv": 6,
    "merges.#.norm": 7,
    "mixer.conv": 11,
    "attention.gate": 12,
    "attention.gate_norm": 13,
    "mixer.attention.norm": 17,
    "mlp.expand": 21,
    "mlp.norm": 22,
    "mlp.project": 26,
    "mlp.gate.logit": 27,
    "mlp.gate.gated_norm": 28,
    "mlp.gate.conv_norm": 32,
    "mlp.gate.conv": 36,
    "qkv": 39,
    "proj": 40,
    "head.features": 43,
    "head.classifier": 44,
}


def fill_golden(model: nn.Module, prefix: str) -> None:
    """Give every tensor of a module whose own name is ``prefix`` the value of its role."""
    for name, module in model.named_modules():
        path = ".".join("#" if part.isdigit() else part for part in f"{prefix}{name}".split("."))
        roles = [role for end, role in ROLES.items() if path == end or path.endswith("." + end)]
        if isinstance(module, SelfAttention):
            module.bias_table.data = wave(tuple(module.bias_table.shape), 42, 0, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            fill_norm(module, roles[0])
        elif isinstance(module, nn.LayerNorm):
            module.weight.data = wave(tuple(module.weight.shape), 37, 1, 0.3)
            module.bias.data = wave(tuple(module.bias.shape), 38, 0, 0.2)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            fill_product(module, roles[0])


def fill_norm(norm: nn.BatchNorm2d, role: int) -> None:
    shape = (norm.num_features,)
    norm.weight.data = wave(shape, role, 1, 0.3)
    norm.bias.data = wave(shape, role + 1, 0, 0.2)
    norm.running_mean = wave(shape, role + 2, 0, 0.2)
    norm.running_var = wave(shape, role + 3, 1, 0.4)


def fill_product(layer: nn.Conv2d | nn.Linear, role: int) -> None:
    shape = tuple(layer.weight.shape)
    layer.weight.data = wave(shape, role, 0, torch.Size(shape[1:]).numel() ** -0.5)
    if layer.bias is not None:
        layer.bias.data = wave(tuple(layer.bias.shape), role + 1, 0, 0.2)


def golden_config(activation: Literal["gelu", "relu"], gate: bool) -> PartialNetConfig:
    return PartialNetConfig(
        width=16,
        depths=(1, 1, 1, 1),
        activation=activation,
        spatial_gate=gate,
        heads=4,
        classes=10,
        size=(64, 64),
    )


def golden_net(activation: Literal["gelu", "relu"], gate: bool) -> PartialNet:
    model = PartialNet(golden_config(activation, gate)).double().eval()
    fill_golden(model, "")
    return model


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # The tensors are tiny: a second thread only waits, and on a busy machine it waits long.
    torch.set_num_threads(1)


@pytest.fixture(name="count_macs")
def _count_macs() -> Callable[[nn.Module, tuple[Tensor, ...]], int]:
    return count_macs


@pytest.fixture(name="fill_golden")
def _fill_golden() -> Callable[[nn.Module, str], None]:
    return fill_golden


@pytest.fixture(name="golden_input")
def _golden_input() -> Callable[..., Tensor]:
    return golden_input


@pytest.fixture(name="golden_net")
def _golden_net() -> Callable[[Literal["gelu", "relu"], bool], PartialNet]:
    return golden_net

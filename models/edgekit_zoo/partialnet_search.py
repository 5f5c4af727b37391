"""Searches how many channels each block of a PartialNet convolves, then freezes the answer.

While searching, every partial convolution is a DPConv: a full kernel, masked to its first r
channels, where r = max(1, C >> z) and a layer chooses z from 0 (all channels) to K (one channel).
The forward pass uses the choice with the highest logit alone; gradients reach all logits, as if
their softmax had been used. So the network that is trained is the network that is frozen.

From the idea of arXiv 2502.01303, not its layer: choices are nested prefixes, so any width works,
no penalty on the order of gates is needed, and the cost counts what the frozen network computes.

    net = search_net(config)
    loss = cross_entropy(net(images), labels) * cost_factor(net)     # train as ever
    config = replace(config, n_div=splits(net))                      # then train this one

B batch   C channels of a layer   K = floor(log2 C)   H, W map size
"""

from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit_zoo.partialnet import PartialNet, PartialNetConfig


class DPConv(nn.Module):
    """3x3 convolution of the first r channels, r being learned; the others pass. Shape kept.

    ``choice`` (K + 1,) are the logits of z. It starts at z = ``start``, a quarter of the channels;
    ``choice.requires_grad_(False)`` holds it there while the rest warms up.
    """

    prefixes: Tensor  # (K + 1, C): row z is 1 in its first r channels

    def __init__(self, channels: int, *, start: int = 2) -> None:
        super().__init__()
        self.sizes = tuple(max(1, channels >> z) for z in range(channels.bit_length()))
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.choice = nn.Parameter(torch.zeros(len(self.sizes)))
        self.choice.data[min(start, len(self.sizes) - 1)] = 0.1
        rows = [torch.arange(channels) < size for size in self.sizes]
        self.register_buffer("prefixes", torch.stack(rows).to(self.weight.dtype))

    @property
    def chosen(self) -> int:
        """The z of the highest logit."""
        return int(self.choice.argmax())

    def shares(self) -> Tensor:
        """Return (K + 1,): 1 at the chosen z and 0 elsewhere, with the gradient of the softmax."""
        soft = self.choice.softmax(0)
        hard = F.one_hot(soft.argmax(), len(soft)).to(soft.dtype)
        return hard + (soft - soft.detach())  # the bracket is exactly zero

    def cost(self) -> Tensor:
        """Return r squared, the number of 3x3 filters, as a scalar with a gradient."""
        squares = self.prefixes.sum(1).square()
        return self.shares() @ squares

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape (B, C, H, W)."""
        mask = self.shares() @ self.prefixes
        kernel = self.weight * torch.outer(mask, mask)[:, :, None, None]
        column = mask[:, None, None]
        return F.conv2d(x, kernel, padding=1) * column + x * (1 - column)


def search_net(config: PartialNetConfig, *, start: int = 2) -> PartialNet:
    """Return a network of this config that learns its splits.

    It has DPConv in place of every mixer and no attention, so stage 4 has the one-residual block.
    ``config.n_div`` is not used.
    """
    plain = replace(config, channel_attention=False, self_attention=False, n_div=1)
    net = PartialNet(plain)
    for block in chain.from_iterable(net.blocks()):
        channels = block.mlp.expand.in_channels
        block.add_module("mixer", DPConv(channels, start=start))
    return net


def layers(net: nn.Module) -> list[DPConv]:
    """Return the searching layers in running order. ValueError if there is none."""
    found = [module for module in net.modules() if isinstance(module, DPConv)]
    if not found:
        raise ValueError("this network has no layer that searches; build it with search_net")
    return found


def splits(net: nn.Module) -> tuple[int, ...]:
    """Return the n_div that each block has chosen so far, for ``PartialNetConfig.n_div``."""
    # C // min(2**z, C) is max(1, C >> z) for every width.
    return tuple(min(2**layer.chosen, len(layer.weight)) for layer in layers(net))


def total_cost(net: nn.Module) -> Tensor:
    """Return the sum of r squared over the layers, a scalar with a gradient."""
    return torch.stack([layer.cost() for layer in layers(net)]).sum()


def target_cost(net: nn.Module, *, division: float = 2.0) -> float:
    """Return the sum of (C / division) squared over the layers."""
    return sum((len(layer.weight) / division) ** 2 for layer in layers(net))


def cost_factor(
    net: nn.Module, *, division: float = 2.0, exponent: float = 0.01, band: float = 0.0
) -> Tensor:
    """Return the scalar to multiply the loss with: (target / cost) ** alpha.

    alpha is -exponent above the target, so that costlier is worse, and 0 at or below it. With a
    ``band``, alpha is +exponent below band * target, so that too cheap is worse, too.
    """
    cost, target = total_cost(net), target_cost(net, division=division)
    alpha = -exponent if cost > target else exponent if cost < band * target else 0.0
    return (target / cost) ** alpha


def freeze(net: PartialNet) -> PartialNet:
    """Return the same function as a static PartialNet with ``splits(net)``; ``net`` stays."""
    searched = layers(net)
    frozen = PartialNet(replace(net.config, n_div=splits(net))).to(searched[0].weight.dtype)
    shared = {name: t for name, t in net.state_dict().items() if ".mixer." not in name}
    frozen.load_state_dict(shared, strict=False)
    for block, layer in zip(chain.from_iterable(frozen.blocks()), searched, strict=True):
        size = layer.sizes[layer.chosen]
        block.mixer.conv.weight.data.copy_(layer.weight[:size, :size])
    return frozen.train(net.training)

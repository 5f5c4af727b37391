"""The split search: prefixes, cost, gradients, and that freezing changes nothing."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit_zoo.partialnet import VARIANTS, PartialNet, PConv
from edgekit_zoo.partialnet_search import (
    DPConv,
    cost_factor,
    freeze,
    layers,
    search_net,
    splits,
    target_cost,
    total_cost,
)

NANO = VARIANTS["partialnet-nano"]


def choose(net: nn.Module, choice: int) -> None:
    for layer in layers(net):
        layer.choice.data.zero_()
        layer.choice.data[min(choice, len(layer.choice) - 1)] = 1


def kronecker_mask(bits: tuple[int, ...]) -> Tensor:
    """The mask of the paper's layer: a product of 2x2 factors, all ones or the identity."""
    mask = torch.ones(1, 1)
    for bit in bits:
        mask = torch.kron(mask, torch.ones(2, 2) if bit else torch.eye(2))
    return mask


def test_prefixes_halve_down_to_one_channel_at_any_width() -> None:
    assert DPConv(16).sizes == (16, 8, 4, 2, 1)
    assert DPConv(13).sizes == (13, 6, 3, 1)
    assert DPConv(1).sizes == (1,)
    prefixes = DPConv(13).prefixes
    assert prefixes.sum(1).tolist() == [13, 6, 3, 1]
    assert all(bool((small <= large).all()) for large, small in pairwise(prefixes))


@pytest.mark.parametrize("choice", range(5))
def test_a_layer_computes_the_partial_convolution_of_its_choice(choice: int) -> None:
    torch.manual_seed(0)
    layer = DPConv(16).double()
    nn.init.normal_(layer.weight)
    choose(layer, choice)
    size = 16 >> choice
    static = PConv(16, size).double()
    static.conv.weight.data = layer.weight.data[:size, :size]
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), static(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zeros", range(5))
def test_a_prefix_kernel_is_the_first_block_of_a_legal_kronecker_mask(zeros: int) -> None:
    mask = kronecker_mask((0,) * zeros + (1,) * (4 - zeros))
    prefix = DPConv(16).prefixes[zeros]
    size = int(prefix.sum())
    assert torch.equal(mask[:size], torch.outer(prefix, prefix)[:size])
    assert mask.count_nonzero() == 16 * 16 // 2**zeros


@pytest.mark.parametrize("bits", [(1, 1, 0, 0), (0, 1, 0, 1)])
def test_an_illegal_mask_of_the_paper_has_no_first_block(bits: tuple[int, ...]) -> None:
    mask = kronecker_mask(bits)
    assert mask.count_nonzero() == 64
    assert mask[:4].count_nonzero() == 16
    prefix = DPConv(16).prefixes[2]
    assert not torch.equal(mask[:4], torch.outer(prefix, prefix)[:4])


def test_the_cost_of_t0_has_the_known_target_and_dense_penalty() -> None:
    config = VARIANTS["partialnet-t0-repo"]
    with torch.device("meta"):
        widths = [len(layer.weight) for layer in layers(search_net(config))]
    assert sum(width**2 for width in widths) == 271_360
    net = nn.ModuleList(DPConv(width) for width in (32, 64, 64, *[128] * 8, 256, 256)).double()
    assert [len(layer.weight) for layer in layers(net)] == widths
    assert target_cost(net) == 67_840
    choose(net, 0)
    assert total_cost(net).item() == 271_360
    assert cost_factor(net).item() == pytest.approx(1.013959, abs=5e-7)


def test_the_cost_is_free_at_the_target_and_below_unless_a_band_says_otherwise() -> None:
    net = nn.ModuleList([DPConv(16), DPConv(16)])
    choose(net, 1)
    assert total_cost(net).item() == target_cost(net) == 128
    assert cost_factor(net).item() == 1
    choose(net, 3)
    assert cost_factor(net).item() == 1
    assert cost_factor(net, band=0.5).item() == pytest.approx(16**0.01)
    assert cost_factor(net, band=1 / 16).item() == 1


def test_gradients_reach_every_logit_as_through_a_softmax() -> None:
    layer = DPConv(8).double()
    torch.autograd.backward(layer.cost())
    assert layer.choice.grad is not None
    found = layer.choice.grad.clone()
    layer.choice.grad = None
    squares = torch.tensor([64.0, 16.0, 4.0, 1.0], dtype=torch.float64)
    torch.autograd.backward(layer.choice.softmax(0) @ squares)
    torch.testing.assert_close(found, layer.choice.grad)


def test_a_search_net_replaces_every_mixer_and_starts_at_a_quarter() -> None:
    net = search_net(NANO)
    assert len(layers(net)) == 9
    assert not [module for module in net.modules() if isinstance(module, PConv)]
    assert splits(net) == (4,) * 9
    assert splits(search_net(NANO, start=0)) == (1,) * 9
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("width", [16, 13])
def test_freezing_keeps_the_function_and_feeds_a_config(width: int) -> None:
    torch.manual_seed(0)
    config = replace(NANO, width=width, heads=1)
    net = search_net(config).double().eval()
    for layer in layers(net):
        nn.init.normal_(layer.weight, std=0.1)
        nn.init.normal_(layer.choice)
    frozen = freeze(net)
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-12, atol=1e-12)
    assert len(set(splits(net))) > 2
    assert frozen.config.n_div == splits(net)
    assert not [module for module in frozen.modules() if isinstance(module, DPConv)]
    final = PartialNet(replace(config, n_div=frozen.config.n_div))
    assert [block.mixer.sizes[0] for stage in final.blocks() for block in stage] == [
        layer.sizes[layer.chosen] for layer in layers(net)
    ]


def test_freezing_keeps_the_mode_and_leaves_the_search_alone() -> None:
    net = search_net(NANO)
    frozen = freeze(net)
    assert frozen.training
    assert splits(net) == (4,) * 9
    assert freeze(net.eval()).training is False
    first = layers(net)[0].weight.clone()
    frozen.state_dict()["stages.0.0.mixer.conv.weight"].zero_()
    assert torch.equal(layers(net)[0].weight, first)


def test_a_net_without_a_search_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer that searches; build it with search_net"):
        freeze(PartialNet(NANO))


def train(layer: DPConv, *, steps: int, with_cost: bool, with_task: bool) -> None:
    """Fit a dense 3x3 convolution, or nothing, with or without the cost."""
    torch.manual_seed(0)
    teacher = torch.randn(8, 8, 3, 3) / 8
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(steps):
        x = torch.randn(16, 8, 6, 6)
        target = F.conv2d(x, teacher, padding=1)
        loss = F.mse_loss(layer(x), target) if with_task else x.new_ones(())
        loss = loss * cost_factor(layer) if with_cost else loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def test_without_a_cost_a_dense_task_opens_every_channel() -> None:
    layer = DPConv(8, start=2)
    train(layer, steps=150, with_cost=False, with_task=True)
    assert layer.chosen == 0


def test_the_cost_alone_moves_a_dense_split_to_the_target_and_no_further() -> None:
    layer = DPConv(8, start=0)
    train(layer, steps=150, with_cost=True, with_task=False)
    assert layer.chosen > 0
    assert layer.cost().item() <= target_cost(layer)
    settled = layer.choice.detach().clone()
    train(layer, steps=20, with_cost=True, with_task=False)
    assert torch.equal(layer.choice, settled)


def test_a_held_choice_stays_while_the_rest_warms_up() -> None:
    layer = DPConv(8, start=2)
    layer.choice.requires_grad_(False)
    before = layer.weight.detach().clone()
    train(layer, steps=3, with_cost=False, with_task=True)
    assert layer.chosen == 2
    assert not torch.equal(layer.weight, before)

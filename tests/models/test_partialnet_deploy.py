"""The deploy forms against the trained form: same numbers, known counts, simple operations."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from edgekit_zoo.partialnet import VARIANTS, PartialNet, PartialNetConfig, SelfAttention
from edgekit_zoo.partialnet_deploy import PixelAttention, deploy, map_sizes
from edgekit_zoo.partialnet_search import search_net

Form = Literal["concat", "two-stream"]
MacCounter = Callable[[nn.Module, tuple[Tensor, ...]], int]

FORMS: tuple[Form, ...] = ("concat", "two-stream")
NANO = VARIANTS["partialnet-nano"]
SPLITS = (1, 2, 4, 8, 4, 16, 4, 4, 2)

CONFIGS = {
    "nano": NANO,
    "without the spatial gate": replace(NANO, spatial_gate=False),
    "fasternet": replace(
        NANO, channel_attention=False, self_attention=False, spatial_gate=False, activation="relu"
    ),
    "self-attention alone": replace(NANO, channel_attention=False),
    "relu": replace(NANO, activation="relu"),
    "a split per block": replace(NANO, n_div=SPLITS),
    "every channel convolved": replace(NANO, n_div=1),
    "odd width": replace(NANO, width=13, heads=1, classes=3, in_channels=2),
    "dense": replace(NANO, dense=True, n_div=SPLITS),
}

T0_EXTRA = replace(VARIANTS["partialnet-t0"], depths=(1, 2, 8, 2))
COUNTS: list[tuple[str | PartialNetConfig, Form, int, int]] = [
    ("partialnet-t0-repo", "concat", 3_479_360, 232_612_736),
    ("partialnet-t1-repo", "concat", 5_984_593, 517_816_736),
    ("partialnet-t2-repo", "concat", 12_256_840, 1_032_587_264),
    ("partialnet-s-repo", "concat", 27_989_592, 2_704_557_824),
    ("partialnet-m-repo", "concat", 59_131_496, 6_672_846_848),
    ("partialnet-l-repo", "concat", 100_571_400, 11_881_544_960),
    ("partialnet-t0", "concat", 4_194_621, 249_673_344),
    ("partialnet-t1", "concat", 7_578_481, 552_938_528),
    ("partialnet-t2", "concat", 12_270_742, 1_034_594_304),
    ("partialnet-s", "concat", 28_014_473, 2_708_019_968),
    ("partialnet-m", "concat", 59_178_113, 6_679_269_376),
    ("partialnet-l", "concat", 100_638_629, 11_890_576_640),
    ("partialnet-t0-repo", "two-stream", 3_479_744, 232_650_368),
    (T0_EXTRA, "concat", 3_485_309, 233_465_728),
    (T0_EXTRA, "two-stream", 3_484_832, 233_503_360),
    (replace(VARIANTS["partialnet-t1-repo"], spatial_gate=False), "concat", 5_975_676, 516_537_248),
]


def trained(config: PartialNetConfig, seed: int = 0) -> PartialNet:
    """A float64 model in eval mode whose norms and tables are far from their start."""
    torch.manual_seed(seed)
    model = PartialNet(config).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features).double() * 0.3
            module.running_var = torch.rand(module.num_features).double() * 1.5 + 0.5
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, SelfAttention):
            nn.init.normal_(module.bias_table)
            nn.init.normal_(module.proj.bias)
    return model


def images(config: PartialNetConfig, batch: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, config.in_channels, *size, generator=generator, dtype=torch.float64)


def assert_same(found: Any, expected: Any) -> None:
    """Equal to 1e-12 of the largest value, for one tensor or several."""
    if isinstance(expected, Tensor):
        found, expected = (found,), (expected,)
    for y, z in zip(found, expected, strict=True):
        torch.testing.assert_close(y, z, rtol=0, atol=1e-12 * z.abs().max().item())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_deploy_form_computes_what_the_trained_form_does(name: str, form: Form) -> None:
    config, size = CONFIGS[name], (32, 48)
    model, x = trained(config), images(CONFIGS[name], 2, size)
    with torch.no_grad():
        assert_same(deploy(model, form=form, size=size)(x), model(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_deploy_form_keeps_the_golden_nets(
    activation: str,
    gate: bool,
    form: Form,
    golden_net: Callable[[str, bool], PartialNet],
    golden_input: Callable[..., Tensor],
) -> None:
    model, x = golden_net(activation, gate), golden_input(2, 3, 64, 64)
    with torch.no_grad():
        assert_same(deploy(model, form=form, size=(64, 64))(x), model(x))


@pytest.mark.parametrize("form", FORMS)
def test_norms_that_have_shrunk_to_zero_fold_too(form: Form) -> None:
    model, x = trained(NANO), images(NANO, 2, (32, 32))
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.weight.data[::2] = 0
    with torch.no_grad():
        assert_same(deploy(model, form=form, size=(32, 32))(x), model(x))


@pytest.mark.parametrize(("variant", "form", "parameters", "macs"), COUNTS)
def test_a_deploy_form_has_the_known_parameters_and_macs(
    variant: str | PartialNetConfig, form: Form, parameters: int, macs: int, count_macs: MacCounter
) -> None:
    config = VARIANTS[variant] if isinstance(variant, str) else variant
    with torch.device("meta"):
        net = deploy(PartialNet(config), form=form, size=(224, 224))
        assert count_macs(net, (torch.empty(1, 3, 224, 224),)) == macs
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


@pytest.mark.parametrize("form", FORMS)
def test_one_export_serves_every_batch_and_a_second_export_works(form: Form) -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    for seed in range(2):
        model = trained(NANO, seed)
        net = deploy(model, form=form, size=(32, 32))
        program = torch.export.export(net, (images(NANO, 2, (32, 32)),), dynamic_shapes=(batch,))
        for size in (1, 2, 7):
            x = images(NANO, size, (32, 32))
            with torch.no_grad():
                assert_same(program.module()(x), model(x))


def operations(net: nn.Module, config: PartialNetConfig) -> set[str]:
    x = images(config, 1, config.size)
    graph = torch.export.export(net, (x,)).graph
    return {str(node.target).split(".")[1] for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("form", FORMS)
def test_no_norm_no_split_and_no_index_arithmetic_is_left(form: Form) -> None:
    found = operations(deploy(trained(NANO), form=form, size=NANO.size), NANO)
    assert "conv2d" in found
    for gone in ("batch_norm", "split", "std", "var", "arange", "index", "matmul", "expand"):
        assert not [name for name in found if gone in name], gone


def test_two_stream_never_slices_and_has_no_layer_norm() -> None:
    found = operations(deploy(trained(NANO), form="two-stream", size=NANO.size), NANO)
    assert not [name for name in found if "slice" in name or "layer_norm" in name]


def test_the_position_bias_is_a_constant_of_the_resolution() -> None:
    model = trained(NANO)
    net = deploy(model, form="two-stream", size=(32, 48))
    (attention,) = [module for module in net.modules() if isinstance(module, PixelAttention)]
    table = model.state_dict()["stages.3.0.mixer.attention.bias_table"]
    assert attention.bias.shape == (1, 4, 6, 6)
    assert torch.equal(attention.bias, attention.bias.mT)
    assert torch.equal(attention.bias[0, :, 3, 3], table[:, 40])


@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_neither_changed_nor_shared(form: Form) -> None:
    model, x = trained(NANO).train(), images(NANO, 2, (32, 32))
    before = copy.deepcopy(model.state_dict())
    net = deploy(model, form=form, size=(32, 32))
    expected = net(x)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for value in model.state_dict().values():
        value.zero_()
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    net = deploy(PartialNet(NANO).to(dtype), form="concat", size=(32, 32))
    assert {value.dtype for value in net.state_dict().values()} == {dtype}
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_folding_is_rounded_once_whatever_the_dtype() -> None:
    model = trained(NANO).float()
    exact = deploy(copy.deepcopy(model).double(), form="concat", size=(32, 32)).float()
    found = deploy(model, form="concat", size=(32, 32)).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in exact.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_keeps_a_larger_one_alive(form: Form) -> None:
    for value in deploy(trained(NANO), form=form, size=(32, 32)).state_dict().values():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_float32_stays_close_to_the_trained_form() -> None:
    model, x = trained(NANO).float(), images(NANO, 4, (32, 32)).float()
    for form in FORMS:
        found = deploy(model, form=form, size=(32, 32))(x)
        torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)


def test_stage_maps_shrink_as_the_network_does() -> None:
    assert map_sizes(VARIANTS["partialnet-t0"], (224, 229)) == [
        (56, 57),
        (28, 28),
        (14, 14),
        (7, 7),
    ]


def test_an_unknown_form_is_refused() -> None:
    form: Any = "fused"
    with pytest.raises(ValueError, match="form must be 'concat' or 'two-stream', not 'fused'"):
        deploy(PartialNet(NANO), form=form, size=(32, 32))


def test_a_size_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images of \(32, 15\) vanish before stage 4; use at lea"):
        deploy(PartialNet(NANO), form="concat", size=(32, 15))


def test_a_diverged_training_is_refused_by_the_name_of_its_tensor() -> None:
    model = PartialNet(NANO)
    model.state_dict()["merges.1.norm.running_var"][3] = float("inf")
    with pytest.raises(ValueError, match=r"merges\.1\.norm\.running_var holds values that are not"):
        deploy(model, form="concat", size=(32, 32))


def test_a_network_that_still_searches_is_refused() -> None:
    with pytest.raises(ValueError, match="still searches for its splits; freeze it first"):
        deploy(search_net(NANO), form="concat", size=(32, 32))


@pytest.mark.parametrize("form", FORMS)
def test_images_of_another_size_are_refused(form: Form) -> None:
    net = deploy(trained(NANO), form=form, size=(32, 32))
    with pytest.raises(ValueError, match=r"deployed for images of \(32, 32\) and got \(32, 48\)"):
        net(images(NANO, 1, (32, 48)))


@pytest.mark.filterwarnings("ignore")  # the runtime's own imports warn
@pytest.mark.parametrize("free_batch", [False, True])
def test_two_stream_lowers_to_a_single_xnnpack_delegate(free_batch: bool) -> None:
    exir = pytest.importorskip("executorch.exir")
    xnnpack = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    config = replace(NANO, depths=(1, 1, 1, 1), n_div=(4, 4, 4, 4))
    net = deploy(trained(config).float(), form="two-stream", size=(32, 32))
    batch = ({0: torch.export.Dim("batch", min=1, max=8)},) if free_batch else None
    x = images(config, 2, (32, 32)).float()
    program = torch.export.export(net, (x,), dynamic_shapes=batch)
    edge = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
    calls = [
        str(node.target)
        for node in edge.exported_program().graph_module.graph.nodes
        if node.op == "call_function" and "getitem" not in str(node.target)
    ]
    assert calls == ["executorch_call_delegate"]

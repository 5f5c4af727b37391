"""PartialNet against published counts, closed forms and golden values, and what it refuses.

One file because most of it is tables: the numbers of every variant, to be read side by side.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgekit_zoo import partialnet
from edgekit_zoo.fashion_mnist import prepare
from edgekit_zoo.partialnet import (
    MLP,
    VARIANTS,
    Block,
    BlockShape,
    ChannelAttention,
    PartialNet,
    PartialNetConfig,
    PATConv,
    PConv,
    SelfAttention,
    SpatialGate,
    TwoResidualBlock,
    distance_buckets,
    example_inputs,
    mixer,
)

T0_EXTRA = replace(VARIANTS["partialnet-t0"], depths=(1, 2, 8, 2))
T1_EXTRA = replace(VARIANTS["partialnet-t1-repo"], spatial_gate=False)

COUNTS = {
    "partialnet-t0-repo": (3_486_160, 232_612_736),
    "partialnet-t1-repo": (6_144_552, 540_339_488),
    "partialnet-t2-repo": (12_269_816, 1_032_587_264),
    "partialnet-s-repo": (28_013_304, 2_704_557_824),
    "partialnet-m-repo": (59_179_000, 6_672_846_848),
    "partialnet-l-repo": (100_641_336, 11_881_544_960),
    "partialnet-t0": (4_292_072, 259_507_840),
    "partialnet-t1": (7_793_976, 575_517_728),
    "partialnet-t2": (12_651_072, 1_078_046_720),
    "partialnet-s": (28_976_352, 2_828_254_208),
    "partialnet-m": (61_367_424, 6_995_578_880),
    "partialnet-l": (104_465_984, 12_465_844_480),
    "fasternet-t0": (3_905_500, 335_422_720),
    "fasternet-t1": (7_595_368, 850_511_872),
    "fasternet-t2": (14_982_888, 1_904_334_848),
    "fasternet-s": (31_181_032, 4_549_740_544),
    "fasternet-m": (53_521_464, 8_721_938_432),
    "fasternet-l": (93_465_192, 15_494_383_616),
}
EXTRA_COUNTS = [
    (T0_EXTRA, 3_558_240, 243_262_592),
    (T1_EXTRA, 5_985_552, 516_537_248),
    (replace(VARIANTS["partialnet-t0"], spatial_gate=False), 4_194_776, 248_870_528),
    (replace(VARIANTS["partialnet-t1"], spatial_gate=False, heads=4), 7_578_072, 551_734_304),
]
FOUR_HEADS = {"t1": 7_793_328, "t2": 12_650_424, "s": 28_975_704, "m": 61_366_776, "l": 104_465_336}

GOLDEN_NET = {
    # activation, spatial gate: parameters, sum, sum of magnitudes, first four, last
    ("gelu", False): (
        365_006,
        (0.1925426125, 2.4878550963),
        (0.0809879946, -0.0233836508, -0.1738405635, -0.1926006669, 0.0971579938),
    ),
    ("gelu", True): (
        371_046,
        (0.1937170987, 2.4896446379),
        (0.0762845122, -0.0164206442, -0.1802561912, -0.1893186635, 0.0989501516),
    ),
    ("relu", False): (
        365_006,
        (0.1941613086, 2.4912469774),
        (0.0829931990, -0.0193446409, -0.1822955960, -0.1831379750, 0.0911400557),
    ),
    ("relu", True): (
        371_046,
        (0.1962317385, 2.4945952055),
        (0.0764766025, -0.0082318560, -0.1935248223, -0.1763189939, 0.0925242779),
    ),
}


MacCounter = Callable[[nn.Module, tuple[Tensor, ...]], int]
Fill = Callable[[nn.Module, str], None]


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(config: PartialNetConfig) -> tuple[PartialNet, tuple[Tensor]]:
    with torch.device("meta"):
        model = PartialNet(config).eval()
        return model, (torch.empty(1, config.in_channels, *config.size),)


def block_config(*, gate: bool) -> PartialNetConfig:
    return PartialNetConfig(width=8, depths=(1, 1, 1, 1), heads=4, spatial_gate=gate)


def first_block(*, gate: bool) -> Block:
    return Block(BlockShape(0, 8, 2, "channel", 0.0), block_config(gate=gate))


def last_block(*, gate: bool) -> TwoResidualBlock:
    return TwoResidualBlock(BlockShape(3, 16, 4, "self", 0.0), block_config(gate=gate))


def channel_mixer(channels: int, heads: int = 4) -> nn.Module:
    shape = BlockShape(0, channels, channels // 4, "channel", 0.0)
    return mixer(shape, replace(block_config(gate=False), heads=heads))


def self_mixer(channels: int, heads: int = 4) -> nn.Module:
    shape = BlockShape(3, channels, channels // 4, "self", 0.0)
    return mixer(shape, PartialNetConfig(width=32, depths=(1, 1, 1, 1), heads=heads))


GOLDEN_MODULES: dict[
    str, tuple[Callable[[], nn.Module], str, tuple[int, ...], tuple[float, ...], tuple[float, ...]]
] = {
    "channel attention": (
        lambda: channel_mixer(8),
        "mixer.",
        (2, 8, 5, 5),
        (3.3108161999, 118.2538814516),
        (0.0372290322, -0.0366314432, -0.0502135720, -0.0631887289, 0.3284474370),
    ),
    "self attention": (
        lambda: self_mixer(16),
        "mixer.",
        (2, 16, 3, 4),
        (-11.5042733942, 50.9203112377),
        (-0.0127431087, -0.1190911071, -0.1311404466, -0.1341113978, -0.1599240327),
    ),
    "spatial gate": (
        lambda: SpatialGate(8),
        "mlp.gate.",
        (2, 8, 5, 5),
        (36.7704778858, 134.4266204823),
        (0.0209031990, 0.0674145721, 0.1118890385, 0.1538231733, 0.1974022860),
    ),
    "block of stage 1": (
        lambda: first_block(gate=False),
        "",
        (2, 8, 4, 4),
        (23.4147348852, 152.6647670718),
        (-0.0606806968, 0.1408393095, 0.2584890781, 0.4943234704, 0.1915212735),
    ),
    "block of stage 1, gated": (
        lambda: first_block(gate=True),
        "",
        (2, 8, 4, 4),
        (40.8483381390, 159.6721914870),
        (0.0054540015, 0.1567267596, 0.2679754050, 0.4283277895, 0.4376786898),
    ),
    "block of stage 4": (
        lambda: last_block(gate=False),
        "",
        (2, 16, 4, 4),
        (-17.4794328716, 339.3646673740),
        (0.4442647061, 0.5936338943, 0.7030972698, 0.7717918140, -0.5077636316),
    ),
    "block of stage 4, gated": (
        lambda: last_block(gate=True),
        "",
        (2, 16, 4, 4),
        (-12.3421731785, 335.0139306048),
        (0.2468522963, 0.3914112926, 0.4991173651, 0.5691648941, -0.0324809968),
    ),
}


def assert_golden(y: Tensor, sums: tuple[float, ...], spots: tuple[float, ...]) -> None:
    flat = y.detach().flatten()
    found = torch.stack([flat.sum(), flat.abs().sum(), *flat[:4], flat[-1]])
    expected = torch.tensor([*sums, *spots], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-10)


@pytest.mark.parametrize("name", COUNTS)
def test_a_variant_has_the_published_parameters_and_macs(name: str, count_macs: MacCounter) -> None:
    model, inputs = on_meta(VARIANTS[name])
    assert (count_parameters(model), count_macs(model, inputs)) == COUNTS[name]


@pytest.mark.parametrize(("config", "parameters", "macs"), EXTRA_COUNTS)
def test_other_settings_have_the_known_counts(
    config: PartialNetConfig, parameters: int, macs: int, count_macs: MacCounter
) -> None:
    model, inputs = on_meta(config)
    assert (count_parameters(model), count_macs(model, inputs)) == (parameters, macs)


@pytest.mark.parametrize("name", FOUR_HEADS)
def test_heads_change_only_the_distance_tables(name: str) -> None:
    model, _ = on_meta(replace(VARIANTS[f"partialnet-{name}"], heads=4))
    assert count_parameters(model) == FOUR_HEADS[name]


def test_nano_stays_small() -> None:
    model, inputs = on_meta(VARIANTS["partialnet-nano"])
    assert count_parameters(model) < 400_000
    assert model(*inputs).shape == (1, 10)


@pytest.mark.parametrize(
    ("channels", "parameters"),
    [(32, 1824), (48, 4032), (64, 7104), (96, 15840), (128, 28032), (160, 43680)],
)
def test_channel_attention_costs_its_closed_form(
    channels: int, parameters: int, count_macs: MacCounter
) -> None:
    model = channel_mixer(channels)
    r, u = channels // 4, channels - channels // 4
    assert count_parameters(model) == parameters == 9 * r * r + 2 * u * u + 4 * u
    macs = count_macs(model.eval(), (torch.zeros(1, channels, 6, 5),))
    assert macs == 9 * r * r * 30 + 2 * u * u


@pytest.mark.parametrize(
    ("channels", "heads", "parameters"),
    [
        (256, 4, 185220),
        (256, 6, 185382),
        (384, 6, 416070),
        (512, 6, 738918),
        (768, 6, 1661094),
        (1024, 6, 2951910),
        (1280, 6, 4611366),
    ],
)
def test_self_attention_costs_its_closed_form(
    channels: int, heads: int, parameters: int, count_macs: MacCounter
) -> None:
    with torch.device("meta"):
        model = self_mixer(channels, heads).eval()
        macs = count_macs(model, (torch.empty(1, channels, 7, 7),))
    r, u = channels // 4, channels - channels // 4
    assert count_parameters(model) == parameters
    assert macs == 9 * r * r * 49 + 4 * u * u * 49 + 2 * u * 49**2


@pytest.mark.parametrize(
    ("channels", "parameters"), [(32, 336), (64, 1184), (128, 4416), (256, 17024)]
)
def test_the_spatial_gate_costs_its_closed_form(
    channels: int, parameters: int, count_macs: MacCounter
) -> None:
    model, h = SpatialGate(channels).eval(), channels // 2
    assert count_parameters(model) == parameters == h * h + 5 * h
    assert count_macs(model, (torch.zeros(1, channels, 3, 3),)) == (h * h + h) * 9


def test_the_rest_costs_its_closed_form() -> None:
    model, _ = on_meta(VARIANTS["partialnet-t0-repo"])
    assert count_parameters(model.embed) == 48 * 32 + 2 * 32
    assert count_parameters(model.merges[1]) == 8 * 64**2 + 4 * 64
    assert count_parameters(model.head or model) == 1280 * 256 + 1280 * 1000 + 1000
    assert count_parameters(MLP(32, VARIANTS["partialnet-t0-repo"])) == 4 * 32**2 + 4 * 32
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 39


@pytest.mark.parametrize("case", GOLDEN_MODULES)
def test_a_module_gives_its_golden_values(
    case: str, fill_golden: Fill, golden_input: Callable[..., Tensor]
) -> None:
    build, prefix, shape, sums, spots = GOLDEN_MODULES[case]
    model = build().double().eval()
    fill_golden(model, prefix)
    assert_golden(model(golden_input(*shape)), sums, spots)


@pytest.mark.parametrize(("activation", "gate"), GOLDEN_NET)
def test_the_net_gives_its_golden_values(
    activation: str,
    gate: bool,
    golden_net: Callable[[str, bool], PartialNet],
    golden_input: Callable[..., Tensor],
) -> None:
    parameters, sums, spots = GOLDEN_NET[activation, gate]
    model = golden_net(activation, gate)
    assert count_parameters(model) == parameters
    assert_golden(model(golden_input(2, 3, 64, 64)), sums, spots)


def test_all_families_have_the_geometry_of_their_tables() -> None:
    assert len(VARIANTS) == 19
    assert VARIANTS["partialnet-t1"].heads == 6
    assert VARIANTS["partialnet-t0"].heads == VARIANTS["partialnet-l-repo"].heads == 4
    assert [name for name, config in VARIANTS.items() if config.activation == "relu"] == [
        f"{family}-{size}{suffix}"
        for family, suffix in (("partialnet", ""), ("partialnet", "-repo"), ("fasternet", ""))
        for size in ("t2", "s", "m", "l")
    ]


def test_the_position_bias_depends_on_distance_alone() -> None:
    model = SelfAttention(12, 4)
    nn.init.normal_(model.bias_table)
    bias = model.position_bias(5, 7).detach()
    assert torch.equal(bias, bias.mT)
    assert torch.equal(bias.diagonal(dim1=1, dim2=2), model.bias_table[:, 40:41].expand(4, 35))
    assert torch.equal(bias[:, 0, 1], bias[:, 0, 7])  # one step right, one step down
    assert torch.equal(bias[:, 0, 3 * 7 + 4], bias[:, 0, 5])  # 3, 4, 5
    assert not torch.equal(bias[:, 0, 1], bias[:, 0, 2])


def test_far_buckets_follow_the_logarithm_and_stop_at_forty() -> None:
    first = distance_buckets(1, 400)[0]
    assert first[:21].tolist() == list(range(21))
    assert first[21:24].tolist() == [20, 21, 21]
    assert first[[40, 80, 160, 399]].tolist() == [27, 33, 40, 40]


def test_a_map_of_seven_by_seven_reads_buckets_zero_to_eight() -> None:
    assert set(distance_buckets(7, 7).flatten().tolist()) == set(range(9))


@pytest.mark.parametrize("gate", [False, True])
def test_odd_widths_classes_and_sizes_run(gate: bool) -> None:
    config = PartialNetConfig(
        width=13, depths=(1, 1, 1, 1), heads=1, classes=3, in_channels=2, spatial_gate=gate
    )
    model = PartialNet(config).eval()
    assert model(torch.randn(2, 2, 75, 101)).shape == (2, 3)


def test_dense_mode_returns_four_normalised_maps_and_has_no_head() -> None:
    config = replace(VARIANTS["partialnet-t0"], dense=True)
    model = PartialNet(config).eval()
    maps = model(torch.randn(1, 3, 64, 96))
    assert [tuple(y.shape) for y in maps] == [
        (1, 32, 16, 24),
        (1, 64, 8, 12),
        (1, 128, 4, 6),
        (1, 256, 2, 3),
    ]
    model.state_dict()["output_norms.2.weight"].zero_()
    assert not model(torch.randn(1, 3, 64, 96))[2].any()
    assert not [name for name in model.state_dict() if name.startswith("head")]


def test_each_block_can_have_its_own_split() -> None:
    config = replace(VARIANTS["partialnet-nano"], n_div=(1, 2, 4, 8, 4, 16, 4, 4, 2))
    blocks = [block for stage in PartialNet(config).blocks() for block in stage]
    sizes = [block.mixer.sizes for block in blocks]
    assert sizes[:3] == [[16, 0], [8, 8], [8, 24]]
    assert sizes[-1] == [64, 64]
    assert isinstance(blocks[0].mixer, PConv)


def test_a_convolution_sees_the_first_channels_and_the_attention_the_others() -> None:
    class Negative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    model, x = PATConv(6, 2, Negative()), torch.randn(1, 6, 3, 3)
    assert torch.equal(model(x)[:, 2:], -x[:, 2:])
    assert torch.equal(model(x)[:, :2], model.conv(x[:, :2]))


def test_drop_path_zeroes_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    config = replace(VARIANTS["partialnet-nano"], drop_path=0.5)
    drop = PartialNet(config).blocks()[3][0].drop_path
    kept = drop(torch.ones(4000, 2, 1, 1))
    assert set(kept.flatten().tolist()) == {0, 2}
    assert torch.equal(kept[:, 0], kept[:, 1])
    assert abs(kept.mean().item() - 1) < 0.05
    assert torch.equal(drop.eval()(torch.ones(3, 2, 1, 1)), torch.ones(3, 2, 1, 1))


def first_drop(config: PartialNetConfig) -> float:
    block = PartialNet(config).blocks()[3][0]
    assert isinstance(block, TwoResidualBlock)
    return block.drop_first.rate


def test_the_first_residual_of_stage_four_drops_only_when_asked() -> None:
    config = replace(VARIANTS["partialnet-nano"], drop_path=0.3)
    assert first_drop(config) == 0
    assert first_drop(replace(config, drop_first_residual=True)) == pytest.approx(0.3)


def test_weights_start_as_the_paper_says() -> None:
    torch.manual_seed(0)
    model = PartialNet(VARIANTS["partialnet-t0"])
    assert model.head is not None
    assert model.head.features.weight.std().item() == pytest.approx(0.02, rel=0.02)
    state = model.state_dict()
    assert not state["stages.3.0.mixer.attention.bias_table"].any()
    assert not state["stages.3.0.mixer.attention.proj.bias"].any()


def test_a_training_step_reaches_every_parameter_that_can_be_read() -> None:
    torch.manual_seed(0)
    model = PartialNet(VARIANTS["partialnet-nano"])
    model(torch.randn(4, 1, 32, 32)).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_one_pixel_maps_are_refused_where_a_deviation_is_needed() -> None:
    with pytest.raises(ValueError, match="this map has one pixel; use a larger image"):
        ChannelAttention(4)(torch.zeros(2, 4, 1, 1))


REFUSED = [
    ({"heads": 5}, "block 8 attends to 96 channels, which 5 heads do not divide"),
    ({"n_div": (4, 4)}, r"n_div has 2 entries and depths \(2, 2, 4, 1\) make 9 blocks"),
    ({"n_div": 17}, "block 0 has 16 channels and its n_div leaves none to convolve"),
    ({"n_div": 0}, "n_div must be 1 or more, not 0"),
    ({"width": 0}, "width must be 1 or more, not 0"),
    ({"depths": (1, 2, 3)}, "depths must be four numbers"),
    ({"activation": "tanh"}, "activation must be 'gelu' or 'relu', not 'tanh'"),
    ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), not 1.0"),
    ({"width": 1, "n_div": 1}, "the spatial gate halves the channels"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED)
def test_an_impossible_config_is_refused_with_a_sentence(
    change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(VARIANTS["partialnet-nano"], **change)


def test_example_inputs_fit_the_config_and_never_change() -> None:
    config = VARIANTS["partialnet-nano"]
    (images,) = example_inputs(config, batch=3)
    assert images.shape == (3, 1, 32, 32)
    assert torch.equal(images, example_inputs(config, batch=3)[0])


def test_two_instances_export_one_after_the_other_with_any_batch() -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    for seed in range(2):
        torch.manual_seed(seed)
        model = PartialNet(VARIANTS["partialnet-nano"]).eval()
        inputs = example_inputs(model.config, batch=2)
        program = torch.export.export(model, inputs, dynamic_shapes=(batch,)).module()
        for size in (1, 2, 7):
            x = torch.randn(size, 1, 32, 32)
            torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_shipped_weights_fit_nano_and_know_their_samples() -> None:
    folder = Path(partialnet.__file__).parent / "weights"
    model = PartialNet(VARIANTS["partialnet-nano"]).eval()
    model.load_state_dict(load_file(folder / "partialnet_nano.safetensors"))
    with np.load(folder / "samples.npz", allow_pickle=False) as samples, torch.no_grad():
        found = model(torch.from_numpy(prepare(samples["images"]))).argmax(1).numpy()
        assert set(samples["labels"]) == set(range(10))
        assert (found == samples["labels"]).sum() >= 31


def test_a_fixed_batch_exports_too() -> None:
    model = PartialNet(VARIANTS["partialnet-nano"]).eval()
    (x,) = example_inputs(model.config)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))

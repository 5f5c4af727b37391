"""A Hugging Face folder is the model that transformers runs, or a sentence about what it is not."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from edgekit.chat import render
from edgekit.errors import BadModel, DamagedFile, EdgekitError, UnknownName
from edgekit.testing import tiny_decoder
from edgekit.tokenizer import Tokenizer
from edgekit_zoo import ZOO
from edgekit_zoo.hugging_face import published_name, spec_from_config, weights_from_folder
from edgekit_zoo.llama import llama_from_weights
from edgekit_zoo.rope import frequencies

SIZES = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"rms_norm_eps": 1e-5},
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 64},
}


def tokenizer() -> str:
    spelled = ["<end>", "<begin>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Library(models.BPE({text: id for id, text in enumerate(spelled)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, normalized=False) for text in spelled[:2]])
    text: str = made.to_str()
    return text


def write(folder: Path, **config: Any) -> Path:
    """A folder of random weights; ``config`` changes its config.json."""
    decoder = tiny_decoder(vocabulary=300)
    folder.mkdir(exist_ok=True)
    put(folder, "config.json", {**LLAMA, **SIZES, "eos_token_id": 0, **config})
    put(
        folder, "tokenizer_config.json", {"eos_token": "<end>", "bos_token": {"content": "<begin>"}}
    )
    (folder / "tokenizer.json").write_text(tokenizer())
    state = {published_name(name): decoder.floats(name) for name in decoder.spec.shapes()}
    save_file(state, folder / "model.safetensors")
    return folder


def put(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": True}),
    ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "head_dim": 24}),
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen3", {"head_dim": 32}),
]


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_logits_are_those_of_transformers(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    torch.manual_seed(0)
    own = copy.deepcopy(config)  # it writes into what it is given
    asked = getattr(transformers, f"{family}Config")(**SIZES, initializer_range=0.3, **own)
    theirs = getattr(transformers, f"{family}ForCausalLM")(asked).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 1:  # norms are all 1 and biases all 0, where a slip would not show
            parameter.data = 0.3 * torch.randn_like(parameter) + name.endswith("norm.weight")
    theirs.save_pretrained(tmp_path)
    spec = spec_from_config(tmp_path / "config.json")
    ours = llama_from_weights(spec, weights_from_folder(tmp_path, spec))
    tokens = torch.randint(0, 300, (1, 200))
    with torch.no_grad():
        expected, cache = theirs(tokens).logits, []  # type: ignore[var-annotated]
        found = torch.cat([ours(part, cache) for part in torch.split(tokens, [150, 1, 49], 1)], 1)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 1000.0, "rope_scaling": LLAMA3},
        {"rope_theta": 1000.0, "rope_scaling": {**LLAMA3, "rope_type": None, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 1000.0}},
    ],
)
def test_positions_are_read_in_the_spelling_of_transformers_4_and_5(
    config: dict[str, Any], tmp_path: Path
) -> None:
    if "rope_scaling" in config:
        config["rope_scaling"] = {k: v for k, v in config["rope_scaling"].items() if v is not None}
    spec = spec_from_config(write(tmp_path / "a", **config) / "config.json")
    assert spec.rope == frequencies(16, 1000.0, LLAMA3)
    assert spec.rope != frequencies(16, 1000.0, {})


def test_a_folder_is_a_whole_language_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "small")
    put(folder, "generation_config.json", {"eos_token_id": [5, 1]})
    (folder / "chat_template.jinja").write_text("{{ bos_token + messages[0].content }}")
    (folder / "README.md").write_text("# A small model\n")
    model = ZOO.load_language(folder)
    assert (model.name, model.stops, model.card) == ("small", (0, 1, 5), "# A small model\n")
    assert render(model.template, [{"role": "user", "content": "Hi"}]) == "<begin>Hi"
    tokens = Tokenizer(model.tokenizer).encode("Hi 🌊")
    assert model.module(torch.tensor([tokens]), []).shape == (1, len(tokens), 300)


def test_a_template_among_several_is_the_default_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    several = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    put(folder, "tokenizer_config.json", {"chat_template": several})
    assert ZOO.load_language(folder).template == "yes"
    put(folder, "tokenizer_config.json", {"chat_template": "alone"})
    assert ZOO.load_language(folder).template == "alone"


def test_weights_in_several_files_are_one_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    state = load_file(folder / "model.safetensors")
    whole = ZOO.load_language(folder).weights
    (folder / "model.safetensors").unlink()
    place = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(state)}
    for file in set(place.values()):
        save_file({name: state[name] for name in state if place[name] == file}, folder / file)
    put(folder, "model.safetensors.index.json", {"weight_map": place})
    found = ZOO.load_language(folder).weights
    for name in whole:
        np.testing.assert_array_equal(found[name], whole[name])
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(BadModel, match=r"lacks model-1\.safetensors"):
        ZOO.load_language(folder)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_halves_are_read(kind: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_tensors

    folder = write(tmp_path / "a")
    state = {
        n: torch.tensor(v).to(kind) for n, v in load_file(folder / "model.safetensors").items()
    }
    save_tensors(state, folder / "model.safetensors")
    weight = ZOO.load_language(folder).weights["layers.0.q"]
    expected = state["model.layers.0.self_attn.q_proj.weight"].float().numpy()
    np.testing.assert_array_equal(weight, expected)


def test_a_tied_head_may_be_written_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    change_weights(folder, lambda s: s.update({"lm_head.weight": np.ones((300, 64), np.float32)}))
    change_weights(folder, lambda s: s.update({"model.rotary_emb.inv_freq": np.ones(8)}))
    assert ZOO.load_language(folder).spec.tied


def test_one_weight_file_is_read_with_what_lies_beside_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    assert ZOO.load_language(folder / "mine.safetensors").spec.layers == 2


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\b.safetensors", "x.bin", ""],
)
def test_an_index_cannot_reach_out_of_its_folder(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (tmp_path / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    put(folder, "model.safetensors.index.json", {"weight_map": {"norm": name}})
    with pytest.raises(BadModel, match="which is no file beside it"):
        ZOO.load_language(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": [1]}])
def test_an_index_without_a_map_is_damaged(content: object, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    put(folder, "model.safetensors.index.json", content)
    with pytest.raises(DamagedFile, match="has no weight_map"):
        ZOO.load_language(folder)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture 'GPT2LMHeadModel'.*LlamaForCausalLM",
        ),
        ({"architectures": None, "model_type": "mamba"}, r"architecture 'mamba \(model_type\)'"),
        ({"attention_bias": True}, "biases in its attention"),
        ({"mlp_bias": True}, "biases in its MLP"),
        ({"use_sliding_window": True}, "a sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "a sliding window"),
        ({"partial_rotary_factor": 0.5}, "rotation of a part"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by another tool"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "'yarn'; known are: default, lin"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic'; known are: default"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "scaling of positions is incomplete"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "positions is incomplete"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "positions is incomplete"),
        ({"rope_parameters": {"full_attention": {}}}, "each kind of layer positions of its own"),
        ({"rope_theta": 0}, "the base of the model's positions is 0"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rms_norm_eps": 0}, "norms add 0"),
        ({"rms_norm_eps": math.nan}, "norms add nan"),
        ({"hidden_size": None}, "does not say its hidden_size"),
        ({"hidden_size": "64"}, "hidden is '64'"),
        ({"num_hidden_layers": 10**9}, "layers is 1000000000; believed are 1 to 1024"),
        ({"max_position_embeddings": 1 << 40}, "context is 1099511627776"),
        ({"vocab_size": -1}, "vocabulary is -1"),
        ({"num_attention_heads": 0}, "heads is 0"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"head_dim": 15}, "only even sizes can be rotated"),
        ({"vocab_size": 100}, "sizes: model.embed_tokens.weight is 300x64 where 100x64"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight; .* and 6 more"),
        ({"num_hidden_layers": 1}, "unknown: model.layers.1"),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight"),
        ({"eos_token_id": 500}, "they are not of the same model"),
    ],
)
def test_what_the_graph_has_not_is_refused(
    config: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises((BadModel, UnknownName), match=sentence):
        ZOO.load_language(write(tmp_path / "a", **config))


def test_weights_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda state: state.update({name: np.zeros((96, 64), np.int8)}))
    with pytest.raises(
        UnknownName, match=r"unknown type of weights 'I8'.*There is: F16, BF16, F32"
    ):
        ZOO.load_language(folder)


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_a_damaged_safetensors_file_is_named(length: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(DamagedFile, match="is not a whole safetensors file"):
        ZOO.load_language(folder)


def test_a_header_of_absurd_size_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")
    with pytest.raises(DamagedFile, match="is not a whole safetensors file"):
        ZOO.load_language(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_not_opened(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "model.safetensors").rename(folder / name)
    for path in (folder, folder / name):
        with pytest.raises(BadModel, match=r"a pickle, which may run code.*[Cc]onvert it"):
            ZOO.load_language(path)


@pytest.mark.parametrize(
    ("name", "content", "error", "sentence"),
    [
        ("config.json", None, BadModel, r"has no config\.json"),
        ("tokenizer.json", None, BadModel, r"has no tokenizer\.json.*save_pretrained"),
        ("model.safetensors", None, BadModel, "has no weights"),
        ("config.json", b"{", DamagedFile, r"config\.json is no JSON"),
        ("config.json", b"[" * 100_000, DamagedFile, r"config\.json is no JSON"),
        ("config.json", b"[]", DamagedFile, "holds a list, where an object"),
        ("config.json", b'{"a": "\xff"}', DamagedFile, r"config\.json is not UTF-8: byte 7"),
        ("tokenizer.json", b'{"a": "\xff"}', DamagedFile, "is not UTF-8"),
        ("tokenizer.json", b"{", DamagedFile, "is no tokenizer"),
        ("tokenizer.json", b"{}", DamagedFile, "the tokenizer cannot be read"),
        ("tokenizer_config.json", b"\x00", DamagedFile, "is no JSON"),
        ("generation_config.json", b"1", DamagedFile, "holds a int"),
    ],
)
def test_files_that_lack_or_are_damaged_are_named(
    name: str, content: bytes | None, error: type[EdgekitError], sentence: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "a")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(error, match=sentence):
        ZOO.load_language(folder)


def test_a_json_file_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    os.truncate(folder / "tokenizer.json", 1 << 40)  # sparse: no disk is used
    with pytest.raises(DamagedFile, match="has 1,099,511,627,776 bytes"):
        ZOO.load_language(folder)


def test_a_model_that_never_ends_an_answer_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", eos_token_id=None)
    put(folder, "tokenizer_config.json", {})
    with pytest.raises(BadModel, match="names no token that ends an answer"):
        ZOO.load_language(folder)


def test_a_folder_of_gguf_files_says_to_give_one(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadModel, match=r"give .*a\.gguf itself"):
        ZOO.load_language(tmp_path)

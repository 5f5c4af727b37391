"""A GGUF file gives its own codes, its words, and a sentence where something is wrong with it."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from edgekit.blocks import Blocks
from edgekit.chat import render
from edgekit.decoder import Decoder
from edgekit.errors import BadModel, DamagedFile, EdgekitError, UnknownName
from edgekit.spec import Array
from edgekit.testing import tiny_decoder
from edgekit.tokenizer import Tokenizer
from edgekit_zoo import ZOO
from edgekit_zoo.gguf_container import KINDS, READ, read_gguf
from edgekit_zoo.gguf_file import _gguf_name, weights_from_gguf
from edgekit_zoo.gguf_tokenizer import tokenizer_from_gguf
from edgekit_zoo.llama import llama_from_weights

TEXT = [
    "The tide comes in, and the tide goes out.",
    "12345 boats; 12345 men: they're at sea!\n",
] * 9
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Where the float16 numbers lie in a block of each type.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}

Change = Callable[[gguf.GGUFWriter], None]


def library(pre: str) -> Library:
    """What a model's own tokenizer.json would be, trained on a few words."""
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    steps = {
        "smollm": [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ],
        "qwen2": [
            pre_tokenizers.Split(Regex(split.replace("{1,3}", "")), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ],
    }[pre]
    made = Library(models.BPE())
    # Learned without these cuts, so that a wrong cut would merge what a right one keeps apart.
    made.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=319, special_tokens=CONTROL, initial_alphabet=alphabet)
    )
    content = json.loads(made.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["zq"] = len(vocabulary)  # a word that no merge leads to
    content["model"]["ignore_merges"] = pre == "llama-bpe"
    made = Library.from_str(json.dumps(content))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    return made


def words(writer: gguf.GGUFWriter, pre: str = "smollm") -> None:
    made = library(pre)
    spelled = [text for text, _ in sorted(made.get_vocab().items(), key=lambda item: item[1])]
    merges = [left + " " + right for left, right in _merges(made)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(spelled)
    writer.add_token_types([3 if text in CONTROL else 1 for text in spelled])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")


def _merges(made: Library) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(made.to_str())["model"]["merges"]]


def interleaved(values: Array, head_dim: int) -> Array:
    """As llama.cpp's converter has q and k: the two of a rotated pair side by side."""
    heads = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return heads.swapaxes(1, 2).reshape(values.shape)


def write(
    path: Path,
    decoder: Decoder,
    *,
    family: str = "llama",
    change: Change = lambda writer: None,
    kinds: dict[str, Kind] | None = None,
    skip: str = "",
    with_words: bool = True,
) -> Path:
    """The decoder as a GGUF file; ``kinds`` are the types of tensors that are not float32."""
    spec = decoder.spec
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(spec.layers)
    writer.add_embedding_length(spec.hidden)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_feed_forward_length(spec.ffn)
    writer.add_context_length(spec.context)
    writer.add_layer_norm_rms_eps(spec.epsilon)
    if with_words:
        words(writer)
    for name in spec.shapes():
        values = decoder.floats(name)
        if family == "llama" and name.rpartition(".")[2] in ("q", "k", "q_bias", "k_bias"):
            values = interleaved(values, spec.head_dim)
        kind = (kinds or {}).get(name, Kind.F32)
        if _gguf_name(name) != skip:
            if kind is Kind.F32:
                writer.add_tensor(_gguf_name(name), values)
            else:
                raw = gguf.quantize(values, kind)
                writer.add_tensor(_gguf_name(name), raw, raw_dtype=kind)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small(**sizes: Any) -> Decoder:
    return tiny_decoder(vocabulary=320, **sizes)


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "whole.gguf", small())


@pytest.mark.parametrize("kind", HALVES)
def test_codes_of_every_type_stand_for_what_ggml_says(kind: str) -> None:
    from edgekit_zoo.gguf_file import _OWN_CODES

    _, block, size = next(each for each in KINDS.values() if each[0] == kind)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (7, 3, size)).astype(np.uint8)
    for at in HALVES[kind]:
        numbers = rng.uniform(-1, 1, (7, 3, 1)).astype(np.float16)
        raw[..., at : at + 2] = numbers.view(np.uint8)
    raw = raw.reshape(7, -1)
    blocks = _OWN_CODES[kind](raw)
    expected = gguf.dequantize(raw, Kind[kind])
    assert blocks.shape == expected.shape == (7, 3 * block)
    np.testing.assert_allclose(blocks.floats(), expected, atol=1e-6 * np.abs(expected).max())
    assert blocks.codes.dtype == np.uint8
    assert blocks.codes.max() < 1 << blocks.bits
    assert blocks.scales.dtype == np.float32


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {}),
        ("llama", {"tied": False, "head_dim": 24}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True, "tied": False}),
    ],
)
def test_a_file_gives_the_decoder_that_was_written(
    family: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    decoder = small(**sizes)
    spec, weights = weights_from_gguf(write(tmp_path / "a.gguf", decoder, family=family))
    assert spec.rope == pytest.approx(decoder.spec.rope)
    assert spec.__dict__ | {"rope": 0, "epsilon": 0} == decoder.spec.__dict__ | {
        "rope": 0,
        "epsilon": 0,
    }
    assert spec.epsilon == pytest.approx(decoder.spec.epsilon)
    for name in spec.shapes():
        np.testing.assert_array_equal(weights[name], decoder.weights[name])
    tokens = torch.arange(20)[None]
    expected = llama_from_weights(decoder.spec, decoder.weights)(tokens, [])
    torch.testing.assert_close(llama_from_weights(spec, weights)(tokens, []), expected)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.BF16])
def test_a_type_keeps_its_codes_and_halves_stay_floats(kind: Kind, tmp_path: Path) -> None:
    decoder = small()
    kinds = dict.fromkeys(["embedding", "layers.0.q", "layers.1.down"], kind)
    _, weights = weights_from_gguf(write(tmp_path / "a.gguf", decoder, kinds=kinds))
    for name in kinds:
        values, weight = decoder.floats(name), weights[name]
        expected = gguf.dequantize(gguf.quantize(values, kind), kind)
        if name == "layers.0.q":  # blocks lie along a row, so the order of rows is no matter
            np.testing.assert_allclose(np.sort(_floats(weight), 0), np.sort(expected, 0))
        else:
            np.testing.assert_allclose(_floats(weight), expected, rtol=1e-6, atol=1e-7)
        assert isinstance(weight, Blocks) == (kind.name not in ("F16", "BF16"))
    assert isinstance(weights["layers.0.k"], np.ndarray)


def _floats(weight: Array | Blocks) -> Array:
    return weight.floats() if isinstance(weight, Blocks) else weight


def test_positions_scale_by_a_factor_or_by_the_files_divisors(tmp_path: Path) -> None:
    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    plain = np.array(small().spec.rope)
    spec, _ = weights_from_gguf(write(tmp_path / "a.gguf", small(), change=linear))
    np.testing.assert_allclose(spec.rope, plain / 4)
    spec, _ = weights_from_gguf(
        write(
            tmp_path / "b.gguf",
            small(),
            change=lambda writer: writer.add_tensor("rope_freqs.weight", divisors),
        )
    )
    np.testing.assert_allclose(spec.rope, plain / divisors)


def test_a_file_is_a_whole_language_model(whole: Path) -> None:
    model = ZOO.load_language(whole)
    assert (model.name, model.stops) == ("whole", (0, 2))
    assert render(model.template, [{"role": "user", "content": "Hi"}]) == "Hi<|im_end|>"
    tokens = Tokenizer(model.tokenizer).encode("The tide")
    assert model.module(torch.tensor([tokens]), []).shape == (1, len(tokens), 320)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2"])
def test_the_tokenizer_cuts_text_as_the_models_own(pre: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    words(writer, pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    rebuilt = Tokenizer(tokenizer_from_gguf(read_gguf(tmp_path / "a.gguf")))
    own, rng = library(pre), np.random.default_rng(0)
    alphabet = "tide the a 0123 \n\r\t'S're.,;!é e\u0301海🌊\u3000<|im_end|>"
    texts = ["".join(rng.choice(list(alphabet), 40)) for _ in range(300)]
    texts += ["".join(map(chr, rng.integers(1, 0xD7FF, 30))) for _ in range(100)]
    for text in [*TEXT, "zq", "1234567", "<|im_start|>user\nthe tide<|im_end|>", *texts]:
        assert rebuilt.encode(text) == own.encode(text).ids
        said = "".join(text.split("<|im_end|>")).replace("<|im_start|>", "")
        assert rebuilt.decode(rebuilt.encode(text)) == (
            normalizers.NFC().normalize_str(said) if pre == "qwen2" else said
        )


def test_a_first_token_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    def begin(writer: gguf.GGUFWriter) -> None:
        writer.add_bos_token_id(1)
        writer.add_add_bos_token(True)

    model = ZOO.load_language(write(tmp_path / "a.gguf", small(), change=begin))
    assert Tokenizer(model.tokenizer).encode("a")[0] == 1
    assert Tokenizer(model.tokenizer).encode("a", special=False)[0] != 1


def test_a_file_cut_short_anywhere_is_a_sentence(whole: Path, tmp_path: Path) -> None:
    content, cut = whole.read_bytes(), tmp_path / "cut.gguf"
    lengths = [*range(0, 400, 7), *np.linspace(400, len(content) - 1, 60).astype(int)]
    for length in lengths:
        cut.write_bytes(content[:length])
        with pytest.raises(DamagedFile, match=r"cut\.gguf is no (whole )?GGUF file"):
            weights_from_gguf(cut)


def test_a_file_with_a_byte_gone_wrong_never_ends_in_a_traceback(
    whole: Path, tmp_path: Path
) -> None:
    content, rng = whole.read_bytes(), np.random.default_rng(0)
    damaged = tmp_path / "damaged.gguf"
    for at in rng.integers(0, 12_000, 300):
        changed = bytearray(content)
        changed[at] ^= int(rng.integers(1, 256))
        damaged.write_bytes(changed)
        with contextlib.suppress(EdgekitError):  # any other error fails this test
            file = read_gguf(damaged)
            weights_from_gguf(file)
            tokenizer_from_gguf(file)


@pytest.mark.parametrize(
    ("at", "put", "sentence"),
    [
        (0, b"GGML", "begins with b'GGML', not b'GGUF'"),
        (0, b"\x80\x02}q", "is no GGUF file"),
        (4, struct.pack("<I", 1), "GGUF version 1"),
        (4, struct.pack(">I", 3), "for big-endian machines"),
        (8, struct.pack("<Q", 1 << 60), "announces 1152921504606846976 tensors"),
        (16, struct.pack("<Q", 1 << 40), "and 1099511627776 fields"),
        (24, struct.pack("<Q", 1 << 62), "cut short"),
        (32, b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_header_that_is_none_says_what_is_wrong(
    at: int, put: bytes, sentence: str, whole: Path, tmp_path: Path
) -> None:
    content = bytearray(whole.read_bytes())
    content[at : at + len(put)] = put
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(DamagedFile, match=sentence):
        read_gguf(tmp_path / "a.gguf")


def test_an_endless_list_is_refused_at_once(tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    for kind in (8, 4, 9):
        path = tmp_path / "a.gguf"
        path.write_bytes(head + struct.pack("<IIQ", 9, kind, 1 << 60) + b"\0" * 64)
        with pytest.raises(DamagedFile, match=r"cut short|a list of 9"):
            read_gguf(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"there is no .*none\.gguf"):
        ZOO.load_language(tmp_path / "none.gguf")


def test_an_unknown_architecture_names_those_that_are_known(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", small(), family="gemma3")
    with pytest.raises(UnknownName, match=r"architecture 'gemma3'.*llama, qwen2, qwen3"):
        weights_from_gguf(path)


def test_an_unknown_type_of_quantization_names_itself_and_the_known(tmp_path: Path) -> None:
    for kind, name in ((Kind.Q5_0, "Q5_0"), (Kind.TQ1_0, "TQ1_0")):
        decoder = small(ffn=256)
        path = write(tmp_path / "a.gguf", decoder, kinds={"layers.1.down": kind})
        with pytest.raises(UnknownName, match=f"quantization '{name}'.*{', '.join(READ)}.*blk.1"):
            weights_from_gguf(path)


def test_a_type_that_nobody_has_named_yet_is_refused_by_its_number(
    whole: Path, tmp_path: Path
) -> None:
    content = bytearray(whole.read_bytes())
    at = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    content[at : at + 4] = struct.pack("<I", 99)
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(UnknownName, match="quantization 'number 99'"):
        weights_from_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.add_sliding_window(128), "attention through a sliding window"),
        (lambda w: w.add_expert_count(8), "experts"),
        (lambda w: w.add_rope_dimension_count(8), "a part of each head"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "scales .* by 'yarn'"),
        (lambda w: w.add_rope_freq_base(0.0), r"positions is 0\.0"),
        (lambda w: w.add_rope_freq_base(float("nan")), "positions is nan"),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.zeros(8, np.float32)),
            "gives no numbers",
        ),
        (
            lambda w: w.add_tensor("blk.0.attn_output.bias", np.zeros(64, np.float32)),
            r"unknown: blk\.0\.attn_output\.bias",
        ),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.ones(3, np.float32)),
            r"rope_freqs\.weight is 3 where 8 is expected",
        ),
    ],
)
def test_what_the_graph_has_not_is_refused(change: Change, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=sentence):
        weights_from_gguf(write(tmp_path / "a.gguf", small(), change=change))


def test_two_tensors_of_one_name_are_refused(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight")
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(DamagedFile, match="two tensors have the same name"):
        read_gguf(tmp_path / "a.gguf")


def test_missing_tensors_and_other_sizes_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", small(), skip="blk.1.ffn_up.weight")
    with pytest.raises(BadModel, match=r"missing: blk\.1\.ffn_up\.weight"):
        weights_from_gguf(path)
    decoder = small()
    decoder.weights["layers.0.v"] = np.zeros((32, 96), np.float32)  # type: ignore[index]
    with pytest.raises(BadModel, match=r"blk\.0\.attn_v\.weight is 32x96 where 32x64 is expected"):
        weights_from_gguf(write(tmp_path / "b.gguf", decoder))


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [({"context": 1 << 30}, "context is 1073741824"), ({"kv_heads": 3}, "must be a multiple")],
)
def test_sizes_that_no_model_has_are_refused(
    sizes: dict[str, int], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(BadModel, match=sentence):
        weights_from_gguf(write(tmp_path / "a.gguf", small(**sizes)))


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"has no tokenizer: tokenizer\.ggml\.\w+ is missing"):
        ZOO.load_language(write(tmp_path / "a.gguf", small(), with_words=False))


@pytest.mark.parametrize(
    ("key", "value", "error", "sentence"),
    [
        ("model", "llama", BadModel, "a tokenizer of the kind 'llama'"),
        ("pre", "falcon", UnknownName, r"pre-tokenizer 'falcon'.*smollm, llama-bpe, qwen2"),
        ("merges", ["ab"], BadModel, "is malformed"),
        ("token_type", [1], BadModel, "is malformed"),
        ("tokens", ["a", "a"], BadModel, "are spelled alike"),
    ],
)
def test_a_tokenizer_that_is_not_read_is_refused(
    key: str, value: Any, error: type[EdgekitError], sentence: str, whole: Path
) -> None:
    from dataclasses import replace

    file = read_gguf(whole)
    changed = replace(file, fields={**file.fields, f"tokenizer.ggml.{key}": value})
    with pytest.raises(error, match=sentence):
        tokenizer_from_gguf(changed)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="they are not of the same model"):
        ZOO.load_language(write(tmp_path / "a.gguf", tiny_decoder(vocabulary=128)))

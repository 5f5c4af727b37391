"""A Hugging Face folder to a language model's parts: config.json, safetensors, tokenizer.json.

The keys are those of transformers 4 and 5. What the graph here has not (windows, biases in other
places, experts) is refused by name, never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from edgekit.chat import with_special_tokens
from edgekit.decoder import DecoderSpec, Weight
from edgekit.errors import BadModel, DamagedFile, UnknownName
from edgekit_zoo.decoder_fit import check_sizes, check_tensors
from edgekit_zoo.rope import frequencies

CONFIG, INDEX, ONE = "config.json", "model.safetensors.index.json", "model.safetensors"
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_LARGEST = 64 << 20  # bytes of a JSON file; the tokenizers of 150,000 tokens have 12 MB
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Words:
    """What a folder says about text: see the fields of ``LanguageModel`` of these names."""

    tokenizer: str
    stops: tuple[int, ...]
    template: str


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ``BadModel`` where it is missing, else
    ``DamagedFile``."""
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as cause:
        raise DamagedFile(f"{path} is no JSON: {cause}. Download or save it again.") from cause
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} holds a {type(value).__name__}, where an object is expected.")
    return value


def read_text(path: Path) -> str:
    """A UTF-8 file of a sane size. Raises ``BadModel`` or ``DamagedFile``."""
    try:
        if path.stat().st_size > _LARGEST:
            raise DamagedFile(f"{path} has {path.stat().st_size:,} bytes, which no such file has.")
        return path.read_text("utf-8")
    except UnicodeDecodeError as cause:
        raise DamagedFile(f"{path} is not UTF-8: byte {cause.start}. Save it again.") from cause
    except OSError as cause:
        raise BadModel(f"{path} cannot be read: {cause.strerror}.") from cause


def spec_from_config(path: Path) -> DecoderSpec:
    """The sizes in a ``config.json``. Raises ``BadModel``, ``DamagedFile``, or ``UnknownName``
    for an architecture that is not built here."""
    config = read_json(path)
    family = _family(config, path)
    _refuse_what_is_not_built(config, family, path)

    def size(name: str, default: object = None) -> Any:
        found = config.get(name)
        found = default if found is None else found
        if found is None:
            raise BadModel(f"{path} does not say its {name}; take the one of the model.")
        return found

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    usual = 128 if family == "qwen3" else hidden // max(heads, 1) if _whole(hidden, heads) else 0
    spec = DecoderSpec(
        layers=size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", usual),
        ffn=size("intermediate_size"),
        vocabulary=size("vocab_size"),
        context=size("max_position_embeddings"),
        epsilon=_number(size("rms_norm_eps", 1e-6), "rms_norm_eps", path),
        rope=(),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied=bool(config.get("tie_word_embeddings", False)),
    )
    check_sizes(spec, path)
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict) or any(isinstance(each, dict) for each in scaling.values()):
        raise BadModel(f"{path} gives each kind of layer positions of its own: {scaling!r}.")
    base = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    rope = frequencies(spec.head_dim, _number(base, "rope_theta", path), scaling)
    return DecoderSpec(**{**spec.__dict__, "rope": rope})


def _whole(*values: object) -> bool:
    return all(isinstance(value, int) for value in values)


def _number(value: object, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadModel(f"{path} says {name} is {value!r}; it is a number.")
    return float(value)


def _family(config: Mapping[str, Any], path: Path) -> str:
    architectures = config.get("architectures") or [f"{config.get('model_type')} (model_type)"]
    name = str(architectures[0] if isinstance(architectures, list) else architectures)
    by_type = f"{config.get('model_type')} (model_type)"
    if name == by_type and config.get("model_type") in FAMILIES.values():
        return str(config["model_type"])
    if name not in FAMILIES:
        raise UnknownName("architecture", name, FAMILIES, hint=f"It is the one of {path}.")
    return FAMILIES[name]


def _refuse_what_is_not_built(config: Mapping[str, Any], family: str, path: Path) -> None:
    asked = {
        "biases in its attention": config.get("attention_bias") and family != "qwen2",
        "biases in its MLP": config.get("mlp_bias"),
        "attention through a sliding window": config.get("use_sliding_window")
        or "sliding_attention" in (config.get("layer_types") or ()),
        "rotation of a part of each head": config.get("partial_rotary_factor", 1) != 1
        or (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1) != 1,
        f"the activation {config.get('hidden_act')}": config.get("hidden_act", "silu")
        not in ("silu", "swish"),
        "weights quantized by another tool": config.get("quantization_config"),
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise BadModel(
                f"{path} asks for {what}, which is not built here; choose another model, or its "
                "release in float weights, or a GGUF file of it."
            )


def weights_from_folder(
    folder: Path, spec: DecoderSpec, file: Path | None = None
) -> dict[str, Weight]:
    """The weights of a folder, or of the one ``file`` in it, float32, by the names of
    ``DecoderSpec.shapes``. Raises ``BadModel`` or ``DamagedFile``."""
    files = [file] if file else _weight_files(folder)
    with ExitStack() as stack:
        parts = {path: stack.enter_context(_opened(path)) for path in files}
        place = {name: path for path, part in parts.items() for name in part.keys()}  # noqa: SIM118
        shapes = {published_name(name): shape for name, shape in spec.shapes().items()}
        found = {
            name: tuple(parts[path].get_slice(name).get_shape()) for name, path in place.items()
        }
        # A tied head may be written twice; old files hold the frequencies of each layer.
        ignored = {name for name in found if name.endswith(".rotary_emb.inv_freq")}
        ignored |= {"lm_head.weight"} if spec.tied else set()
        check_tensors(shapes, found, file or folder, ignored=ignored)
        return {
            name: _floats(parts[place[published_name(name)]], published_name(name), folder)
            for name in spec.shapes()
        }


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as cause:
        raise DamagedFile(
            f"{path} is not a whole safetensors file: {cause}. Download or save it again."
        ) from cause


def _floats(part: Any, name: str, folder: Path) -> Weight:
    kind = part.get_slice(name).get_dtype()
    if kind not in _FLOATS:
        raise UnknownName("type of weights", kind, _FLOATS, hint=f"{name} in {folder} has it.")
    return np.ascontiguousarray(part.get_tensor(name).float().numpy())


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        named = read_json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise DamagedFile(f"{folder / INDEX} has no weight_map; download it again.")
        names = sorted({str(each) for each in named.values()})
        for name in names:
            # A file elsewhere is none of this model's: a name, never a path.
            if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise BadModel(f"{folder / INDEX} names {name!r}, which is no file beside it.")
            if not (folder / name).is_file():
                raise BadModel(f"{folder} lacks {name}, which {INDEX} names; download it too.")
        return [folder / name for name in names]
    if (folder / ONE).is_file():
        return [folder / ONE]
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")])
    if pickled:
        raise BadModel(
            f"{folder} has its weights as {pickled[0].name}, a pickle, which may run code when it "
            "is read. Convert it: transformers' save_pretrained(folder) writes safetensors."
        )
    raise BadModel(f"{folder} has no weights: {ONE} or {INDEX} is missing.")


_NAMES = {
    "embedding": "embed_tokens.weight",
    "norm": "norm.weight",
    "attention_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    **{name: f"self_attn.{name}_proj.weight" for name in "qkvo"},
    **{f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"},
    **{f"{name}_norm": f"self_attn.{name}_norm.weight" for name in "qk"},
    **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}


def published_name(name: str) -> str:
    """``layers.0.q`` to ``model.layers.0.self_attn.q_proj.weight``."""
    if name == "head":
        return "lm_head.weight"
    *layer, last = name.split(".")
    return ".".join(["model", *layer, _NAMES[last]])


def words_from_folder(folder: Path) -> Words:
    """The tokenizer, stop tokens and chat template. Raises ``BadModel`` or ``DamagedFile``."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadModel(
            f"{folder} has no tokenizer.json, so there is nothing to turn text into tokens with; "
            "save it: AutoTokenizer.from_pretrained(name).save_pretrained(folder)."
        )
    tokenizer = read_text(path)
    settings = _settings(folder, "tokenizer_config.json")
    bos, eos = (_spelled(settings.get(f"{name}_token")) for name in ("bos", "eos"))
    template = with_special_tokens(_template(folder, settings), bos=bos, eos=eos)
    return Words(tokenizer, _stops(folder, tokenizer, eos, path), template)


def _settings(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).is_file() else {}


def _spelled(token: object) -> str:
    """A special token, which files give as its text or as an object with it."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _template(folder: Path, settings: Mapping[str, Any]) -> str:
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    found = settings.get("chat_template", "")
    if isinstance(found, list):  # several by name
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""


def _stops(folder: Path, tokenizer: str, eos: str, path: Path) -> tuple[int, ...]:
    """The ends of an answer: those for generating, else the model's; and the tokenizer's."""
    stops: set[int] = set()
    for name in ("generation_config.json", CONFIG):
        found = _settings(folder, name).get("eos_token_id")
        listed = found if isinstance(found, list) else [found]
        stops |= {token for token in listed if isinstance(token, int) and token >= 0}
    try:
        added = json.loads(tokenizer).get("added_tokens") or []
        stops |= {int(each["id"]) for each in added if eos and each["content"] == eos}
    except (ValueError, TypeError, KeyError, AttributeError) as cause:
        raise DamagedFile(f"{path} is no tokenizer: {cause!r}. Save it again.") from cause
    if not stops:
        raise BadModel(
            f"{folder} names no token that ends an answer: give eos_token_id in "
            "generation_config.json."
        )
    return tuple(sorted(stops))

"""Ways to round float weights of a language model to 4 bits, by what they cost in perplexity.

    python tools/bench_rounding.py tiny-llama --block 32

The weights are read, every matrix but the embedding and the head is rounded, and the eager module
reads edgekit's text with what the codes stand for. GPTQ is given the activations of the first
tokens of another text. What ``edgekit/block_quantize.py`` does is chosen from this table.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization.neural_compressor import weight_only
from torch import nn

from edgekit.block_quantize import blocks_from_floats
from edgekit.language import LanguageModel
from edgekit.render import table
from edgekit.source import find_language
from edgekit.spec import Array
from edgekit.tokenizer import Tokenizer

CALIBRATION_TOKENS = 2048
Rounding = Callable[[Array, Array, int], Array]  # weight, x'x of its inputs, block: as floats


def min_max(weight: Array, _gram: Array, block: int) -> Array:
    """The range of each block in 15 steps, with an offset."""
    low_high = weight.reshape(len(weight), -1, block)
    low, high = low_high.min(-1, keepdims=True), low_high.max(-1, keepdims=True)
    scale = np.where(high > low, (high - low) / 15, 1)
    rounded: Array = (np.rint((low_high - low) / scale) * scale + low).reshape(weight.shape)
    return rounded


def symmetric(weight: Array, _gram: Array, block: int) -> Array:
    """The largest magnitude of each block is code -8, without an offset."""
    parts = weight.reshape(len(weight), -1, block)
    extreme = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)
    scale = np.where(extreme == 0, 1, extreme / -8)
    return np.asarray(np.clip(np.rint(parts / scale), -8, 7) * scale).reshape(weight.shape)


def chosen(weight: Array, _gram: Array, block: int) -> Array:
    """Half-quadratic quantization by torchao, its zero a float: what edgekit does."""
    return blocks_from_floats(weight, 4, block).floats()


def k_quant(weight: Array, _gram: Array, block: int) -> Array:
    """ONNX Runtime's, after llama.cpp's: searched scales, an integer zero."""
    codes, scale, zero = weight_only.quant_tensor_k_quant_cpu(weight.copy(), 4, block)
    return np.asarray((codes - zero) * scale, np.float32).reshape(weight.shape)


def gptq(weight: Array, gram: Array, block: int) -> Array:
    """ONNX Runtime's GPTQ (arXiv 2210.17323), its zero an integer."""
    found = weight_only.gptq(
        weight.T.copy(), gram.astype(np.float64).copy(), 4, block, blocksize=block, mse=True
    )
    return np.asarray(found.T, np.float32)


METHODS: dict[str, Rounding] = {
    "HQQ": chosen,
    "min-max with offset": min_max,
    "symmetric": symmetric,
    "k-quant": k_quant,
    "GPTQ": gptq,
}


@torch.inference_mode()
def perplexity(module: nn.Module, tokens: list[int]) -> float:
    """Of a text, read at once."""
    rows = module(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)
    losses = -rows.gather(1, torch.tensor(tokens[1:])[:, None])
    return math.exp(float(losses.mean()))


@torch.inference_mode()
def grams(module: nn.Module, tokens: list[int]) -> dict[str, Array]:
    """``x'x`` of what each linear layer is given, by its name."""
    found: dict[str, Any] = {}
    handles = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):

            def keep(_layer: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
                x = given[0].flatten(0, -2)
                found[name] = (x.T @ x).numpy()

            handles.append(layer.register_forward_pre_hook(keep))
    module(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return found


def measure(model: LanguageModel, block: int, methods: list[str], limit: int) -> None:
    """Print the table."""
    tokenizer = Tokenizer(model.tokenizer)
    text = (files("edgekit") / "texts/reading.txt").read_text("utf-8")
    other = (files("edgekit") / "texts/prompts.txt").read_text("utf-8")
    tokens = tokenizer.encode(text)[: min(limit, model.spec.context)]
    calibration = tokenizer.encode(other)[: min(CALIBRATION_TOKENS, model.spec.context)]
    module = model.module
    before = perplexity(module, tokens)
    inputs = grams(module, calibration) if "GPTQ" in methods else {}
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name != "head"
    }
    floats = {name: layer.weight.detach().numpy().copy() for name, layer in layers.items()}
    rows = [("float32", f"{before:.3f}", "-", "-", "-")]
    for method in methods:
        start, noise, power = time.monotonic(), 0.0, 0.0
        for name, layer in layers.items():
            gram = inputs.get(name, np.eye(1))
            rounded = METHODS[method](floats[name], gram, block)
            noise += float(((rounded - floats[name]) ** 2).sum())
            power += float((floats[name] ** 2).sum())
            layer.weight.data = torch.from_numpy(np.ascontiguousarray(rounded))
        seconds, after = time.monotonic() - start, perplexity(module, tokens)
        rise, ratio = 100 * (after / before - 1), 10 * math.log10(power / max(noise, 1e-30))
        rows.append(
            (method, f"{after:.3f}", f"{rise:+.1f} %", f"{ratio:.1f} dB", f"{seconds:.0f} s")
        )
        print(f"{method}: {after:.3f}", file=sys.stderr, flush=True)
    print(f"{model.name}, blocks of {block}, {len(tokens)} tokens")
    print(table(("rounding", "perplexity", "rise", "SQNR of weights", "time"), rows))


def main() -> None:
    """One model, every way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    asked = parser.parse_args()
    model = find_language(asked.model, weights=asked.weights)
    if model is None:
        raise SystemExit(f"{asked.model} is no language model")
    measure(model, asked.block, asked.methods, asked.tokens)


if __name__ == "__main__":
    main()

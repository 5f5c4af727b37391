"""Builds a language model's engine on the device it is for, and decodes with it greedily.

Run it in the artifact's folder of a bundle, on the Jetson or PC with the GPU:

    python3 generate_on_jetson.py --tokens 1,4093,198 --limit 64

It needs Python 3.10, numpy and TensorRT's own Python module, all of which JetPack 6 has, and
``build_engine.py`` and ``evidence.py`` beside it. The first run builds ``model.<device>.engine``
from ``model.onnx`` and ``model.weights``; later ones load it. It prints the tokens that follow, and
how fast they came. Exit code: 0 done, 3 not possible here, 4 damaged bundle.

``pass_inputs`` and ``profiles_of_decoder`` are the graph's calling convention, written once: the
SDK's own steppers call them too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if sys.version_info < (3, 10):  # noqa: UP036  (the devices' Python, not the host's)
    sys.stderr.write("generate_on_jetson.py needs Python 3.10 or newer; JetPack 6 has it.\n")
    raise SystemExit(3)
if __package__:
    from edgekit import evidence
    from edgekit_tensorrt import build_engine
else:  # a script in a bundle: the copies beside it
    sys.dont_write_bytecode = True
    try:
        import build_engine  # type: ignore[import-not-found,no-redef]
        import evidence  # type: ignore[import-not-found,no-redef]
    except ImportError as missing:
        sys.stderr.write(
            f"generate_on_jetson.py needs numpy, and build_engine.py and evidence.py beside it "
            f"({missing}); run it in the artifact's folder of a bundle.\n"
        )
        raise SystemExit(3) from None

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# Added to the score of what a token must not see. Not float16's least number: scores are added.
HIDDEN = -1e4
DECODER = "decoder.json"
ANSWERS = {"logits": "vocabulary", "hidden": "hidden"}  # outputs, and the size of their rows
ON_DEVICE = 3  # cudaMemcpyDeviceToDevice


def pass_inputs(
    tokens: Sequence[int],
    parents: Sequence[int] | None,
    rows: Sequence[int],
    length: int,
    dtype: str,
) -> dict[str, Array]:
    """All inputs of a pass but the cache: ``length`` tokens are kept and seen by every new one.

    ``parents`` as ``Stepper.step`` has them, None for a chain. ``dtype`` is the graph's.
    """
    count = len(tokens)
    if parents is None:
        depths, seen = np.arange(count), np.tri(count, dtype=bool)
    else:
        depths, seen = np.zeros(count, np.int64), np.eye(count, dtype=bool)
        for index, parent in enumerate(parents):
            if parent >= 0:
                depths[index] = depths[parent] + 1
                seen[index] |= seen[parent]
    mask = np.zeros((count, length + count), dtype)
    mask[:, length:] = np.where(seen, 0, HIDDEN)
    return {
        "tokens": np.asarray(tokens, np.int32),
        "positions": (length + depths).astype(np.int32),
        "mask": mask,
        "rows": np.asarray(rows, np.int32),
    }


def profiles_of_decoder(decoder: Mapping[str, Any]) -> build_engine.Profiles:
    """Least, most usual and largest shape of every input of a decoder as ``decoder.json`` has it.

    One profile over all: each more would hold the weights once again.
    """
    cache = _row_of(decoder["spec"])
    capacity, widest = decoder["capacity"], decoder["widest"]
    half = max(capacity // 2, 1)
    each = ((1,), (1,), (widest,))
    past = ((0, *cache), (half, *cache), (capacity, *cache))
    return {
        **dict.fromkeys(("tokens", "positions", "rows"), each),
        "mask": ((1, 1), (1, half + 1), (widest, capacity + widest)),
        **dict.fromkeys(("past_keys", "past_values"), past),
    }


def _row_of(spec: Mapping[str, Any]) -> tuple[int, int, int]:
    """What the cache keeps of one token: layers, heads, head size."""
    return spec["layers"], spec["kv_heads"], spec["head_dim"]


def built(model: Path, decoder: Mapping[str, Any], **options: Any) -> bytes:
    """The engine for this device; ``options`` are those of ``build_engine.build``."""
    profiles = profiles_of_decoder(decoder)
    return build_engine.build(model.read_bytes(), profiles, path=model, **options)


class DecoderEngine(build_engine.Engine):
    """An engine with its cache on the GPU. Raises ``NotPossible``."""

    def __init__(self, engine: bytes, decoder: Mapping[str, Any], trt: Any = None) -> None:
        """``decoder`` is the artifact's provenance of that name."""
        super().__init__(engine, trt)
        self._spec, self.dtype = decoder["spec"], np.dtype(decoder["dtype"])
        self.vocabulary: int = self._spec["vocabulary"]
        self.capacity: int = decoder["capacity"]
        self.widest: int = decoder["widest"]

    def __enter__(self) -> DecoderEngine:
        super().__enter__()
        try:
            self._make_room()
        except BaseException:
            self._free()
            raise
        return self

    def _make_room(self) -> None:
        """For the widest pass and the whole cache, once: no pass waits for memory."""
        spec, width, item = self._spec, self.widest, self.dtype.itemsize
        self._row = _row_of(spec)
        self._row_bytes = int(np.prod(self._row)) * item
        sizes = dict.fromkeys(("tokens", "positions", "rows"), 4 * width)
        sizes["mask"] = width * (self.capacity + width) * item
        sizes |= dict.fromkeys(("past_keys", "past_values"), self.capacity * self._row_bytes)
        sizes |= dict.fromkeys(("keys", "values"), width * self._row_bytes)
        sizes |= {name: 4 * width * spec[size] for name, size in ANSWERS.items()}
        for name, size in sizes.items():
            if not self._context.set_tensor_address(name, self._allocate(name, size)):
                raise evidence.NotPossible(f"TensorRT refused the memory of {name!r}.")

    def step(self, inputs: Mapping[str, Array], length: int) -> dict[str, Array]:
        """Logits and hidden states of the rows wanted; the new tokens are kept behind ``length``.

        ``inputs`` are those of ``pass_inputs``.
        """
        stream = build_engine._pointer(self._stream)
        for name in ("past_keys", "past_values"):
            self._shape(name, (length, *self._row))
        for name, array in inputs.items():
            self._shape(name, array.shape)
            self._copy(name, array, build_engine.TO_DEVICE)
        self._execute()
        rows = len(inputs["rows"])
        answers = {name: np.empty((rows, self._spec[size]), "f4") for name, size in ANSWERS.items()}
        for name, array in answers.items():
            self._copy(name, array, build_engine.TO_HOST)
        count = ctypes.c_size_t(len(inputs["tokens"]) * self._row_bytes)
        for name in ("keys", "values"):
            target = self._memory[f"past_{name}"][0] + length * self._row_bytes
            source = self._memory[name][0]
            places = build_engine._pointer(target), build_engine._pointer(source)
            self._cuda("cudaMemcpyAsync", *places, count, ON_DEVICE, stream)
        self._cuda("cudaStreamSynchronize", stream)
        return answers

    def _shape(self, name: str, shape: Sequence[int]) -> None:
        if not self._context.set_input_shape(name, tuple(shape)):
            raise evidence.NotPossible(f"TensorRT refused input {name!r} of shape {list(shape)}.")

    def _copy(self, name: str, array: Array, kind: int) -> None:
        here = build_engine._pointer(array.ctypes.data)
        there = build_engine._pointer(self._memory[name][0])
        places = (there, here) if kind == build_engine.TO_DEVICE else (here, there)
        size, stream = ctypes.c_size_t(array.nbytes), build_engine._pointer(self._stream)
        self._cuda("cudaMemcpyAsync", *places, size, kind, stream)


def greedy(
    engine: DecoderEngine, prompt: Sequence[int], limit: int, stops: Sequence[int] = ()
) -> Iterator[int]:
    """The likeliest token again and again, ``limit`` at most, until one of ``stops``.

    The prompt is fed in passes as wide as the engine takes. Raises ``NotPossible``.
    """
    if not prompt or len(prompt) + limit > engine.capacity:
        raise evidence.NotPossible(
            f"{len(prompt)} tokens and {limit} more do not fit: there must be one at least, and "
            f"the cache holds {engine.capacity}. Shorten the text, or export with a larger "
            "--context."
        )
    known = engine.vocabulary
    if wrong := [token for token in prompt if not 0 <= token < known]:
        raise evidence.NotPossible(f"token {wrong[0]} is none of the model's {known}.")
    waiting, length = list(prompt), 0
    while limit > 0:
        part, waiting = waiting[: engine.widest], waiting[engine.widest :]
        answer = engine.step(
            pass_inputs(part, None, [len(part) - 1], length, engine.dtype.name), length
        )
        length += len(part)
        if waiting:
            continue
        token = int(answer["logits"][0].argmax())
        if token in stops:
            return
        yield token
        waiting, limit = [token], limit - 1


def _engine_of(folder: Path, decoder: Mapping[str, Any], workspace_mb: int | None) -> bytes:
    """The engine that lies there for this device, not older than the model; else a new one."""
    trt, model = build_engine.bindings(), folder / "model.onnx"
    device = build_engine.describe(build_engine.Cuda(), trt)
    slug = re.sub(r"[^a-z0-9]+", "-", str(device["processor"]).lower()).strip("-")
    place = folder / f"model.{slug}.engine"
    if place.exists() and place.stat().st_mtime >= model.stat().st_mtime:
        return place.read_bytes()
    began = time.perf_counter()
    plan = built(model, decoder, workspace_mb=workspace_mb, trt=trt)
    evidence.write_beside(place, plan)
    took = time.perf_counter() - began
    sys.stderr.write(f"Built {place.name} in {took:.1f} s: {len(plan) / 1e6:.1f} MB.\n")
    return plan


def _generate(folder: Path, options: argparse.Namespace) -> int:
    try:
        decoder = json.loads((folder / DECODER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise evidence.Refused(f"{DECODER} cannot be read: {cause}") from cause
    with DecoderEngine(_engine_of(folder, decoder, options.workspace_mb), decoder) as engine:
        times = [time.perf_counter()]
        for token in greedy(engine, options.tokens, options.limit, options.stops):
            times.append(time.perf_counter())
            sys.stdout.write(f"{token} ")
            sys.stdout.flush()
    sys.stdout.write("\n")
    if len(times) > 2:
        speed = (len(times) - 2) / (times[-1] - times[1])
        first = 1e3 * (times[1] - times[0])
        sys.stderr.write(f"First token after {first:.1f} ms, then {speed:.1f} tokens/s.\n")
    return 0


def _tokens(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of tokens such as 1,4093,198")
    return [int(part) for part in parts]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and do the work; every failure is a sentence and an exit code."""
    command = argparse.ArgumentParser(
        description="Build the engine of a language model on this device, and decode greedily."
    )
    command.add_argument("--tokens", type=_tokens, required=True, help="the prompt: 1,4093,198")
    command.add_argument(
        "--limit", type=evidence.positive, default=64, help="new tokens at most (default: 64)"
    )
    command.add_argument("--stops", type=_tokens, default=[], help="tokens that end an answer")
    command.add_argument(
        "--workspace-mb", type=evidence.positive, help="most memory that building may take"
    )
    options = command.parse_args(arguments)
    return evidence.run_script(lambda: _generate(Path(__file__).resolve().parent, options))


if __name__ == "__main__":
    sys.exit(main())

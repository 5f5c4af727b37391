"""llama.cpp behind a pipe, for ``bench_llm.py``: one request a line in, one answer a line out.

Runs in an environment of its own: ``CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python``.
It imports nothing of edgekit. Logits are asked for as a caller needs them: of the last token of a
prompt, of every token of a pass that verifies.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from typing import Any

import llama_cpp
import numpy as np


class Engine:
    """One model with a cache, driven through the C interface: no copy of logits is timed."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        self._path, self._threads, self._size = path, threads, context
        self._speculative: Any = None
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch = context, 512
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.length = 0

    def rewind(self, length: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1)
        self.length = length

    def step(self, tokens: list[int], *, every: bool) -> float:
        """Feed tokens, with the logits of each or of the last; seconds."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, self.length + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = every or index + 1 == len(tokens)
        start = time.perf_counter()
        failed = llama_cpp.llama_decode(self._context, batch)
        spent = time.perf_counter() - start
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}")
        self.length += len(tokens)
        return spent

    def row(self, index: int) -> Any:
        """Float32 logits of a row of the last pass."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * self.vocabulary))
        return np.frombuffer(address.contents, np.float32)

    def generate(
        self, prompt: list[int], limit: int, stops: list[int], mode: str
    ) -> dict[str, object]:
        """Greedy decoding, ``plain`` through the C interface or its own prompt ``lookup``."""
        if mode == "lookup":
            return self._lookup(prompt, limit, stops)
        self.rewind(0)
        for start in range(0, len(prompt), 512):
            self.step(prompt[start : start + 512], every=False)
        tokens = [int(self.row(-1).argmax())]
        start_time = time.perf_counter()
        while len(tokens) < limit and tokens[-1] not in stops:
            self.step(tokens[-1:], every=False)
            tokens.append(int(self.row(-1).argmax()))
        spent = time.perf_counter() - start_time
        return {"tokens": tokens, "seconds": spent, "passes": len(tokens) - 1}

    def _lookup(self, prompt: list[int], limit: int, stops: list[int]) -> dict[str, object]:
        """llama-cpp-python's own: it keeps the logits of every row, as its API asks."""
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        if self._speculative is None:
            draft = LlamaPromptLookupDecoding(max_ngram_size=3, num_pred_tokens=4)
            self._speculative = llama_cpp.Llama(
                self._path,
                n_ctx=self._size,
                n_threads=self._threads,
                n_threads_batch=self._threads,
                logits_all=True,
                draft_model=draft,
                verbose=False,
            )
        tokens: list[int] = []
        start_time = 0.0
        for token in self._speculative.generate(prompt, temp=0.0, repeat_penalty=1.0):
            if not tokens:
                start_time = time.perf_counter()
            tokens.append(int(token))
            if len(tokens) >= limit or token in stops:
                break
        return {"tokens": tokens, "seconds": time.perf_counter() - start_time, "passes": 0}


def answer(engine: Engine, asked: dict[str, Any]) -> object:
    """What the request asks for; see ``bench_llm.py``."""
    if asked["do"] == "prefill":
        engine.rewind(0)
        return engine.step(asked["tokens"], every=False)
    if asked["do"] == "pass":
        engine.rewind(asked["length"])
        return engine.step(asked["tokens"], every=True)
    if asked["do"] == "generate":
        return engine.generate(asked["prompt"], asked["limit"], asked["stops"], asked["mode"])
    if asked["do"] == "losses":
        tokens, losses, likeliest = asked["tokens"], [], []
        engine.rewind(0)
        for start in range(0, len(tokens), 64):
            part = tokens[start : start + 64]
            engine.step(part, every=True)
            for index in range(len(part)):
                following = start + index + 1
                if following < len(tokens):
                    row = engine.row(index).astype(np.float64)
                    top = row.max()
                    total = math.log(float(np.exp(row - top).sum()))
                    losses.append(total + top - row[tokens[following]])
                    likeliest.append(int(row.argmax()))
        return {"losses": losses, "likeliest": likeliest}
    raise ValueError(asked["do"])


def main() -> None:
    """Serve until the pipe closes."""
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    engine = Engine(path, threads, context)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

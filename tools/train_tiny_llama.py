"""Trains tiny-llama on this repository's own words and writes it as a Hugging Face folder.

Run from the repository root:  python tools/train_tiny_llama.py

One CPU core needs a few minutes. The text is what a commit holds: Markdown, docstrings, comments,
and the names of tests, which are sentences. The words of one file in ten are held out; their loss
is computed once, after the last step. The result depends on the commit, the seed, the options
and the versions of PyTorch and tokenizers only.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import math
import subprocess
import time
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

from edgekit.decoder import DecoderSpec
from edgekit_zoo.hugging_face import published_name
from edgekit_zoo.llama import Llama, parameter_name
from edgekit_zoo.rope import frequencies

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "models/edgekit_zoo/weights/tiny-llama"
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HELD_OUT = 10  # one file in so many
SPEC = DecoderSpec(
    layers=4,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=320,
    vocabulary=1024,
    context=512,
    epsilon=1e-5,
    rope=frequencies(32, 10000.0, {}),
)
CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16"},
    **{"num_hidden_layers": SPEC.layers, "hidden_size": SPEC.hidden, "head_dim": SPEC.head_dim},
    **{"num_attention_heads": SPEC.heads, "num_key_value_heads": SPEC.kv_heads},
    **{"intermediate_size": SPEC.ffn, "vocab_size": SPEC.vocabulary, "rope_theta": 10000.0},
    **{"max_position_embeddings": SPEC.context, "rms_norm_eps": SPEC.epsilon},
    **{"tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 2},
}


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description="Trains tiny-llama on this repository's words.")
    parser.add_argument("--commit", default="HEAD", help="whose words are read")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder to write")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a passage")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of matrices")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def read_commit(commit: str) -> dict[str, str]:
    """Markdown and Python files of a commit by their paths."""
    listed = _git("ls-tree", "-r", "--name-only", commit).splitlines()
    wanted = [path for path in listed if path.endswith((".md", ".py"))]
    return {path: _git("show", f"{commit}:{path}") for path in wanted}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def is_held_out(path: str) -> bool:
    """By a digest of the path, so that no file moves when others come or go."""
    return hashlib.sha256(path.encode()).digest()[0] % HELD_OUT == 0


def texts(path: str, content: str) -> Iterator[str]:
    """The words of a file, in pieces that stand alone; docstrings as answers to a question."""
    if path.endswith(".md"):
        yield from (part for part in content.split("\n\n") if len(part) > 40)
        return
    tree = ast.parse(content)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            name = getattr(node, "name", Path(path).stem)
            if answer := ast.get_docstring(node):
                yield _turn("user", f"What is {name}?") + _turn("assistant", answer)
            elif name.startswith("test_"):
                words = name.removeprefix("test_").replace("_", " ")
                yield words[0].upper() + words[1:] + "."
    tokens = tokenize.generate_tokens(io.StringIO(content).readline)
    comments = [t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT]
    if comments:
        yield "\n".join(comments)


def _turn(role: str, content: str) -> str:
    return f"{START}{role}\n{content}{STOP}\n"


def train_tokenizer(pieces: Sequence[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE, whose first tokens are the three that steer."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    steering = [AddedToken(text, special=True, normalized=False) for text in (END, START, STOP)]
    trainer = trainers.BpeTrainer(
        vocab_size=SPEC.vocabulary,
        special_tokens=steering,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(pieces, trainer)
    return made


def stream_of(made: tokenizers.Tokenizer, pieces: Sequence[str]) -> Tensor:
    """All pieces as one row of tokens, int64, each ended."""
    return torch.tensor([t for piece in pieces for t in (*made.encode(piece).ids, 0)])


def fresh_model(seed: int) -> Llama:
    """Random weights; what is added to the stream starts small, as GPT-2 does."""
    torch.manual_seed(seed)
    model = Llama(SPEC)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            narrow = name.endswith(("o.weight", "down.weight"))
            scale = 0.05 / math.sqrt(2 * SPEC.layers) if narrow else 0.05
            torch.nn.init.normal_(parameter, std=scale)
    return model


def loss_of(model: Llama, passages: Tensor) -> Tensor:
    """Mean of nats a token: int64 [batch, tokens + 1]."""
    logits = model(passages[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), passages[:, 1:].flatten())


@torch.no_grad()
def whole_loss(model: Llama, stream: Tensor, length: int) -> float:
    """Nats a token over all of ``stream``, in passages that begin anew."""
    total = 0.0
    parts = stream[: (len(stream) - 1) // length * length + 1]
    starts = range(0, len(parts) - 1, length)
    for start in starts:
        total += float(loss_of(model, parts[None, start : start + length + 1]))
    return total / len(starts)


def train(model: Llama, stream: Tensor, asked: argparse.Namespace) -> None:
    """AdamW with a one-cycle rate on passages from random places."""
    generator = np.random.default_rng(asked.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": asked.decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, asked.rate, total_steps=asked.steps, pct_start=0.1, cycle_momentum=False
    )
    for step in range(asked.steps):
        starts = generator.integers(0, len(stream) - asked.length - 1, asked.batch)
        passages = torch.stack([stream[s : s + asked.length + 1] for s in starts])
        loss = loss_of(model, passages)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == asked.steps - 1:
            print(f"step {step:4d}  loss {float(loss.detach()):.3f}", flush=True)


def rounded(model: Llama) -> dict[str, Tensor]:
    """The weights in float16 by their published names; the model gets them rounded too."""
    state = dict(model.named_parameters())
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in SPEC.shapes():
            parameter = state[parameter_name(name)]
            kept[published_name(name)] = parameter.detach().half().contiguous()
            parameter.copy_(kept[published_name(name)].float())
    return kept


def write(folder: Path, made: tokenizers.Tokenizer, weights: dict[str, Tensor]) -> None:
    """All files but the card, which is written by hand from the last line printed."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    made.save(str(folder / "tokenizer.json"))
    files = {
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": [0, 2]},
        "tokenizer_config.json": {
            **{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": STOP},
            **{"model_max_length": SPEC.context, "chat_template": TEMPLATE},
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write, and print the figures that the card reports."""
    asked = options(arguments)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    pieces: dict[bool, list[str]] = {True: [], False: []}
    files = read_commit(asked.commit)
    for path, content in files.items():
        pieces[is_held_out(path)] += texts(path, content)
    made = train_tokenizer(pieces[False])
    learned, held_out = (stream_of(made, pieces[held]) for held in (False, True))
    model = fresh_model(asked.seed)
    train(model, learned, asked)
    weights = rounded(model)
    write(asked.output, made, weights)
    bytes_per_token = sum(len(p.encode()) for p in pieces[True]) / len(held_out)
    losses = [whole_loss(model, stream, asked.length) for stream in (learned, held_out)]
    print(
        f"commit {_git('rev-parse', '--short', asked.commit).strip()}, seed {asked.seed}, "
        f"{asked.steps} steps of {asked.batch}x{asked.length} tokens, {len(files)} files, "
        f"{len(learned)} tokens learned from and {len(held_out)} held out "
        f"({bytes_per_token:.2f} bytes a token), wall {time.perf_counter() - started:.0f} s, "
        f"torch {torch.__version__}, {sum(p.numel() for p in model.parameters())} parameters, "
        f"loss {losses[0]:.3f} nats a token on what it learned from, {losses[1]:.3f} held out"
    )


if __name__ == "__main__":
    main()

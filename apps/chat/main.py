"""A conversation in the terminal with a bundle's language model: numpy, one runtime, tokenizers.

python main.py BUNDLE                      ask; an empty line, or Ctrl-D, ends it
python main.py BUNDLE --ask "a question"   one question, one answer
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import edgekit

Messages = list[dict[str, str]]


def answered(
    model: edgekit.TextModel, messages: Messages, sampling: edgekit.Sampling, limit: int
) -> Messages:
    """Print the answer as it comes; the conversation with it. Ctrl-C ends the answer alone."""
    said: list[str] = []
    try:
        for piece in model.stream(messages, chat=True, limit=limit, sampling=sampling):
            said.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    if model.answer is not None:
        print(f"\n[{model.answer.tokens_per_second:.1f} tokens/s]", file=sys.stderr)
    return [*messages, {"role": "assistant", "content": "".join(said)}]


def fitting(model: edgekit.TextModel, messages: Messages, room: int) -> Messages:
    """The latest messages that leave ``room`` tokens for an answer; the oldest turns go."""
    while len(messages) > 1 and len(model.encoded(messages, chat=True)) + room > model.context:
        messages = messages[2:]
    return messages


def converse(model: edgekit.TextModel, sampling: edgekit.Sampling, limit: int) -> None:
    """Questions from standard input until an empty line."""
    messages: Messages = []
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if not question.strip():
            return
        messages.append({"role": "user", "content": question})
        messages = fitting(model, messages, min(limit, model.context // 2))
        messages = answered(model, messages, sampling, limit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run once; errors are sentences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--ask", metavar="TEXT", help="one question instead of a conversation")
    parser.add_argument("--artifact", help="such as onnxruntime-int4; default: the fittest here")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=256, help="the most tokens of an answer")
    asked = parser.parse_args(arguments)
    try:
        sampling = edgekit.Sampling(asked.temperature, seed=asked.seed)
        with edgekit.TextModel(asked.bundle, asked.artifact, threads=asked.threads) as model:
            if asked.ask is None:
                converse(model, sampling, asked.limit)
            else:
                question = {"role": "user", "content": asked.ask}
                answered(model, [question], sampling, asked.limit)
    except edgekit.EdgekitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

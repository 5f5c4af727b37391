"""The arguments of every verb, and what they say."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

import edgekit
from edgekit.accuracy import METRICS
from edgekit.decode.drafters import NAMES as DRAFTERS
from edgekit.decode.sampling import Sampling
from edgekit.errors import UsageError
from edgekit.exactness import GRADES
from edgekit.gate import PREFERENCES, Budget
from edgekit.planning import Quantization
from edgekit.recipe import CPUS, METHODS, PRECISIONS
from edgekit.registry import backend_names, backend_options

Arguments = argparse.Namespace


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See: {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="edgekit", description="PyTorch models to proven edge artifacts.")
    top.add_argument("--version", action="version", version=f"edgekit {edgekit.__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON document on stdout")
    common.add_argument("--debug", action="store_true", help="show tracebacks")

    def verb(name: str, text: str) -> _Parser:
        return verbs.add_parser(name, help=text, description=text, parents=[common])

    listed = verb("list", "what there is, what is installed, what is missing")
    listed.add_argument("what", nargs="?", choices=("models", "targets"))
    verb("doctor", "versions, conflicts, and the line that repairs each")
    checked = verb("check", "every op that a target would refuse or run slowly")
    _model_arguments(checked)
    checked.add_argument("--sarif", type=Path, metavar="FILE", help="also as SARIF, for reviews")
    exported = verb("export", "make and prove artifacts")
    _model_arguments(exported)
    exported.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    exported.add_argument(
        "--samples",
        type=Path,
        help="what to prove on: .npz or folder of inputs; of a language model a text",
    )
    exported.add_argument(
        "--context", type=_positive, metavar="N", help="language models: tokens of a conversation"
    )
    exported.add_argument("--overwrite", action="store_true", help="replace the bundle DIR")
    exported.add_argument(
        "--unproven-ok",
        action="store_true",
        help="keep what failed its proof, or does not pay; the manifest says so",
    )
    _quantization_arguments(exported)
    verified = verb("verify", "prove a bundle again, on this machine")
    _bundle_arguments(verified)
    verified.add_argument(
        "--layers", action="store_true", help="every module's distance from eager; the first off"
    )
    verified.add_argument(
        "--model", help="with --layers: the MODEL that was exported, for runtimes that hide layers"
    )
    verified.add_argument("--weights", type=Path, metavar="FILE", help="with --model: its weights")
    profiled = verb("profile", "latency, load time and memory; refuses a noisy run")
    _bundle_arguments(profiled)
    profiled.add_argument("--threads", type=_positive, help="default: all cores")
    profiled.add_argument("--runs", type=_positive, default=100)
    profiled.add_argument("--noisy-ok", action="store_true", help="keep a figure made in noise")
    ran = verb("run", "run a bundle on images or .npz files")
    ran.add_argument("bundle", type=Path)
    ran.add_argument("inputs", type=Path, nargs="+", metavar="INPUT")
    ran.add_argument("--artifact", help="such as onnxruntime-fp32; default: the first")
    ran.add_argument(
        "--bits", metavar="N", help="width of an artifact made with --precision any: 4, or 4,head=8"
    )
    ran.add_argument("--top", type=_positive, default=3, help="labels to show")
    ran.add_argument("-o", "--output", type=Path, help="write the outputs of one INPUT as .npz")
    generated = verb("generate", "text from a language model's bundle, streamed")
    _generate_arguments(generated)
    spec = verb("spec", "whether speculative decoding is exact and pays on this machine")
    spec.add_argument("what", choices=("plan",), help="measure, certify, choose a drafter")
    _bundle_arguments(spec)
    spec.add_argument("--threads", type=_positive, help="default: all cores")
    spec.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts of your own, parted by empty lines"
    )
    _grade_argument(spec)
    reported = verb("report", "proofs and measurements of bundles")
    reported.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    reported.add_argument("-o", "--output", type=Path, metavar="FILE", help="write an HTML page")
    return top


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    plain = Sampling()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text in UTF-8")
    parser.add_argument("--chat", action="store_true", help="as a question, by the chat template")
    parser.add_argument("--artifact", help="such as onnxruntime-int4; default: the fittest here")
    parser.add_argument("--threads", type=_positive, help="default: all cores")
    parser.add_argument("--max-tokens", type=_positive, default=256, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=plain.temperature, help="default 0: the likeliest"
    )
    parser.add_argument("--top-k", type=int, default=plain.top_k, metavar="K", help="0: all")
    parser.add_argument("--top-p", type=float, default=plain.top_p, metavar="P", help="1: all")
    parser.add_argument("--min-p", type=float, default=plain.min_p, metavar="P", help="0: all")
    parser.add_argument("--seed", type=int, default=plain.seed, help="equal seeds, equal texts")
    parser.add_argument(
        "--drafter",
        default="auto",
        metavar="NAME",
        help=f"auto (what spec plan chose), off, {', '.join(DRAFTERS)}",
    )
    _grade_argument(parser)


def _grade_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grade",
        choices=GRADES,
        default="bitwise",
        help="what speculation is held to: bitwise (default) changes no token; numerical allows "
        "trees, and rows that differ in their last digits",
    )


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="a zoo name, path/to/file.py:factory, a Hugging Face folder or a .gguf file"
    )
    parser.add_argument(
        "--target", required=True, help=f"all, or of {', '.join(backend_names())} with commas"
    )
    parser.add_argument(
        "--precision", default="auto", help=f"auto, {', '.join(PRECISIONS)}; several with commas"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help=".safetensors, .pth or .pt")
    parser.add_argument(
        "--input",
        action="append",
        metavar="NAME=SHAPE",
        help="x=1x3x224x224, x=batch:1..8x3x224x224 or ids=1x16:int64; once for each input",
    )
    for name, option in backend_options().items():
        parser.add_argument(
            f"--{name}",
            metavar="VALUE",
            dest=f"option:{name}",
            help=f"{option.help} (default {option.default})",
        )


def _quantization_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization, and what it may cost")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="DATA",
        help="real inputs: a folder of images, or an .npz of stacked inputs",
    )
    group.add_argument(
        "--calibration-method",
        metavar="METHOD",
        help=f"how ranges are found: {', '.join(METHODS)} (default min-max)",
    )
    group.add_argument(
        "--labels",
        type=Path,
        metavar="DATA",
        help="to judge by: a folder a class, or an .npz of stacked inputs and 'labels'",
    )
    group.add_argument(
        "--metric", choices=METRICS, default="auto", help="default: top1 if --labels"
    )
    group.add_argument(
        "--max-drop", type=_amount, default=Budget().max_drop, metavar="POINTS", help="of top-1"
    )
    group.add_argument(
        "--min-sqnr",
        type=_amount,
        default=Budget().min_sqnr_db,
        metavar="DB",
        help="without labels",
    )
    group.add_argument(
        "--max-rise",
        type=_amount,
        default=Budget().max_rise,
        metavar="PERCENT",
        help="of a language model's perplexity",
    )
    group.add_argument("--prefer", choices=PREFERENCES, default="latency", help="what to win")
    group.add_argument("--cpu", default="auto", help=f"auto, {', '.join(CPUS[1:])}")
    group.add_argument(
        "--keep-float",
        action="append",
        default=[],
        metavar="NAMES",
        help="modules, ops or graph nodes (%%conv2d is the node) not to quantize, with commas",
    )
    group.add_argument("--recipe", type=Path, metavar="FILE", help="all of this as TOML")


def quantization(asked: Arguments) -> Quantization:
    """What the arguments of ``export`` say of quantization."""
    return Quantization(
        calibration=asked.calibration,
        labelled=asked.labels,
        metric=asked.metric,
        budget=Budget(asked.max_drop, asked.min_sqnr, asked.prefer, asked.max_rise),
        method=asked.calibration_method,
        cpu=asked.cpu,
        keep_float=tuple(name for names in asked.keep_float for name in names.split(",") if name),
        recipe=asked.recipe,
    )


def options(asked: Arguments) -> dict[str, str]:
    """The settings of targets that were given."""
    return {
        name.removeprefix("option:"): value
        for name, value in vars(asked).items()
        if name.startswith("option:") and value is not None
    }


def _bundle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--artifact", help="such as onnxruntime-fp32; default: all")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value

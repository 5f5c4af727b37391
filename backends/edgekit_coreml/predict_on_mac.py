"""Proves a Core ML package on a Mac, on each of its compute units, and times it there.

Run it in the artifact's folder of a bundle:

    python3 predict_on_mac.py

It needs macOS, Python 3.10, numpy and coremltools, and Pillow where the model takes an image. It
loads ``model.mlpackage`` for the CPU alone, with the GPU, with the Neural Engine, and for all
three, predicts the bundle's samples, compares every number with the eager model's, and writes
``on-device.json`` (one proof for each) and ``perf.json`` (the fastest that is proven) beside it.
Exit code: 0 all are proven, 1 one is not, 3 not possible here, 4 damaged bundle.

    python3 predict_on_mac.py --bits 4            (or 4,head=8: widths of layers)

runs a package that was exported for any bit-width at another one: it rewrites the weights' codes in
a copy, prints how far the answers are from the eager model's, and writes and demands nothing.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if sys.version_info < (3, 10):  # noqa: UP036  (the Mac's Python, not the host's)
    print("predict_on_mac.py needs Python 3.10 or newer.", file=sys.stderr)
    raise SystemExit(3)
if __package__:
    from edgekit import evidence
else:  # a script in a bundle: the copy beside it, whose hash the manifest holds
    sys.dont_write_bytecode = True  # a bundle holds what was exported and nothing else
    try:
        import evidence  # type: ignore[import-not-found,no-redef]
    except ImportError as missing:
        print(
            f"predict_on_mac.py needs numpy, and evidence.py beside it ({missing}); run it in the "
            "artifact's folder of a bundle, after: pip install numpy coremltools",
            file=sys.stderr,
        )
        raise SystemExit(3) from None

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
PACKAGE = "model.mlpackage"
WARM_UP = 10
MOST_OFF = 0.01  # of a pixel value from a whole number; more, and the sample is no picture
# What Core ML takes in place of a dtype that its arrays do not have.
FEEDS = {"float32": "float32", "bool": "float32"}


def core_ml() -> Any:
    """The coremltools module, on a Mac. Raises ``NotPossible``."""
    if platform.system() != "Darwin":
        raise evidence.NotPossible(
            f"Core ML runs on macOS and this is {platform.system()}; copy the whole bundle to a "
            "Mac and run this script there."
        )
    try:
        import coremltools
    except ImportError as cause:
        raise evidence.NotPossible(
            f"coremltools does not load ({cause}); run: pip install coremltools"
        ) from cause
    return coremltools


def describe(version: str) -> dict[str, object]:
    """This Mac, for the proof."""
    return {
        **evidence.this_machine(),
        "processor": _sysctl("machdep.cpu.brand_string") or platform.machine(),
        "model": _sysctl("hw.model"),
        "macos": platform.mac_ver()[0],
        "coremltools": version,
    }


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


class Edges:
    """Between the manifest's names and arrays and Core ML's features."""

    def __init__(self, shipped: evidence.Shipped) -> None:
        self._shipped = shipped
        provenance = shipped.entry["provenance"]
        self._names: Mapping[str, str] = provenance.get("features") or {}
        self._image: Mapping[str, Any] | None = provenance.get("image")
        self._labels = [str(label) for label in shipped.manifest["labels"]]
        self._outputs = {self._feature("output", name): name for name in shipped.outputs}

    def feed(self, sample: Mapping[str, Array]) -> dict[str, Any] | None:
        """What Core ML is given for a sample; None where that would have to be a picture."""
        feed: dict[str, Any] = {}
        for name, array in sample.items():
            if self._image is not None and name == self._image["name"]:
                value = picture(array, self._image)
                if value is None:
                    return None
            else:
                value = np.atleast_1d(array).astype(FEEDS.get(array.dtype.name, "int32"))
                if not np.array_equal(value, np.atleast_1d(array)):
                    raise evidence.NotPossible(f"input {name!r} does not fit Core ML's int32.")
            feed[self._feature("input", name)] = value
        return feed

    def _feature(self, side: str, name: str) -> str:
        return self._names.get(f"{side}.{name}", name)

    def answer(self, features: Mapping[str, Any]) -> dict[str, Array]:
        """The model's outputs under the manifest's names and dtypes; the rest is left out."""
        return self._shipped.as_declared(
            {
                self._outputs[feature]: np.asarray(value)
                for feature, value in features.items()
                if feature in self._outputs
            }
        )

    def disagreement(self, features: Mapping[str, Any]) -> str:
        """How a classifier's label differs from its own best score, or ""."""
        said = [
            str(value)
            for feature, value in features.items()
            if feature not in self._outputs and isinstance(value, (str, int, np.integer))
        ]
        scores = [
            array[0].astype(np.float64)
            for array in self.answer(features).values()
            if array.dtype.kind == "f" and array.shape == (1, len(self._labels))
        ]
        if not (said and scores and self._labels):
            return ""
        best = int(scores[0].argmax())
        if said[0] in self._labels:
            behind = scores[0][best] - scores[0][self._labels.index(said[0])]
            # The two are rounded apart: where the scores decide nothing, either is right.
            limits = self._shipped.limits
            allowed = limits.undecided or limits.max_rel_error or 0.0
            if behind <= allowed * np.ptp(scores[0]):
                return ""
        return f"The label is {said[0]!r}, the best score is that of {self._labels[best]!r}."


def picture(array: Array, image: Mapping[str, Any]) -> Any:
    """The picture that ``ImageInput.prepare`` made ``array`` of, or None if it is of none.

    Core ML takes pixels and normalises inside the model, so the sample's scaling is undone.
    """
    channels = int(image["channels"])
    if array.ndim != 4 or array.shape[:2] != (1, channels):
        return None
    mean, std = (np.array(image[key], np.float64) for key in ("mean", "std"))
    exact = (array[0].astype(np.float64).transpose(1, 2, 0) * std + mean) * 255
    pixels = np.rint(exact)
    # Written so that a NaN is no picture either.
    if not (np.abs(exact - pixels) <= MOST_OFF).all() or pixels.min() < 0 or pixels.max() > 255:
        return None
    try:
        import PIL.Image
    except ImportError as cause:
        raise evidence.NotPossible(
            f"the model takes an image and Pillow does not load ({cause}); run: pip install pillow"
        ) from cause
    whole = pixels.astype(np.uint8)
    return PIL.Image.fromarray(whole if channels == 3 else whole[:, :, 0])


class Unit:
    """The package on one compute unit: each sample's answer, a proof, the time of a run."""

    def __init__(
        self, shipped: evidence.Shipped, coremltools: Any, name: str, package: Path
    ) -> None:
        self._shipped, self._tools, self._name = shipped, coremltools, name
        self._package = package
        self._edges = Edges(shipped)

    def trial(self, device: Mapping[str, object], runs: int) -> evidence.Trial:
        """Load, predict, compare, time. What Core ML refuses is a failed proof."""
        host = {**device, "compute_unit": self._name}
        feeds = [self._edges.feed(sample) for sample in self._shipped.samples]
        notes = _notes(feeds)
        began = time.perf_counter()
        try:
            model = self._load()
            load_ms = 1e3 * (time.perf_counter() - began)
            answers = [None if feed is None else self._predict(model, feed) for feed in feeds]
        except evidence.NotPossible as refusal:
            nothing: list[Mapping[str, Array] | None] = [None] * len(feeds)
            proof = self._shipped.prove(nothing, host, notes, [str(refusal)])
            return evidence.Trial(self._name, proof)
        failures = [self._edges.disagreement(each) for each in answers if each is not None]
        got = [None if each is None else self._edges.answer(each) for each in answers]
        proof = self._shipped.prove(got, host, notes, [*filter(None, dict.fromkeys(failures))])
        times: list[float] = []
        if proof["passed"] and runs:
            times = self._time(model, next(feed for feed in feeds if feed is not None), runs)
        more = {"compute_unit": self._name}
        return evidence.Trial(self._name, proof, times, load_ms, more)

    def _load(self) -> Any:
        try:
            unit = getattr(self._tools.ComputeUnit, self._name)
            return self._tools.models.MLModel(str(self._package), compute_units=unit)
        except Exception as cause:  # coremltools raises plain Exception
            raise evidence.NotPossible(f"Core ML could not load the package: {cause}") from cause

    def _predict(self, model: Any, feed: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return dict(model.predict(dict(feed)))  # a copy: coremltools may write into it
        except Exception as cause:  # coremltools raises plain Exception
            raise evidence.NotPossible(f"Core ML could not run the package: {cause}") from cause

    def _time(self, model: Any, feed: Mapping[str, Any], runs: int) -> list[float]:
        times = []
        for run in range(WARM_UP + runs):
            began = time.perf_counter()
            self._predict(model, feed)
            if run >= WARM_UP:
                times.append(1e3 * (time.perf_counter() - began))
        return times


def _notes(feeds: Sequence[object]) -> list[str]:
    left_out = [str(index) for index, feed in enumerate(feeds) if feed is None]
    if not left_out:
        return []
    return [
        f"{len(left_out)} of {len(feeds)} samples were left out, since Core ML takes pictures and "
        f"these hold no whole pixels from 0 to 255: {', '.join(left_out)}."
    ]


def _prove(folder: Path, runs: int) -> int:
    shipped = evidence.open_shipped(folder)
    trials = _trials(shipped, folder / PACKAGE, runs)
    code = evidence.conclude(shipped, trials)
    timed = [trial for trial in trials if trial.times_ms]
    if timed:
        best = min(timed, key=lambda trial: evidence.percentile(trial.times_ms, 50))
        print(f"Fastest of the proven: {best.name}; perf.json holds its times.")
    return code


def _trials(shipped: evidence.Shipped, package: Path, runs: int) -> list[evidence.Trial]:
    coremltools = core_ml()
    device = describe(str(coremltools.__version__))
    print(f"{device['processor']}, macOS {device['macos']}")
    units = [Unit(shipped, coremltools, name, package) for name in UNITS]
    return [unit.trial(device, runs) for unit in units]


def layer_widths(layers: Sequence[str], text: str) -> dict[str, int]:
    """The width of each layer by ``4`` or ``4,head=8``; the longest name that it lies in decides.

    Raises ``NotPossible`` for what is not understood, or no layer.
    """
    asked = {"": 8}
    for part in text.split(","):
        name, _, width = part.rpartition("=")
        if width not in ("8", "6", "4", "2"):
            raise evidence.NotPossible(f"--bits {part!r}: there are 8, 6, 4 and 2, or LAYER=WIDTH.")
        asked[name] = int(width)

    def holds(name: str, layer: str) -> bool:
        return name in ("", layer) or layer.startswith(f"{name}.")

    for name in asked:
        if not any(holds(name, layer) for layer in layers):
            raise evidence.NotPossible(
                f"there is no layer {name!r}; there is: {', '.join(layers)}."
            )
    names = {layer: [name for name in asked if holds(name, layer)] for layer in layers}
    return {layer: asked[max(inside, key=len)] for layer, inside in names.items()}


def _show(folder: Path, text: str) -> int:
    """Predict with the codes at other widths, and say what was found."""
    shipped = evidence.open_shipped(folder)
    codes = shipped.entry["provenance"].get("codes")
    if codes is None:
        raise evidence.NotPossible(f"{folder.name} has one bit-width; leave --bits out.")
    places = codes["places"]
    widths = layer_widths(list(dict.fromkeys(place["layer"] for place in places)), text)
    rounding = importlib.import_module("edgekit.rounding" if __package__ else "rounding")
    files = {name: (folder / name).read_bytes() for name in {each["file"] for each in places}}
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(folder / PACKAGE, Path(scratch) / PACKAGE)
        for name, content in rounding.rewritten(files, places, widths, codes["rounding"]).items():
            (Path(scratch) / name).write_bytes(content)
        trials = _trials(shipped, Path(scratch) / PACKAGE, 0)
    for trial in trials:
        ran = trial.proof["samples"] > 0  # without samples every measure is that of no error
        found = [_found(each) for each in trial.proof["outputs"] if ran]
        print(f"{trial.name} at --bits {text}: {'; '.join(found or trial.proof['failures'])}")
    ran_somewhere = any(trial.proof["samples"] for trial in trials)
    return 0 if ran_somewhere else evidence.NotPossible.exit_code


def _found(output: Mapping[str, Any]) -> str:
    named = {"sqnr_db": "SQNR in dB", "top1_agreement": "top-1 agreement", "equal": "equal"}
    held = [f"{what} {output[key]:.4g}" for key, what in named.items() if output[key] is not None]
    exact = output["sqnr_db"] is None and output["equal"] is None
    return f"{output['output']}: {', '.join(['no error'] * exact + held)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and do the work; every failure is a sentence and an exit code."""
    command = argparse.ArgumentParser(description="Prove and time the Core ML package on this Mac.")
    command.add_argument("--runs", type=evidence.positive, default=100, help="default: 100")
    command.add_argument("--bits", help="another bit-width: 6, 4 or 2, or of layers: 4,head=8")
    options = command.parse_args(arguments)
    folder = Path(__file__).resolve().parent
    if options.bits is not None:
        return evidence.run_script(lambda: _show(folder, options.bits))
    return evidence.run_script(lambda: _prove(folder, options.runs))


if __name__ == "__main__":
    sys.exit(main())

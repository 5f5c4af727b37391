"""How far a runtime's answers are from the eager model's, and the evidence file a device writes.

Self-contained and one file on purpose: numpy and the standard library, Python 3.10. The scripts in
a bundle that run on a Jetson or a Mac carry a copy of it, since edgekit may not be installed there.
The first half measures; the second reads a bundle on a device and writes what was found into it.

What is measured, for each output, over all samples (a the artifact's value, b the eager one):

- ``max_abs_error``: the largest abs(a - b), in the output's own unit.
- ``max_rel_error``: the largest abs(a - b) / max(abs(b), typical), where ``typical`` is the
  median of the sample's non-zero abs(b), and no less than the smallest normal number of the
  precision. An element is compared with itself, unless it is a near-zero among larger ones;
  a few huge elements cannot hide the errors of the rest, as they do when one divides by the
  largest.
- ``cosine`` of the angle between a and b; ``sqnr_db`` = 10 log10(sum(b**2) / sum((a - b)**2)).
  Both are the worst sample's.
- ``top1_agreement``: for class scores (batch, classes), the share of rows whose argmax is the
  same. Rows in which the eager model itself is undecided (the two scores differ by less than
  the allowed error) are left out.
- ``equal``: for integer and boolean outputs, the share of equal elements.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Floats = NDArray[np.float64]
WORST_SQNR_DB = -999.0  # noise where there should be nothing; JSON has no infinity
ON_DEVICE, PERFORMANCE = "on-device.json", "perf.json"
NOT_PROVEN = 1  # exit code of a script whose device answers wrongly
MOST_SPREAD = 1.5  # of the 90th percentile over the median; above, a latency is noise
# What older manifests call a precision, by its weights.
_PRECISIONS = {"float32": "fp32", "float16": "fp16"}


class Refused(ValueError):
    """The bundle cannot be used as it is; the message is a sentence for the user."""

    exit_code = 4


class NotPossible(RuntimeError):
    """This machine lacks what is needed, or its runtime refuses; the message says what."""

    exit_code = 3


@dataclass(frozen=True)
class Limits:
    """What a proof demands. ``agreement`` bounds ``top1_agreement`` and ``equal``.

    None demands nothing: a quantized value may be off by more than itself where it is small.
    ``undecided`` is how close two class scores may lie, as a share of their spread, to count as
    a tie. ``smallest_normal`` is the smallest normal number of the precision: below it,
    relative errors mean nothing.
    """

    max_rel_error: float | None
    cosine: float | None
    sqnr_db: float
    agreement: float | None
    reason: str
    smallest_normal: float = 1.2e-38
    undecided: float | None = None  # None: max_rel_error
    equal: float | None = None  # bounds ``equal`` where ``agreement`` is None


@dataclass(frozen=True)
class Deviation:
    """How far one output is from the eager one; None where a measure does not apply."""

    output: str
    max_abs_error: float
    max_rel_error: float | None
    cosine: float | None
    sqnr_db: float | None
    top1_agreement: float | None
    equal: float | None


def compare(
    outputs: Sequence[str], expected: Sequence[Arrays], got: Sequence[Arrays], limits: Limits
) -> tuple[list[Deviation], list[str]]:
    """How far each output is off, and every reason why that is not a proof."""
    deviations, failures = [], []
    for name in outputs:
        wanted = [sample[name] for sample in expected]
        problem = _incomparable(name, wanted, [answer.get(name) for answer in got])
        if problem:
            failures.append(problem)
            continue
        deviation = _deviation(name, wanted, [answer[name] for answer in got], limits)
        deviations.append(deviation)
        failures += _failures(deviation, limits)
    if not expected:
        failures.append("There is no sample to compare on.")
    if not outputs:
        failures.append("There is no output to compare.")
    return deviations, failures


def _incomparable(name: str, expected: Sequence[Array], got: Sequence[Array | None]) -> str:
    """Why the two cannot be compared as numbers, or ""."""
    for index, (wanted, answer) in enumerate(zip(expected, got, strict=True)):
        if answer is None:
            return f"Output {name!r} is missing."
        if answer.shape != wanted.shape or answer.dtype != wanted.dtype:
            return (
                f"Output {name!r} on sample {index} is {answer.dtype} {answer.shape}, "
                f"eager gives {wanted.dtype} {wanted.shape}."
            )
        if not np.isfinite(wanted).all():
            return f"The eager output {name!r} on sample {index} holds NaN or infinity."
        if not np.isfinite(answer).all():
            return f"Output {name!r} on sample {index} holds NaN or infinity; eager does not."
    return ""


def _deviation(
    name: str, expected: Sequence[Array], got: Sequence[Array], limits: Limits
) -> Deviation:
    pairs = [
        (wanted.astype(np.float64), answer.astype(np.float64))
        for wanted, answer in zip(expected, got, strict=True)
    ]
    largest = max((float(np.abs(b - a).max(initial=0)) for b, a in pairs), default=0.0)
    if expected and expected[0].dtype.kind != "f":
        # Not from the pairs: float64 cannot tell large integers apart.
        same = np.concatenate([(b == a).ravel() for b, a in zip(expected, got, strict=True)])
        equal = float(same.mean()) if same.size else 1.0
        return Deviation(name, largest, None, None, None, None, equal)
    floor = limits.smallest_normal
    return Deviation(
        output=name,
        max_abs_error=largest,
        max_rel_error=max((_max_rel_error(b, a, floor) for b, a in pairs), default=0.0),
        cosine=min((_cosine(b, a) for b, a in pairs), default=1.0),
        sqnr_db=min((sqnr_db(b, a) for b, a in pairs), default=math.inf),
        top1_agreement=_top1_agreement(pairs, limits.undecided or limits.max_rel_error or 0.0),
        equal=None,
    )


def _typical(b: Floats, floor: float) -> float:
    nonzero = np.abs(b[b != 0])
    return max(float(np.median(nonzero)) if nonzero.size else 0.0, floor)


def _max_rel_error(b: Floats, a: Floats, floor: float) -> float:
    scale = np.maximum(np.abs(b), _typical(b, floor))
    return float((np.abs(a - b) / scale).max(initial=0))


def _cosine(b: Floats, a: Floats) -> float:
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    if length == 0:
        return 1.0 if np.array_equal(a, b) else 0.0
    return min(1.0, float((a * b).sum()) / length)


def sqnr_db(b: Floats, a: Floats) -> float:
    """Of ``a`` from the true ``b``: infinite where they are equal."""
    noise, signal = float(((a - b) ** 2).sum()), float((b**2).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else WORST_SQNR_DB


def _top1_agreement(pairs: Sequence[tuple[Floats, Floats]], allowed: float) -> float | None:
    """Share of rows with one argmax, ties of the eager model aside; None if not class scores."""
    if not pairs or any(b.ndim != 2 or b.shape[1] < 2 for b, _ in pairs):
        return None
    agree: list[bool] = []
    for b, a in pairs:
        rows = np.arange(len(b))
        best, chosen = b.argmax(axis=1), a.argmax(axis=1)
        margin = b[rows, best] - b[rows, chosen]
        # Against the spread, not the size: an offset common to all classes decides nothing.
        undecided = (best != chosen) & (margin <= allowed * np.ptp(b, axis=1))
        agree += list((best == chosen)[~undecided])
    return float(np.mean(agree)) if agree else None


def _failures(deviation: Deviation, limits: Limits) -> list[str]:
    checks = (
        ("maximum relative error", deviation.max_rel_error, limits.max_rel_error, False),
        ("cosine", deviation.cosine, limits.cosine, True),
        ("SQNR in dB", deviation.sqnr_db, limits.sqnr_db, True),
        ("top-1 agreement", deviation.top1_agreement, limits.agreement, True),
        ("share of equal elements", deviation.equal, limits.agreement or limits.equal, True),
    )
    return [
        f"Output {deviation.output!r}: {what} is {value:.6g}, the limit is {limit:.6g}."
        for what, value, limit, at_least in checks
        # Written so that a NaN fails too.
        if value is not None
        and limit is not None
        and not (value >= limit if at_least else value <= limit)
    ]


def digest_of(body: object) -> str:
    """The sha256 of a JSON value's canonical text."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Shipped:
    """One artifact of a bundle as a device finds it: folder, samples, limits; hashes checked.

    ``manifest`` and ``proof`` are the bundle's own JSON.
    """

    folder: Path
    manifest: dict[str, Any]
    entry: dict[str, Any]
    proof: dict[str, Any]
    samples: tuple[Arrays, ...]
    expected: tuple[Arrays, ...]

    @property
    def limits(self) -> Limits:
        """Those of the proof that the bundle was made with."""
        return Limits(**self.proof["limits"])

    @property
    def outputs(self) -> list[str]:
        """The names of what the model returns."""
        return [output["name"] for output in self.manifest["outputs"]]

    def as_declared(self, answer: Arrays) -> dict[str, Array]:
        """The outputs in the manifest's dtypes, as far as that changes no value."""
        specs = {output["name"]: output for output in self.manifest["outputs"]}
        return {
            name: _as_declared(np.asarray(array), specs[name])
            for name, array in answer.items()
            if name in specs
        }

    def prove(
        self,
        got: Sequence[Arrays | None],
        device: Mapping[str, object],
        notes: Sequence[str] = (),
        failures: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The JSON of an ``on-device`` proof of what the device answered to each sample.

        None stands for a sample that was left out, and ``notes`` say why; ``failures`` are
        reasons why this is no proof, whatever its numbers.
        """
        pairs = [pair for pair in zip(self.expected, got, strict=True) if pair[1] is not None]
        expected, answers = [wanted for wanted, _ in pairs], [answer or {} for _, answer in pairs]
        deviations, reasons = compare(self.outputs, expected, answers, self.limits)
        reasons = [*failures, *reasons]
        return {
            **self.proof,
            "level": "on-device",
            "as_written_db": None,  # of the machine that made the bundle
            "samples": len(pairs),
            "outputs": [_finite(asdict(deviation)) for deviation in deviations],
            "failures": reasons,
            "notes": list(notes),
            "host": dict(device),
            "passed": not reasons,
        }


def _as_declared(array: Array, spec: Mapping[str, Any]) -> Array:
    if not spec["shape"] and array.size == 1:
        array = array.reshape(())  # runtimes without scalars answer with one element
    wanted = np.dtype(spec["dtype"])
    with np.errstate(invalid="ignore"):  # NaN has no integer, and is then left as it is
        cast = array.astype(wanted)
    # Rounding to float32 is the declared precision; to change an integer would hide an error.
    return cast if wanted.kind == "f" or np.array_equal(cast, array) else array


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """Equal to the bit is an infinite SQNR, which JSON has not: it becomes null."""
    if fields["sqnr_db"] is not None and math.isinf(fields["sqnr_db"]):
        fields["sqnr_db"] = None
    return fields


def open_shipped(folder: Path) -> Shipped:
    """Read the artifact in ``folder`` of a bundle. Raises ``Refused``."""
    root = folder.parent
    try:
        manifest = json.loads((root / "manifest.json").read_bytes())
        if manifest.pop("digest", None) != digest_of(manifest):
            raise Refused(f"{root / 'manifest.json'} was altered; copy the bundle again, whole.")
        entry = _entry(manifest, folder.name)
        inside = [f"{folder.name}/{name}" for name in (*entry["files"], "proof.json")]
        for name in (*inside, *manifest["samples"]["files"]):
            _check(root, name, manifest["files"])
        proof = json.loads((folder / "proof.json").read_bytes())
        pairs = [_sample(root / name) for name in manifest["samples"]["files"]]
        shipped = Shipped(folder, manifest, entry, proof, *_unzipped(pairs))
        _refuse_foreign_names(shipped)
    except Refused:
        raise
    except _DAMAGE as cause:
        raise Refused(f"{root} is no whole bundle ({cause!r}); copy it again, whole.") from cause
    return shipped


# What JSON, npz files and a manifest of another form lead to.
_FORM = (KeyError, TypeError, AttributeError, RecursionError)
_DAMAGE = (*_FORM, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def _unzipped(pairs: Sequence[tuple[Arrays, Arrays]]) -> tuple[tuple[Arrays, ...], ...]:
    return tuple(sample for sample, _ in pairs), tuple(answer for _, answer in pairs)


def _refuse_foreign_names(shipped: Shipped) -> None:
    """Raise where a sample does not hold what the manifest says, or the limits do not read."""
    inputs = [spec["name"] for spec in shipped.manifest["inputs"]]
    for sample, answer in zip(shipped.samples, shipped.expected, strict=True):
        if [*sample] != inputs or [*answer] != shipped.outputs:
            raise KeyError(f"a sample does not hold {', '.join([*inputs, *shipped.outputs])}")
    _ = shipped.limits


def _entry(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the manifest says of the artifact whose folder is called ``name``."""
    for entry in manifest["artifacts"]:
        recipe = entry["recipe"]
        precision = recipe.get("precision") or _PRECISIONS[recipe["weights"]]
        if name == f"{entry['target']}-{precision}":
            return dict(entry)
    raise Refused(f"{name} is no artifact of this bundle; run the script in its own folder.")


def _check(root: Path, name: str, hashes: Mapping[str, str]) -> None:
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise Refused(f"the manifest names {name!r}, which lies outside the bundle.")
    content = (root / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != hashes[name]:
        raise Refused(f"{root / name} was altered or cut short; copy the bundle again, whole.")


def _sample(path: Path) -> tuple[Arrays, Arrays]:
    # Opened here, since numpy leaves a file open that it refuses.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        everything = {name: arrays[name] for name in arrays.files}
    parts = []
    for prefix in ("input.", "output."):
        names = [name for name in everything if name.startswith(prefix)]
        parts.append({name[len(prefix) :]: everything[name] for name in names})
    return parts[0], parts[1]


def write_evidence(folder: Path, proofs: Sequence[Mapping[str, Any]]) -> Path:
    """Keep a device's proofs beside the artifact, with a digest of their own."""
    return _write(folder / ON_DEVICE, {"proofs": [dict(proof) for proof in proofs]})


def write_measurement(
    shipped: Shipped,
    times_ms: Sequence[float],
    device: Mapping[str, object],
    load_ms: float,
    more: Mapping[str, object] | None = None,
) -> Path:
    """Keep a device's latencies beside the artifact, as ``edgekit profile`` would.

    ``more`` is kept as it is, for what one kind of device alone can tell.
    """
    p50, p90, p99 = (percentile(times_ms, percent) for percent in (50, 90, 99))
    noisy = f"the slowest tenth of the runs took {p90 / p50:.1f} times the median"
    body = {
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "noise": noisy if p90 > MOST_SPREAD * p50 else "",
        "artifact": shipped.folder.name,
        "device": str(device["processor"]),
        "threads": 0,
        "warm_load_ms": load_ms,
        "times_ms": list(times_ms),
        "host": dict(device),
        **(more or {}),
    }
    return _write(shipped.folder / PERFORMANCE, body)


def percentile(times: Sequence[float], percent: int) -> float:
    """Nearest-rank percentile: always one of the times."""
    ordered = sorted(times)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def _write(path: Path, body: dict[str, Any]) -> Path:
    text = json.dumps({**body, "digest": digest_of(body)}, indent=1, allow_nan=False) + "\n"
    return write_beside(path, text.encode())


def write_beside(path: Path, content: bytes) -> Path:
    """Write next to ``path``, then rename: the old file or the new, never a part of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as cause:
        raise NotPossible(f"{path} could not be written: {cause.strerror or cause}.") from cause
    finally:
        temporary.unlink(missing_ok=True)
    return path


def this_machine() -> dict[str, object]:
    """What any machine can say of itself; a script puts its own ``processor`` in."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": platform.processor() or "unknown",
        "features": [],
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Trial:
    """What a device, or one unit of it, answered; ``times_ms`` is () where it was not timed."""

    name: str
    proof: Mapping[str, Any]
    times_ms: Sequence[float] = ()
    load_ms: float = 0.0
    more: Mapping[str, object] = field(default_factory=dict)

    def row(self) -> list[str]:
        """Cells for people: what the table of ``conclude`` shows."""
        timed = bool(self.times_ms)
        errors = ("max_abs_error", "max_rel_error")
        worst = (max((o[e] or 0.0 for o in self.proof["outputs"]), default=None) for e in errors)
        return [
            self.name,
            "on-device" if self.proof["passed"] else "not proven",
            *("-" if error is None else f"{error:.1e}" for error in worst),
            *(f"{percentile(self.times_ms, p):.3f} ms" if timed else "-" for p in (50, 90)),
            f"{self.load_ms:.1f} ms",
        ]


def conclude(shipped: Shipped, trials: Sequence[Trial]) -> int:
    """Write the proofs and the fastest proven latency into the bundle, print both.

    Returns the exit code: ``NOT_PROVEN`` unless every trial is a proof.
    """
    write_evidence(shipped.folder, [trial.proof for trial in trials])
    header = ["device", "proof", "max abs", "max rel", "p50", "p90", "load"]
    rows = [header, *(trial.row() for trial in trials)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    for note in dict.fromkeys(note for trial in trials for note in trial.proof["notes"]):
        sys.stdout.write(f"Note: {note}\n")
    for trial in trials:
        for failure in trial.proof["failures"]:
            sys.stderr.write(f"{trial.name} is not proven: {failure}\n")
    timed = [trial for trial in trials if trial.proof["passed"] and trial.times_ms]
    if timed:
        best = min(timed, key=lambda trial: percentile(trial.times_ms, 50))
        host = best.proof["host"]
        write_measurement(shipped, best.times_ms, host, best.load_ms, best.more)
    return 0 if all(trial.proof["passed"] for trial in trials) else NOT_PROVEN


def positive(text: str) -> int:
    """An option's value: a whole number above 0."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def run_script(work: Callable[[], int]) -> int:
    """Do a script's ``work``; what stops it is a sentence on stderr and an exit code."""
    try:
        return work()
    except (Refused, NotPossible) as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.exit_code
    except MemoryError:
        sys.stderr.write("There is too little memory; close what else runs and try again.\n")
        return NotPossible.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("Stopped; what was in the bundle before is unchanged.\n")
        return 130

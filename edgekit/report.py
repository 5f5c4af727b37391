"""Bundles as one HTML page that needs nothing else: proofs, sizes, and the latencies drawn."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from edgekit.bundle import Bundle
from edgekit.gate import Attempt
from edgekit.render import size_text
from edgekit.speculation import plans
from edgekit.verify import LEVELS

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;text-align:left;"
    "border-bottom:1px solid #ddd}td.n{text-align:right;font-variant-numeric:tabular-nums}"
    ".no{color:#b00;font-weight:600}svg{display:block}small{color:#666}"
)
_WIDTH, _HEIGHT, _BINS = 360, 60, 60


def html_report(bundles: Sequence[Bundle]) -> str:
    """The whole page. Everything that comes from a bundle is escaped."""
    body = "\n".join(_section(bundle) for bundle in bundles)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return (
        f"<!doctype html><html lang=en><head>{head}<title>edgekit report</title>"
        f"<style>{_STYLE}</style></head><body><h1>edgekit report</h1>\n{body}\n</body></html>\n"
    )


def _section(bundle: Bundle) -> str:
    manifest = bundle.manifest
    columns = ("target", "precision", "proof", "max abs", "max rel", "size", "p50", "latency")
    header = "".join(f"<th>{name}</th>" for name in columns)
    rows = "\n".join(_row(bundle, name) for name in bundle.artifacts)
    overrides = "".join(f"<p class=no>{escape(text)}</p>" for text in manifest.overrides)
    return (
        f"<h2>{escape(manifest.model)}</h2>\n<p>{escape(str(bundle.folder))}, from "
        f"{escape(manifest.source)}; {_proven_on(bundle)}</p>\n{overrides}"
        f"<table><tr>{header}</tr>\n{rows}</table>{_language(bundle)}{_speculation(bundle)}{_tried(bundle)}"
    )


def _proven_on(bundle: Bundle) -> str:
    manifest = bundle.manifest
    count = "" if manifest.language else f"{len(manifest.samples)} samples: "
    return f"{count}{escape(manifest.samples_source)}"


def _language(bundle: Bundle) -> str:
    """Of a language model: perplexity and agreement, and the cost of wider passes, drawn."""
    if bundle.manifest.language is None:
        return ""
    columns = ("artifact", "perplexity", "eager", "foreseen", "decode", "prefill", "T(N) / T(1)")
    header = "".join(f"<th>{name}</th>" for name in columns)
    rows = "".join(_language_row(bundle, name) for name in bundle.artifacts)
    return f"<h3>Language</h3><table><tr>{header}</tr>{rows}</table>"


def _language_row(bundle: Bundle, name: str) -> str:
    decoding, measured = bundle.proof(name).decoding, bundle.measurement(name)
    numbers = ["-", "-", "-"]
    if decoding is not None:
        share = decoding.agreed / max(decoding.tokens, 1)
        numbers = [f"{decoding.perplexity:.3f}", f"{decoding.eager_perplexity:.3f}", f"{share:.2%}"]
    rates: list[str] = ["not measured", "not measured"]
    curve = ""
    if measured is not None:
        found: Any = measured
        names = ("decode_tokens_per_second", "prefill_tokens_per_second")
        rates = [f"{found[rate]:.0f} tokens/s" for rate in names]
        curve = "".join(_curve(length, times) for length, times in found["passes_ms"].items())
    cells = "".join(f"<td class=n>{number}</td>" for number in (*numbers, *rates))
    return f"<tr><td>{escape(name)}</td>{cells}<td>{curve}</td></tr>"


def _curve(length: str, times: dict[str, float]) -> str:
    """T(N) against T(1): a line that stays low is what speculative decoding needs."""
    ratios = {int(width): each / times["1"] for width, each in times.items()}
    last, highest = max(ratios), max(ratios.values())
    points = " ".join(
        f"{_WIDTH * width / last:.1f},{_HEIGHT * (1 - ratio / highest):.1f}"
        for width, ratio in ratios.items()
    )
    words = ", ".join(f"{width}: {ratio:.2f}" for width, ratio in ratios.items())
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="T(N)">'
        f'<polyline points="{points}" fill="none" stroke="#369" stroke-width="2"/></svg>'
        f"<small>{escape(length)} tokens cached; {words}</small>"
    )


def _speculation(bundle: Bundle) -> str:
    """What was planned for each artifact and grade, the predicted speed-up drawn as a bar."""
    rows = [
        "".join(
            f"<td>{cell}</td>"
            for cell in (
                escape(name),
                escape(grade if plan.certificate.granted else f"{grade}: refused"),
                f"{plan.certificate.equal} of {plan.certificate.texts}",
                escape(each.drafter + (", chosen" if each.drafter == plan.chosen else "")),
                _bar(each.predicted.speedup, each.predicted.low, each.predicted.high),
                f"{each.measured:.2f}x",
            )
        )
        for name in bundle.artifacts
        for grade, plan in plans(bundle, name).items()
        for each in plan.candidates
    ]
    if not rows:
        return ""
    columns = ("artifact", "grade", "texts equal to plain", "drafter", "predicted", "measured")
    header = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f"<h3>Speculation</h3><table><tr>{header}</tr>\n{body}</table>"


def _tried(bundle: Bundle) -> str:
    """Everything that was tried for the bundle, the speed against float drawn as a bar."""
    attempts = bundle.tried()
    if not attempts:
        return ""
    columns = ("tried", "top-1", "SQNR", "speed against float", "model", "verdict", "why")
    header = "".join(f"<th>{name}</th>" for name in columns)
    return f"<h3>Tried</h3><table><tr>{header}</tr>\n{''.join(map(_attempt, attempts))}</table>"


def _attempt(attempt: Attempt) -> str:
    speed = attempt.speed
    cells = (
        f"{attempt.accuracy.percent:.2f} %" if attempt.accuracy else "-",
        f"{attempt.sqnr_db:.1f} dB" if attempt.sqnr_db is not None else "-",
        _bar(speed.ratio, speed.low, speed.high) if speed else "-",
        size_text(attempt.size_bytes) if attempt.size_bytes else "-",
    )
    numbers = "".join(f"<td class=n>{cell}</td>" for cell in cells)
    kept = f" ({len(attempt.recipe.keep_float)} float)" if attempt.recipe.keep_float else ""
    return (
        f"<tr><td>{escape(attempt.artifact)}{kept}</td>{numbers}<td>{escape(attempt.verdict)}</td>"
        f"<td>{escape(attempt.reason)}</td></tr>\n"
    )


def _bar(ratio: float, low: float, high: float) -> str:
    """A speed as a bar, its spread as a line, what it is compared with as a mark at 1."""
    per = 60  # pixels for a speed of 1
    words = f"{ratio:.2f}x ({low:.2f} to {high:.2f})"
    return (
        f'<svg width="{max(high, 1.0) * per + 4:.0f}" height="14" role="img" aria-label="{words}">'
        f'<rect y="3" width="{ratio * per:.1f}" height="8" fill="#369"/>'
        f'<path d="M{low * per:.1f} 7H{high * per:.1f}" stroke="#000"/>'
        f'<path d="M{per} 0V14" stroke="#b00"/></svg><small>{words}</small>'
    )


def _row(bundle: Bundle, name: str) -> str:
    artifact, proof = bundle.artifact(name), bundle.proof(name)
    measured = bundle.measurement(name)
    standing = bundle.standing(name)
    level = escape(standing) if standing in LEVELS else f"<span class=no>{escape(standing)}</span>"
    numbers = (
        *proof.errors(),
        size_text(artifact.size),
        f"{measured['p50_ms']:.3f} ms" if measured else "not measured",
    )
    cells = "".join(f"<td class=n>{number}</td>" for number in numbers)
    return (
        f"<tr><td>{escape(artifact.target)}</td><td>{artifact.recipe.precision}</td>"
        f"<td>{level}</td>{cells}<td>{_histogram(measured) if measured else ''}</td></tr>"
    )


def _histogram(measured: dict[str, Any]) -> str:
    """Raw times as bars up to the 99th percentile; what is slower is counted in words."""
    times, last = measured["times_ms"], measured["p99_ms"]
    first = min(times)
    step = (last - first) / _BINS or 1.0
    counts = [0] * (_BINS + 1)
    for time in times:
        if time <= last:
            counts[int((time - first) / step)] += 1
    wide, high = _WIDTH / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{index * wide:.1f}" y="{_HEIGHT * (1 - count / high):.1f}" '
        f'width="{wide - 0.5:.1f}" height="{_HEIGHT * count / high:.1f}" fill="#369"/>'
        for index, count in enumerate(counts)
        if count
    )
    noise = f"; {escape(str(measured['noise']))}" if measured["noise"] else ""
    # A script on a device counts no threads: its runtime takes what it likes.
    threads = measured["threads"]
    where = f"{threads} threads" if threads else str(measured["device"])
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="histogram">{bars}</svg>'
        f"<small>{first:.3f} to {last:.3f} ms (p99), {len(times)} runs, "
        f"{escape(where)}{noise}</small>"
    )

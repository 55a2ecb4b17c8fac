"""The curves of a run's report: which metrics share a chart, as SVG text and as one PNG file."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MAX_POINTS = 400
"""Longer curves are averaged in this many stretches."""

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 10, 26
_TICKS = 4
_NOISY_POINTS = 30
_MAX_SMOOTHING_REACH = 20

Colour = Literal["blue", "green", "red", "amber", "violet"]
COLOURS: dict[Colour, tuple[str, str]] = {
    "blue": ("#2f6fde", "#6ea3ff"),
    "green": ("#1f9d6b", "#4fd1a0"),
    "red": ("#d1453b", "#ff7d72"),
    "amber": ("#c98412", "#f0b64c"),
    "violet": ("#7d55c7", "#b394f4"),
}
"""On a light and on a dark page."""

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric in a chart."""

    key: str
    """The metric's name in metrics.jsonl."""
    label: str
    colour: Colour


@dataclass(frozen=True, slots=True)
class Chart:
    """Metrics that are shown on one pair of axes."""

    title: str
    unit: Literal["share", "number"]
    """A share has the axis 0 to 100 %."""
    curves: tuple[Curve, ...]
    note: str = ""
    starts_at_zero: bool = True


MAIN_CHARTS = (
    Chart(
        "Accuracy",
        "share",
        (
            Curve("eval/pass@1", "pass@1, held out", "blue"),
            Curve("eval/cons@k", "cons@k, held out", "violet"),
            Curve("reward/accuracy", "training", "amber"),
            Curve("reward/code", "training, programs", "green"),
        ),
        note="counterpart of figure 2 of the DeepSeek-R1 paper",
    ),
    Chart(
        "Response length (tokens)",
        "number",
        (
            Curve("length/mean", "all", "blue"),
            Curve("length/correct", "right", "green"),
            Curve("length/wrong", "wrong", "red"),
        ),
        note="counterpart of figure 3 of the DeepSeek-R1 paper",
    ),
    Chart(
        "Reflection rate",
        "share",
        (
            Curve("reflection_rate", "training", "amber"),
            Curve("eval/reflection_rate", "held out", "blue"),
        ),
        note="completions with a word such as wait, check, mistake",
    ),
)

OTHER_CHARTS = (
    Chart(
        "Reward",
        "number",
        (
            Curve("reward/mean", "total", "blue"),
            Curve("reward/accuracy", "accuracy", "green"),
            Curve("reward/format", "format", "amber"),
        ),
    ),
    Chart(
        "Other parts of the reward, before their weights",
        "number",
        (
            Curve("reward/code", "programs", "green"),
            Curve("reward/language", "language", "blue"),
            Curve("reward/overlong", "overlong", "red"),
            Curve("reward/length", "length", "amber"),
            Curve("reward/repetition", "repetition", "violet"),
        ),
        starts_at_zero=False,
    ),
    Chart(
        "Answers without a proper grade",
        "share",
        (
            Curve("grade/accuracy/no_answer", "none in its place", "blue"),
            Curve("grade/accuracy/parse_fail", "not readable", "amber"),
            Curve("grade/accuracy/timeout", "took too long", "red"),
            Curve("grade/accuracy/crash", "crashed the grader", "violet"),
        ),
        note="all of them count as wrong",
    ),
    Chart(
        "Response length, held out (tokens)",
        "number",
        (
            Curve("eval/length/mean", "all", "blue"),
            Curve("eval/length/correct", "right", "green"),
            Curve("eval/length/wrong", "wrong", "red"),
        ),
    ),
    Chart(
        "Groups and completions set aside",
        "share",
        (
            Curve("zero_spread_fraction", "groups of equal reward", "violet"),
            Curve("truncated_fraction", "cut off", "red"),
        ),
    ),
    Chart("Entropy (nats per token)", "number", (Curve("entropy", "entropy", "blue"),)),
    Chart("KL to the reference (nats per token)", "number", (Curve("kl", "kl", "violet"),)),
    Chart(
        "Clip fraction of the tokens",
        "number",
        (
            Curve("clip_fraction", "both sides", "amber"),
            Curve("clip_fraction/low", "low", "red"),
            Curve("clip_fraction/high", "high", "green"),
        ),
    ),
    Chart("Gradient norm", "number", (Curve("grad_norm", "norm", "blue"),)),
    Chart("Loss", "number", (Curve("loss", "loss", "blue"),), starts_at_zero=False),
    Chart("Learning rate", "number", (Curve("learning_rate", "rate", "blue"),)),
    Chart(
        "Seconds by phase",
        "number",
        (
            Curve("seconds/rollout", "rollout", "blue"),
            Curve("seconds/score", "score", "amber"),
            Curve("seconds/update", "update", "green"),
            Curve("seconds/eval", "evaluation", "violet"),
        ),
    ),
    Chart("Tokens per second", "number", (Curve("tokens_per_second", "tokens/s", "blue"),)),
    Chart(
        "Sampler against trainer (nats per token)",
        "number",
        (
            Curve("sampler/logprob_gap_mean", "mean log-probability gap", "red"),
            Curve("sampler/logprob_gap_max", "largest", "amber"),
        ),
    ),
)


def curve_points(records: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(step, value) of a metric where it has one, thinned to MAX_POINTS by averaging stretches."""
    points = [
        (float(record["step"]), float(record[key]))
        for record in records
        if record.get(key) is not None
    ]
    if len(points) <= MAX_POINTS:
        return points
    edges = [round(i * len(points) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    stretches = [points[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [
        (stretch[-1][0], sum(value for _, value in stretch) / len(stretch)) for stretch in stretches
    ]


def smoothed(points: Points) -> Points:
    """Centred means, which do not lag behind; at the ends they reach to one side only."""
    reach = min(_MAX_SMOOTHING_REACH, max(2, len(points) // 20))
    sums = list(itertools.accumulate((value for _, value in points), initial=0.0))
    result = []
    for at, (step, _) in enumerate(points):
        first, end = max(at - reach, 0), min(at + reach + 1, len(points))
        result.append((step, (sums[end] - sums[first]) / (end - first)))
    return result


def chart_svg(chart: Chart, curves: Mapping[str, Points], last_step: float) -> str:
    """The chart as an <svg> element; noisy curves are drawn pale, with their mean on top."""
    low, high = value_range(chart, [value for points in curves.values() for _, value in points])
    ticks = _ticks(low, high)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_attribute(chart.title)}">'
    ]
    for tick in ticks:
        y = _y(tick, low, high)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">'
            f"{tick_label(tick, chart.unit, ticks)}</text>"
        )
    for tick in _ticks(0, max(last_step, 1)):
        x = _x(tick, last_step)
        parts.append(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{tick:g}</text>')
    for curve in chart.curves:
        points = curves.get(curve.key, [])
        is_noisy = len(points) > _NOISY_POINTS
        if is_noisy:
            parts.append(_line(points, last_step, low, high, f"{curve.colour} pale"))
        drawn = smoothed(points) if is_noisy else points
        parts.append(_line(drawn, last_step, low, high, curve.colour))
        if 0 < len(points) <= _NOISY_POINTS:
            parts += [
                f'<circle class="{curve.colour}" cx="{_x(step, last_step)}" '
                f'cy="{_y(value, low, high)}" r="2.4"/>'
                for step, value in points
            ]
    parts.append("</svg>")
    return "".join(parts)


def value_range(chart: Chart, values: Sequence[float]) -> tuple[float, float]:
    """The ends of the value axis: 0 to 1 for shares, else round numbers around the values."""
    if chart.unit == "share":
        return 0.0, 1.0
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if chart.starts_at_zero:
        low = min(low, 0.0)
    if low == high:
        low, high = (low, low + 1) if low >= 0 else (low - 1, low)
    step = _round_step(high - low)
    return math.floor(low / step) * step, math.ceil(high / step) * step


def tick_label(value: float, unit: str, ticks: Sequence[float]) -> str:
    """A short text for a tick, with as many digits as tell it from its neighbours."""
    if unit == "share":
        return f"{100 * value:.0f}%"
    largest = max(abs(tick) for tick in ticks)
    if largest >= 10_000:
        return f"{value / 1000:g}k"
    if value and largest < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{round(value, 6):g}"


def write_curves_png(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The three main charts side by side as a PNG file.

    Source: DeepSeek-R1, arXiv 2501.12948, figures 2 and 3.
    """
    # Imported here because it takes most of a second; no pyplot, whose state is global.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(13, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, chart in zip(figure.subplots(1, len(MAIN_CHARTS)), MAIN_CHARTS, strict=True):
        for curve in chart.curves:
            points = curve_points(records, curve.key)
            if not points:
                continue
            colour = COLOURS[curve.colour][0]
            is_noisy = len(points) > _NOISY_POINTS
            if is_noisy:
                axes.plot(*zip(*points, strict=True), color=colour, alpha=0.2, linewidth=1)
            drawn = smoothed(points) if is_noisy else points
            marker = None if is_noisy else "o"
            axes.plot(
                *zip(*drawn, strict=True),
                color=colour,
                marker=marker,
                markersize=3.5,
                label=curve.label,
            )
        if chart.unit == "share":
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(chart.title, fontsize=12, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def _line(points: Points, last_step: float, low: float, high: float, classes: str) -> str:
    if len(points) < 2:
        return ""
    path = " ".join(f"{_x(step, last_step)},{_y(value, low, high)}" for step, value in points)
    return f'<polyline class="{classes}" points="{path}"/>'


def _x(step: float, last_step: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * step / max(last_step, 1), 1)


def _y(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low)
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)


def _round_step(span: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that cuts the span in at most _TICKS."""
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * _TICKS >= span * (1 - 1e-9))


def _ticks(low: float, high: float) -> list[float]:
    step = _round_step(high - low)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _attribute(text: str) -> str:
    return html.escape(text, quote=True)

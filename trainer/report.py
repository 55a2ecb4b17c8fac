"""The report of a run: `curves.png` and one self-contained `report.html` in its run directory.

    python trainer/report.py RUN_DIR

Both are replaced as a whole, so they can be rebuilt, and looked at, while the run goes on. The
page stays small however long the run is: curves are thinned and the browser of samples holds a few
problems at a few steps.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.durable import write_atomically
from trainer.monitors import R1_REFLECTION
from trainer.report_charts import (
    MAIN_CHARTS,
    OTHER_CHARTS,
    Chart,
    Points,
    chart_svg,
    curve_points,
    write_curves_png,
)
from trainer.report_page import chart_card, page
from trainer.run_log import METRICS_FILE, ROLLOUTS_FOLDER, read_metrics

MAX_PROBLEMS = 8
MAX_STEPS = 10
MAX_SAMPLES = 4
MAX_COMPLETION_CHARS = 2000
MAX_READ_BYTES = 2_000_000
"""Of one rollouts file; held-out problems come in the same order, so the first ones are enough."""

_Record = Mapping[str, Any]


def write_report(run_dir: Path) -> Path:
    """Builds curves.png and report.html from what the run has written so far.

    Returns:
        The path of report.html.

    Raises:
        ValueError: the directory holds no metrics, or a damaged line.
    """
    path = write_page(run_dir)
    temporary = run_dir / f".curves.png.{os.getpid()}"
    write_curves_png(temporary, read_metrics(run_dir))
    os.replace(temporary, run_dir / "curves.png")
    return path


def write_page(run_dir: Path) -> Path:
    """Builds report.html only, which takes a tenth of the time: for use while the run goes on.

    Raises:
        ValueError: as `write_report`.
    """
    if not (run_dir / METRICS_FILE).is_file():
        raise ValueError(f"run_dir: expected a run directory with {METRICS_FILE}, got {run_dir}")
    path = run_dir / "report.html"
    write_atomically(path, _html(run_dir, read_metrics(run_dir)))
    return path


def _html(run_dir: Path, records: Sequence[_Record]) -> str:
    last_step = max((record["step"] for record in records), default=0)
    cards: list[str] = []
    chart_data: list[dict[str, object]] = []
    for chart in (*MAIN_CHARTS, *OTHER_CHARTS):
        curves = {curve.key: curve_points(records, curve.key) for curve in chart.curves}
        if any(curves.values()):
            cards.append(_card(len(cards), chart, curves, last_step))
            chart_data.append(_chart_data(chart, curves))
    return page(
        title=f"Run {run_dir.resolve().name}",
        subtitle=f"after step {last_step}" if records else "no step yet",
        tiles=_tiles(records),
        charts=cards,
        config=_config(run_dir),
        data={"charts": chart_data, "last_step": last_step, "browser": _browser(run_dir)},
    )


def _card(index: int, chart: Chart, curves: Mapping[str, Points], last_step: float) -> str:
    legend = [(curve.colour, curve.label) for curve in chart.curves if curves[curve.key]]
    svg = chart_svg(chart, curves, last_step)
    return chart_card(index, chart.title, chart.note, legend, svg)


def _chart_data(chart: Chart, curves: Mapping[str, Points]) -> dict[str, object]:
    return {
        "unit": chart.unit,
        "curves": [
            {
                "label": curve.label,
                "points": [(step, float(f"{value:.5g}")) for step, value in curves[curve.key]],
            }
            for curve in chart.curves
        ],
    }


def _tiles(records: Sequence[_Record]) -> list[tuple[str, str, str]]:
    """Headline numbers as (label, value, change)."""
    tiles = []
    for label, keys, is_share in (
        ("pass@1, held out", ("eval/pass@1",), True),
        ("cons@k, held out", ("eval/cons@k",), True),
        ("response length, tokens", ("eval/length/mean", "length/mean"), False),
        ("reflection rate", ("eval/reflection_rate", "reflection_rate"), True),
    ):
        values = next(filter(None, (_values(records, key) for key in keys)), [])
        if not values:
            continue
        start, end = values[0], values[-1]
        if is_share:
            shown = f"{100 * start:.1f} \u2192 {100 * end:.1f} %"
            change = f"{100 * (end - start):+.1f} points"
        else:
            digits = 1 if max(start, end) < 100 else 0
            shown = f"{start:.{digits}f} \u2192 {end:.{digits}f}"
            change = f"{end / start:.2f} times" if start else ""
        tiles.append((label, shown, change))
    seconds = sum(
        value
        for record in records
        for key, value in record.items()
        if key.startswith("seconds/") and value is not None
    )
    if seconds:
        rates = _values(records, "tokens_per_second")
        rate = f"{sum(rates) / len(rates):,.0f} tokens/s" if rates else ""
        tiles.append(("time in all phases", _duration(seconds), rate))
    return tiles


def _values(records: Sequence[_Record], key: str) -> list[float]:
    return [value for record in records if (value := record.get(key)) is not None]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _config(run_dir: Path) -> list[tuple[str, str]]:
    path = run_dir / "config.json"
    if not path.is_file():
        return []
    return list(_flat(json.loads(path.read_text(encoding="utf-8"))))


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _browser(run_dir: Path) -> dict[str, object]:
    """Problems with their samples over the steps, from held-out files where there are any."""
    for kind, hint in (
        ("eval", "The first held-out problems, the same ones at every evaluation; none is picked."),
        ("step", "Training problems that came up most often."),
    ):
        files = _spread(_rollout_files(run_dir, kind), MAX_STEPS)
        if files:
            return {"hint": hint, "words": R1_REFLECTION.words, "problems": _problems(files)}
    return {"hint": "", "words": R1_REFLECTION.words, "problems": []}


def _rollout_files(run_dir: Path, kind: str) -> list[tuple[int, Path]]:
    name = re.compile(rf"{kind}-(\d+)\.jsonl")
    folder = run_dir / ROLLOUTS_FOLDER
    found = [
        (int(match.group(1)), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := name.fullmatch(path.name))
    ]
    return sorted(found)


def _spread(files: list[tuple[int, Path]], count: int) -> list[tuple[int, Path]]:
    """At most `count` of the files, evenly spread, the first and the last among them."""
    if len(files) <= count:
        return files
    return [files[round(i * (len(files) - 1) / (count - 1))] for i in range(count)]


def _problems(files: Sequence[tuple[int, Path]]) -> list[dict[str, object]]:
    by_problem: dict[str, dict[int, list[dict[str, object]]]] = {}
    texts: dict[str, tuple[str, str]] = {}
    for step, path in files:
        for record in _records(path):
            problem_id = str(record["problem_id"])
            texts.setdefault(problem_id, (str(record["question"]), str(record["answer"])))
            samples = by_problem.setdefault(problem_id, {}).setdefault(step, [])
            if len(samples) < MAX_SAMPLES:
                samples.append(_shown_sample(record))
    # A stable sort: of problems seen equally often, the first come first.
    ranked = sorted(by_problem, key=lambda problem_id: -len(by_problem[problem_id]))
    return [
        {
            "problem_id": problem_id,
            "question": _shortened(texts[problem_id][0]),
            "answer": texts[problem_id][1],
            "steps": [
                {"step": step, "samples": samples}
                for step, samples in by_problem[problem_id].items()
            ],
        }
        for problem_id in ranked[:MAX_PROBLEMS]
    ]


def _records(path: Path) -> Iterator[dict[str, object]]:
    read = 0
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            read += len(line)
            if read > MAX_READ_BYTES:
                return
            yield json.loads(line)


def _shown_sample(record: Mapping[str, object]) -> dict[str, object]:
    shown = {
        name: record[name]
        for name in ("extracted", "reward", "correct", "length", "finish_reason", "mean_logprob")
    }
    return {"completion": _shortened(str(record["completion"])), **shown}


def _shortened(text: str) -> str:
    if len(text) <= MAX_COMPLETION_CHARS:
        return text
    half = MAX_COMPLETION_CHARS // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[... {left_out} characters ...]\n{text[-half:]}"


def main(arguments: Sequence[str]) -> int:
    """Command line: one run directory. Returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python trainer/report.py RUN_DIR", file=sys.stderr)
        return 2
    try:
        path = write_report(Path(arguments[0]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

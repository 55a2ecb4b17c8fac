"""Runs of several seeds side by side: `python trainer/compare_runs.py --runs LABEL=RUN_DIR ...`.

Runs with one label are seeds of the same settings. Their completions are read from the run
directories, so that everything a completion shows can be compared, also of runs that are long over.
Written are STEM.json (the value of each run), STEM.md (means and standard errors over runs) and
STEM.png (means over steps, with bands of one standard error).

A file of samples (`trainer/sample.py`) counts as a run of which only the end is known.
"""

import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from trainer.command_line import check_flag_names, one_sentence_errors
from trainer.config import UsageError, check_at_least
from trainer.durable import write_atomically
from trainer.evaluation_report import aligned
from trainer.readability import thought_consistency
from trainer.report_charts import COLOURS
from trainer.run_log import ROLLOUTS_FOLDER, Sample
from trainer.sample_files import read_samples
from trainer.templates import Template, template_by_name
from trainer.training_run import exit_code_of

Measure = Callable[[Sample, Template], float | None]
MEASURES: dict[str, tuple[str, Measure]] = {
    "accuracy": ("right", lambda one, _: float(one.correct)),
    "consistency": (
        "language consistency",
        lambda one, template: thought_consistency(one.question, one.completion, template),
    ),
    "length": ("tokens", lambda one, _: float(one.length)),
    "length/correct": ("tokens, right", lambda one, _: one.length if one.correct else None),
    "length/wrong": ("tokens, wrong", lambda one, _: None if one.correct else one.length),
    "truncated": ("truncated", lambda one, _: float(one.finish_reason == "length")),
}
"""Title and value of a completion, by name; completions without a value leave the mean."""

Curves = dict[str, dict[int, float]]
"""Value by measure and step."""
NO_STEP = -1
"""In place of the step where there is only a file of samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """Compares runs of several seeds by what their completions show."""

    runs: tuple[str, ...]
    """Run directories or files of samples, LABEL=PATH each; those with one label are averaged."""
    out: Path
    """What is written, without the suffixes .json, .md and .png."""
    template: str = "tiny"
    """Prompt template of the runs, which says where the thought stands."""
    samples: Literal["held-out", "training"] = "held-out"
    """Completions of the evaluations, or those that were trained on."""
    measures: tuple[str, ...] = tuple(MEASURES)
    """What to compare."""
    every: int = 10
    """Steps whose training completions are taken together; 10 makes 1 to 10 the point 10."""
    until: int | None = None
    """Last step to compare; None compares all there are."""

    def __post_init__(self) -> None:
        check_at_least("--every", self.every, 1)
        check_at_least("--until", self.until, 0)
        for name in self.measures:
            if name not in MEASURES:
                raise ValueError(f"--measures: expected some of {', '.join(MEASURES)}, got {name}")
        for text in self.runs:
            if not all(text.partition("=")):
                raise ValueError(f"--runs: expected LABEL=PATH, got {text!r}")

    @property
    def paths(self) -> dict[str, list[Path]]:
        """Runs by label, in the order they were given."""
        paths: dict[str, list[Path]] = {}
        for text in self.runs:
            label, _, path = text.partition("=")
            paths.setdefault(label, []).append(Path(path))
        return paths


def run_curves(path: Path, options: CompareOptions) -> Curves:
    """What the completions of one run show, over its steps, or at NO_STEP.

    Raises:
        UsageError: there are no completions, or a damaged file.
    """
    template = template_by_name(options.template)
    sums: dict[str, dict[int, list[float]]] = {name: {} for name in options.measures}
    found = False
    for step, samples in _samples_by_step(path, options):
        found = True
        for name in options.measures:
            values = [MEASURES[name][1](one, template) for one in samples]
            present = [value for value in values if value is not None]
            sums[name].setdefault(step, []).extend(present)
    if not found:
        raise UsageError(f"--runs: expected completions ({options.samples}) in {path}, got none")
    return {
        name: {step: statistics.fmean(values) for step, values in by_step.items() if values}
        for name, by_step in sums.items()
    }


def _samples_by_step(path: Path, options: CompareOptions) -> Iterator[tuple[int, list[Sample]]]:
    if path.is_file():
        yield NO_STEP, read_samples(path)
        return
    kind = "eval" if options.samples == "held-out" else "step"
    for file in sorted((path / ROLLOUTS_FOLDER).glob(f"{kind}-*.jsonl")):
        step = int(file.stem.removeprefix(f"{kind}-"))
        if kind == "step":
            step += -step % options.every
        if options.until is None or step <= options.until:
            yield step, read_samples(file)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over runs and its standard error; None for a single run, which tells nothing of it."""
    if len(values) < 2:
        return statistics.fmean(values), None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def gathered(curves: Sequence[Curves], measure: str) -> dict[int, list[float]]:
    """The values of all runs of a label by step; steps that a run has no value at are left out."""
    common = set.intersection(*(set(each[measure]) for each in curves))
    return {step: [each[measure][step] for each in curves] for step in sorted(common)}


def table_text(by_label: Mapping[str, Sequence[Curves]], measures: Sequence[str]) -> str:
    """A Markdown table with a line for each label and step: means and standard errors over runs."""
    lines = [["", "runs", "step", *(MEASURES[name][0] for name in measures)]]
    for label, curves in by_label.items():
        columns = [gathered(curves, name) for name in measures]
        for step in sorted({step for column in columns for step in column}):
            shown = "end" if step == NO_STEP else str(step)
            cells = [
                _cell(name, column.get(step))
                for name, column in zip(measures, columns, strict=True)
            ]
            lines.append([label, str(len(curves)), shown, *cells])
    return aligned(lines)


def _cell(measure: str, values: Sequence[float] | None) -> str:
    if values is None:
        return "-"
    mean, error = mean_and_error(values)
    factor, unit = (1.0, "") if measure.startswith("length") else (100.0, " %")
    spread = "" if error is None else f" +- {factor * error:.1f}"
    return f"{factor * mean:.1f}{spread}{unit}"


def write_figure(
    path: Path, by_label: Mapping[str, Sequence[Curves]], measures: Sequence[str]
) -> None:
    """One chart a measure as a PNG file: means over steps with bands of one standard error, and a
    dashed line for what has no steps."""
    # Imported here because it takes most of a second; no pyplot, whose state is global.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3 * len(measures), 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    colours = itertools.cycle(light for light, _ in COLOURS.values())
    colour_of = dict(zip(by_label, colours, strict=False))
    for axes, name in zip(
        figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True
    ):
        for label, curves in by_label.items():
            found = {step: mean_and_error(each) for step, each in gathered(curves, name).items()}
            if NO_STEP in found:
                value = found[NO_STEP][0]
                axes.axhline(value, color=colour_of[label], linestyle="--", label=label)
                continue
            means = [mean for mean, _ in found.values()]
            errors = [error or 0.0 for _, error in found.values()]
            axes.plot(list(found), means, color=colour_of[label], label=label)
            low = [mean - error for mean, error in zip(means, errors, strict=True)]
            high = [mean + error for mean, error in zip(means, errors, strict=True)]
            axes.fill_between(list(found), low, high, color=colour_of[label], alpha=0.2)
        axes.set_title(MEASURES[name][0], fontsize=12, loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def compare(options: CompareOptions) -> str:
    """Writes the comparison; its table.

    Raises:
        UsageError: see `run_curves`, or an unknown template.
    """
    try:
        template_by_name(options.template)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    by_label = {
        label: [run_curves(path, options) for path in paths]
        for label, paths in options.paths.items()
    }
    values = {
        label: {name: gathered(curves, name) for name in options.measures}
        for label, curves in by_label.items()
    }
    kept = {"samples": options.samples, "runs": list(options.runs), "values": values}
    table = table_text(by_label, options.measures)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        options.out.with_name(options.out.name + ".json"), json.dumps(kept, indent=1) + "\n"
    )
    write_atomically(options.out.with_name(options.out.name + ".md"), f"{table}\n")
    write_figure(options.out.with_name(options.out.name + ".png"), by_label, options.measures)
    return table


def _run(arguments: Sequence[str]) -> None:
    names = ["help", *(option.name for option in fields(CompareOptions))]
    check_flag_names(arguments, [f"--{name.replace('_', '-')}" for name in names])
    with one_sentence_errors():
        options = tyro.cli(
            CompareOptions,
            prog="python trainer/compare_runs.py",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )
    print(compare(options))


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    return exit_code_of(_run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

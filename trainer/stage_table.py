"""The table of the R1 pipeline: what each model's samples of held-out problems look like."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from trainer.estimates import Estimate, mean, share
from trainer.evaluation_report import aligned, cell
from trainer.readability import (
    ReadabilityLimits,
    ReadableRule,
    thought_consistency,
    why_unreadable,
)
from trainer.rewards.grading import GENERAL
from trainer.run_log import Sample
from trainer.templates import Template

COLUMNS = {
    "accuracy": "right",
    "format": "in the format",
    "consistency": "language consistency",
    "readable": "readable",
    "length/mean": "tokens",
    "length/wrong": "tokens, wrong",
    "helpful": "helpful",
}
"""Names of what is stated, and their titles."""
TITLES = {
    "base": "base",
    "r1-zero": "R1-Zero",
    "dev1": "R1-Dev1",
    "dev2": "R1-Dev2",
    "dev3": "R1-Dev3",
    "rules": "R1, rules alone",
    "r1": "R1",
    "distilled": "distilled",
}

Row = dict[str, Estimate | None]


def result_rows(
    samples: Sequence[Sample],
    template: Template,
    limits: ReadabilityLimits,
    rule: ReadableRule | None = None,
    helpful: ReadableRule | None = None,
) -> Row:
    """What is stated about one model's samples, with 95 % intervals over problems.

    Keys: those of COLUMNS. The share of words of the thought in the question's language is a mean
    over the completions whose thought has enough words; `readable` is the share that passes the
    limits and the rule, right or wrong, truncated ones not; `helpful` is the share of general
    prompts' completions that satisfy the other rule. The rest is about verifiable problems alone.
    """
    verified_PK = _by_problem(one for one in samples if one.status != GENERAL)
    general_PK = _by_problem(one for one in samples if one.status == GENERAL)

    def values(value: Callable[[Sample], float | None]) -> list[list[float]]:
        return [[got for one in row if (got := value(one)) is not None] for row in verified_PK]

    def is_readable(one: Sample) -> float:
        reason = why_unreadable(one.question, one.completion, template, limits, rule)
        return float(reason is None and one.finish_reason != "length")

    return {
        "accuracy": share(values(lambda one: float(one.correct))),
        "format": share(values(lambda one: one.parts.get("format"))),
        "consistency": share(
            values(lambda one: thought_consistency(one.question, one.completion, template))
        ),
        "readable": share(values(is_readable)),
        "length/mean": mean(values(lambda one: float(one.length))),
        "length/wrong": mean(values(lambda one: None if one.correct else float(one.length))),
        "helpful": None
        if helpful is None
        else share(
            [
                [float(bool(helpful(one.question, one.completion))) for one in row]
                for row in general_PK
            ]
        ),
    }


def _by_problem(samples: Iterable[Sample]) -> list[list[Sample]]:
    by_problem: dict[str, list[Sample]] = {}
    for sample in samples:
        by_problem.setdefault(sample.problem_id, []).append(sample)
    return list(by_problem.values())


def table_text(rows: Mapping[str, Row]) -> str:
    """A Markdown table, a model a line, of the columns that have values."""
    names = [name for name in COLUMNS if any(row[name] is not None for row in rows.values())]
    body = [
        [TITLES.get(label, label), *(cell(name, row[name]) for name in names)]
        for label, row in rows.items()
    ]
    return aligned([["", *(COLUMNS[name] for name in names)], *body])


def write_figure(path: Path, rows: Mapping[str, Row]) -> None:
    """A PNG file: the shares of each model, and its lengths, with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    shares, lengths = figure.subplots(1, 2, width_ratios=(3, 2))
    places = list(range(len(rows)))
    for name, title in COLUMNS.items():
        found = [(place, row[name]) for place, row in zip(places, rows.values(), strict=True)]
        drawn = [(place, each) for place, each in found if each is not None]
        if not drawn:
            continue
        is_length = name.startswith("length/")
        scale = 1 if is_length else 100
        values = [scale * each.value for _, each in drawn]
        # A mean of few values may have no interval.
        bounds = [
            (
                each.value if each.low is None else each.low,
                each.value if each.high is None else each.high,
            )
            for _, each in drawn
        ]
        errors = [
            [value - scale * low for value, (low, _) in zip(values, bounds, strict=True)],
            [scale * high - value for value, (_, high) in zip(values, bounds, strict=True)],
        ]
        axes = lengths if is_length else shares
        axes.errorbar([place for place, _ in drawn], values, yerr=errors, marker="o", label=title)
    for axes, title in ((shares, "share of samples, %"), (lengths, "tokens of a completion")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xticks(
            places, [TITLES.get(label, label) for label in rows], rotation=35, ha="right"
        )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(COLUMNS), fontsize=8)
    # Without the date and the version, so that the same samples give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})

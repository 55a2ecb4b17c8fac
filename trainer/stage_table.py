"""The table of the R1 pipeline: what each model's samples of held-out problems look like."""

from collections.abc import Callable, Mapping, Sequence

from trainer.estimates import Estimate, mean, share
from trainer.evaluation_report import aligned, cell
from trainer.readability import (
    ReadabilityLimits,
    ReadableRule,
    thought_consistency,
    why_unreadable,
)
from trainer.run_log import Sample
from trainer.templates import Template

COLUMNS = {
    "accuracy": "right",
    "format": "in the format",
    "consistency": "language consistency",
    "readable": "readable",
    "length/mean": "tokens",
    "length/wrong": "tokens, wrong",
}
"""Names of what is stated, and their titles."""
TITLES = {
    "base": "base",
    "r1-zero": "R1-Zero",
    "dev1": "R1-Dev1",
    "dev2": "R1-Dev2",
    "dev3": "R1-Dev3",
    "r1": "R1",
    "distilled": "distilled",
}

Row = dict[str, Estimate | None]


def result_rows(
    samples: Sequence[Sample],
    template: Template,
    limits: ReadabilityLimits,
    rule: ReadableRule | None = None,
) -> Row:
    """What is stated about one model's samples, with 95 % intervals over problems.

    Keys: those of COLUMNS. The share of words of the thought in the question's language is a mean
    over the completions whose thought has enough words; `readable` is the share that passes the
    limits and the rule, right or wrong, truncated ones not.
    """
    by_problem: dict[str, list[Sample]] = {}
    for sample in samples:
        by_problem.setdefault(sample.problem_id, []).append(sample)
    samples_PK = list(by_problem.values())

    def values(value: Callable[[Sample], float | None]) -> list[list[float]]:
        return [[got for one in row if (got := value(one)) is not None] for row in samples_PK]

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
    }


def table_text(rows: Mapping[str, Row]) -> str:
    """A Markdown table, a model a line."""
    head = ["", *COLUMNS.values()]
    body = [
        [TITLES.get(label, label), *(cell(name, row[name]) for name in COLUMNS)]
        for label, row in rows.items()
    ]
    return aligned([head, *body])

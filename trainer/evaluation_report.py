"""Results of an evaluation: as JSON, as a table, and compared with those of another model."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import UsageError
from trainer.estimates import Estimate, PairedDifference, average, paired_difference
from trainer.evaluation import Estimates, pass_at_1_by_level, suite_estimates
from trainer.monitors import AnswersAgree
from trainer.samples import ScoredCompletion

RESULT_FILE = "result.json"
INTERVALS = (
    "95 %; problems are the units drawn at random. Shares: Wilson with the effective sample size. "
    "Means: normal. Average: recovered from its parts. Differences: bootstrap of problems."
)
LABELS = {
    "category/correct": "right",
    "category/incorrect": "wrong",
    "category/unformatted": "no answer",
    "category/truncated": "truncated",
    "format": "in the format",
    "reflection/r1": "reflecting (R1 words)",
    "reflection/r1_words": "R1 words a completion",
    "reflection/dr_grpo": "reflecting (Dr. GRPO)",
    "reflection/dr_grpo_words": "Dr. GRPO words",
    "reflection/dr_grpo_problems": "problems reflected on",
    "length/mean": "tokens",
    "length/correct": "tokens, right",
    "length/wrong": "tokens, wrong",
    "length/wrong_ended": "tokens, wrong, ended",
    "repetition": "repeated 4-grams",
    "language": "English words",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    """What was found on one data set."""

    problems: int
    samples: int
    """Per problem."""
    sampling: dict[str, Any]
    """Temperature, top-p and the longest completion."""
    estimates: Estimates
    """See `suite_estimates`."""
    levels: dict[str, Estimate | None]
    """pass@1 of the problems of each level."""
    statuses: dict[str, int]
    """Number of completions by the status of their grade, so that a grader's failure is never taken
    for a wrong answer."""
    scores: dict[str, float]
    """Share of right samples of each problem, by its id, in the order of the data set."""
    digest: str
    """Of questions and golds; equal for the same problems."""
    seconds: float

    @classmethod
    def of(
        cls,
        scored_PK: Sequence[Sequence[ScoredCompletion]],
        answers_agree: AnswersAgree,
        *,
        sampling: dict[str, Any],
        seconds: float,
    ) -> "SuiteResult":
        """The result of graded completions of each problem."""
        asked = [[one[0].problem.question, one[0].problem.answer] for one in scored_PK]
        return cls(
            problems=len(scored_PK),
            samples=len(scored_PK[0]),
            sampling=sampling,
            estimates=suite_estimates(scored_PK, answers_agree),
            levels={str(level): each for level, each in pass_at_1_by_level(scored_PK).items()},
            statuses=dict(Counter(one.reward.status for row in scored_PK for one in row)),
            scores={
                row[0].problem.problem_id: sum(one.reward.correct for one in row) / len(row)
                for row in scored_PK
            },
            digest=hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest(),
            seconds=seconds,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SuiteResult":
        """The result that `dataclasses.asdict` made JSON values of."""
        read = dict(values)
        for name in ("estimates", "levels"):
            read[name] = {key: each and Estimate(**each) for key, each in values[name].items()}
        return cls(**read)


def result_text(
    settings: Mapping[str, Any], versions: Mapping[str, str], results: Mapping[str, SuiteResult]
) -> str:
    """The content of RESULT_FILE."""
    content = {
        "settings": settings,
        "versions": versions,
        "intervals": INTERVALS,
        "average": averages(results),
        "suites": results,
    }
    return json.dumps(content, indent=1, default=asdict) + "\n"


def read_result(folder: Path) -> tuple[dict[str, Any], dict[str, SuiteResult]]:
    """Settings and results of an evaluation that is complete.

    Raises:
        UsageError: the folder holds none, or one of another version.
    """
    try:
        content = json.loads((folder / RESULT_FILE).read_text())
        suites = {name: SuiteResult.from_json(each) for name, each in content["suites"].items()}
        return content["settings"], suites
    except OSError as error:
        raise UsageError(f"{folder}: expected the folder of an evaluation ({error})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{folder / RESULT_FILE}: not a result of this version ({error!r})"
        ) from error


def averages(results: Mapping[str, SuiteResult]) -> Estimates:
    """The unweighted mean over data sets of all that every one of them has; empty for one."""
    if len(results) < 2:
        return {}
    all_estimates = [each.estimates for each in results.values()]
    return {
        name: average([each for one in all_estimates if (each := one[name]) is not None])
        for name in all_estimates[0]
        if all(one.get(name) is not None for one in all_estimates)
    }


def table(results: Mapping[str, SuiteResult]) -> str:
    """All estimates, a column for each data set, and their average."""
    columns = {name: each.estimates for name, each in results.items()}
    if averaged := averages(results):
        columns["average"] = averaged
    rows = [["", *columns]]
    sizes = [f"{each.problems} x {each.samples}" for each in results.values()]
    rows.append(["problems x samples", *sizes, *([""] if averaged else [])])
    for name in dict.fromkeys(name for each in columns.values() for name in each):
        cells = [cell(name, each.get(name)) for each in columns.values()]
        rows.append([LABELS.get(name, name), *cells])
    for level in dict.fromkeys(level for each in results.values() for level in each.levels):
        cells = [cell("pass@1", each.levels.get(level)) for each in results.values()]
        rows.append([f"pass@1, level {level}", *cells, *([""] if averaged else [])])
    statuses = dict.fromkeys(status for each in results.values() for status in each.statuses)
    for status in statuses:
        counts = [str(each.statuses.get(status, 0)) for each in results.values()]
        rows.append([f"graded: {status}", *counts, *([""] if averaged else [])])
    return aligned(rows)


def comparison(
    first: Mapping[str, SuiteResult], second: Mapping[str, SuiteResult]
) -> dict[str, PairedDifference]:
    """pass@1 of the first model less that of the second, paired by problem.

    Raises:
        UsageError: there is no data set of the same name, or it holds other problems.
    """
    shared = [name for name in first if name in second]
    if not shared:
        raise UsageError(
            f"--compare: expected one of {', '.join(first)} there, got {', '.join(second)}"
        )
    for name in shared:
        if first[name].digest != second[name].digest:
            raise UsageError(f"--compare: expected the same problems in {name}, got others")
    return {
        name: paired_difference(
            list(first[name].scores.values()), list(second[name].scores.values())
        )
        for name in shared
    }


def comparison_table(
    compared: Mapping[str, PairedDifference],
    first: Mapping[str, SuiteResult],
    second: Mapping[str, SuiteResult],
) -> str:
    """A row for each data set that both models were evaluated on."""
    rows = [["pass@1", "this", "other", "difference", "better", "worse", "sign test"]]
    for name, difference in compared.items():
        rows.append(
            [
                name,
                cell("pass@1", first[name].estimates["pass@1"]),
                cell("pass@1", second[name].estimates["pass@1"]),
                cell("difference", difference.difference),
                str(difference.better),
                str(difference.worse),
                f"p = {difference.p_value:.2g}",
            ]
        )
    return aligned(rows)


def cell(name: str, estimate: Estimate | None) -> str:
    """Value and interval; shares in per cent."""
    if estimate is None:
        return "-"
    is_count = name.startswith("length/") or name.endswith("_words")
    scale, unit = (1, "") if is_count else (100, " %")
    digits = 2 if name.endswith("_words") else 1
    sign = "+" if name == "difference" else ""
    text = f"{scale * estimate.value:{sign}.{digits}f}{unit}"
    if estimate.low is None or estimate.high is None:
        return text
    bounds = ", ".join(f"{scale * bound:.{digits}f}" for bound in (estimate.low, estimate.high))
    return f"{text} [{bounds}]"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned as text, too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])

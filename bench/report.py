"""Results as rows, JSON and Markdown, and what changed between two records."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from harness import CHECKED_NAMES, PLAIN, Case, Result

SPEED_LEGEND = (
    "Each implementation is timed in rounds of plain PyTorch, the implementation and the ceiling, "
    "in turn; all figures are medians over rounds, ratios those of a round, with p20 and p80 in "
    "brackets. The ceiling is a plain copy of the logits, or the bare matrix products. x compile: "
    "of the two ratios to plain PyTorch. Error: relative to float64, of the gradient where there "
    "is one. Extra MB: most memory held beyond the inputs, gradients included."
)
ERROR_LEGEND = (
    "|got - float64| / |float64| in the Euclidean norm, on the same inputs. In brackets: the "
    "largest share of plain PyTorch's error in any one case."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One implementation of one case."""

    case: str
    """Op, dtype and shape; rows of one case are compared."""
    op: str
    dtype: str
    implementation: str
    is_ceiling: bool
    rounds: int
    """0: checked, not timed."""
    seconds: float
    """Median of the rounds, as all that follow."""
    p20: float
    p80: float
    times_plain: tuple[float, float, float] | None
    """p20, median and p80 of how many times faster than plain PyTorch; None where it is not
    timed."""
    over_ceiling: float
    """How many times slower than the fastest ceiling."""
    work: float
    """Bytes or FLOP that no implementation can avoid."""
    unit: str
    """"GB/s" or "TFLOP/s"."""
    errors: dict[str, float]
    """Relative to float64, of each output and gradient."""
    peak_bytes: int | None

    @classmethod
    def of(cls, case: Case, name: str, result: Result) -> "Row":
        """Sums up what a contest measured."""
        p20, median, p80 = quantiles(result.seconds)
        is_ceiling = name in case.ceilings
        return cls(
            case=str(case),
            op=case.op,
            dtype=str(case.dtype).removeprefix("torch."),
            implementation=name,
            is_ceiling=is_ceiling,
            rounds=len(result.seconds),
            seconds=median,
            p20=p20,
            p80=p80,
            times_plain=quantiles(result.times_plain) if result.times_plain else None,
            over_ceiling=quantiles(result.over_ceiling)[1],
            work=case.ceiling_work if is_ceiling else case.work,
            unit=case.unit,
            errors=result.errors,
            peak_bytes=result.peak_bytes,
        )

    @property
    def rate(self) -> float:
        """Work a second, in `unit`."""
        return self.work / self.seconds / (1e9 if self.unit == "GB/s" else 1e12)


@dataclass(slots=True, kw_only=True)
class Record:
    """All that one run measured."""

    machine: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)
    """Cases that an implementation took no part in, by name and reason."""

    def cases(self) -> dict[str, dict[str, Row]]:
        """Rows by case and implementation."""
        grouped: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.case, {})[row.implementation] = row
        return grouped


def save(record: Record, stem: Path) -> None:
    """Writes STEM.json, one row a line, and STEM.md."""
    rows = ",\n".join(f"  {json.dumps(asdict(row))}" for row in record.rows)
    head = json.dumps({"machine": record.machine, "missing": record.missing}, indent=1)
    Path(f"{stem}.json").write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
    Path(f"{stem}.md").write_text(markdown(record) + "\n")


def load(path: Path) -> Record:
    """Reads what `save` wrote."""
    stored = json.loads(path.read_text())
    rows = [Row(**row) for row in stored["rows"]]
    return Record(machine=stored["machine"], missing=stored["missing"], rows=rows)


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, median and p80; zeros for no values."""
    if not values:
        return 0.0, 0.0, 0.0
    ordered, last = sorted(values), len(values) - 1
    return (
        ordered[round(last * 0.2)],
        statistics.median(ordered),
        ordered[round(last * 0.8)],
    )


def times_plain(row: Row) -> str:
    """How many times faster than plain PyTorch."""
    if row.times_plain is None:
        return ""
    p20, median, p80 = row.times_plain
    return f"{median:.1f} ({p20:.1f}-{p80:.1f})"


def times_compile(rows: dict[str, Row], row: Row) -> str:
    """How many times faster than torch.compile, each of them beside plain PyTorch."""
    base = rows["compile"].times_plain if "compile" in rows else None
    if row.times_plain is None or base is None:
        return ""
    return f"{row.times_plain[1] / base[1]:.1f}"


def share_of_ceiling(rows: dict[str, Row], row: Row) -> float:
    """The rate of a row as a share of the fastest ceiling's."""
    ceiling = next(other for other in rows.values() if other.is_ceiling)
    return row.work / ceiling.work / row.over_ceiling


def gradient_error(row: Row) -> float:
    """Largest error of a gradient, or of an output where there is no gradient."""
    gradients = [error for name, error in row.errors.items() if name.startswith("grad ")]
    return max(gradients or row.errors.values(), default=math.nan)


def speed_table(record: Record) -> str:
    """Every implementation that was timed."""
    lines = []
    for case, rows in record.cases().items():
        for row in rows.values():
            if not row.rounds:
                continue
            lines.append(
                [
                    case,
                    row.implementation,
                    f"{row.seconds * 1e3:.1f} ({row.p20 * 1e3:.1f}-{row.p80 * 1e3:.1f})",
                    times_plain(row),
                    times_compile(rows, row),
                    f"{row.over_ceiling:.2f}",
                    f"{row.rate:.3g} {row.unit}",
                    f"{share_of_ceiling(rows, row):.0%}",
                    f"{gradient_error(row):.1e}" if row.errors else "",
                    ""
                    if row.is_ceiling or row.peak_bytes is None
                    else f"{row.peak_bytes / 1e6:.0f}",
                ]
            )
    header = "case|implementation|ms (p20-p80)|x eager|x compile|/ ceiling|rate|of ceiling|error"
    return table([*header.split("|"), "extra MB"], lines)


def errors_of(rows: dict[str, Row]) -> dict[str, dict[str, float]]:
    """Errors of a case by result and by name: plain PyTorch, and our backends in place or not."""
    found: dict[str, dict[str, float]] = {}
    for row in rows.values():
        name = row.implementation.removesuffix(", in place")
        if name in CHECKED_NAMES:
            for result, error in row.errors.items():
                known = found.setdefault(result, {})
                known[name] = max(known.get(name, 0.0), error)
    return found


def error_table(record: Record) -> str:
    """Every error; bold where ours is larger than plain PyTorch's in the same dtype."""

    def cell(errors: dict[str, float], name: str) -> str:
        if name not in errors:
            return ""
        text = f"{errors[name]:.2e}"
        return f"**{text}**" if errors[name] > errors.get(PLAIN, math.inf) else text

    lines = [
        [case, result, *(cell(errors, name) for name in CHECKED_NAMES)]
        for case, rows in record.cases().items()
        for result, errors in errors_of(rows).items()
    ]
    return table(["case", "result", *CHECKED_NAMES], lines)


def error_summary(record: Record) -> str:
    """Largest error over all cases of an op; in brackets the largest share of plain PyTorch's."""
    grouped: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for rows in record.cases().values():
        row = next(iter(rows.values()))
        op = row.op.split()[0].rstrip(",")
        for result, errors in errors_of(rows).items():
            kind = "gradients" if result.startswith("grad ") else "values"
            grouped.setdefault((op, row.dtype, kind), []).append(errors)

    def cell(shapes: list[dict[str, float]], name: str) -> str:
        known = [errors[name] for errors in shapes if name in errors]
        shares = [e[name] / e[PLAIN] for e in shapes if name in e and e.get(PLAIN)]
        bracket = f" ({max(shares):.2g})" if shares and name != PLAIN else ""
        return f"{max(known):.1e}{bracket}" if known else ""

    lines = [
        [*key, *(cell(shapes, name) for name in CHECKED_NAMES)] for key, shapes in grouped.items()
    ]
    return table(["op", "dtype", "of", *CHECKED_NAMES], lines)


def markdown(record: Record) -> str:
    """The whole report."""
    missing = [
        f"- {reason}: {cases[0]}" + f", and {len(cases) - 1} more" * (len(cases) > 1)
        for reason, cases in record.missing.items()
    ]
    speed = ["## Speed and memory", SPEED_LEGEND, speed_table(record)]
    sections = [
        ", ".join(f"{name} {value}" for name, value in record.machine.items()),
        *(speed if any(row.rounds for row in record.rows) else []),
        "## Error: largest over losses and shapes",
        ERROR_LEGEND,
        error_summary(record),
        "## Error: every shape",
        "Bold: larger than plain PyTorch's.",
        error_table(record),
        "## Not run",
        "\n".join(missing) or "Nothing was left out.",
    ]
    return "\n\n".join(sections)


def comparison(old: Record, new: Record) -> str:
    """Of the cases of the new run: rows whose ratios moved by a tenth, and rows that came or went.

    Times count as multiples of the ceiling of their own run.
    """
    before, after = old.cases(), new.cases()
    lines = []
    for case, rows in after.items():
        for name, row in rows.items():
            past = before.get(case, {}).get(name)
            if past is None:
                lines.append([case, name, "new", "", "", ""])
                continue
            figures = {
                "time / ceiling": (past.over_ceiling, row.over_ceiling),
                "error": (gradient_error(past), gradient_error(row)),
                "extra MB": ((past.peak_bytes or 0) / 1e6, (row.peak_bytes or 0) / 1e6),
            }
            for figure, (was, now) in figures.items():
                if was > 0 and now > 0 and abs(math.log(now / was)) >= math.log(1.1):
                    lines.append(
                        [case, name, figure, f"{was:.3g}", f"{now:.3g}", f"{now / was:.2f}"]
                    )
    lines += [
        [case, name, "gone", "", "", ""]
        for case in after
        for name in before.get(case, {})
        if name not in after[case]
    ]
    return table(["case", "implementation", "figure", "old", "new", "new / old"], lines)

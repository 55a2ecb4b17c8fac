"""The steps of the R1 pipeline from files to files: choosing samples, rewriting them, the table.

Samples are lines of `trainer.sample`; rows for fine-tuning are lines with `question` and
`completion`, whatever else they hold. A step is a frozen dataclass whose fields say what it reads
and how; `run` writes the rest into a folder and returns the counts that go to the log.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

from trainer import bilingual_task
from trainer.config import UsageError
from trainer.data_records import DataError, open_records, text_of
from trainer.durable import write_atomically
from trainer.readability import ReadabilityLimits, select_readable
from trainer.reward_scores import summary
from trainer.rewards.extraction import extract_answer, format_reward
from trainer.rewards.matching import answers_match
from trainer.rewards.user_reward import see_working_directory
from trainer.run_log import Sample
from trainer.stage_table import result_rows, table_text, write_figure
from trainer.templates import THINK_OPEN, Template, template_by_name

Row = dict[str, Any]
Rule = Callable[[str, str], Any]
_RULE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_REWRITING = """Below are a question and somebody's thoughts about it with the answer. Write the \
thoughts down again so that they are pleasant to read: in the first person, as one thinks aloud, \
in the language of the question and in no other, without repetition and without code. Keep every \
step that leads to the answer, also doubts and corrections, and add none. Put the thoughts \
between <think> and </think>. Then write, in the same language, a summary for the reader: the \
steps that count, formulas in LaTeX, nothing that the thoughts do not say, and the final answer \
{form}.

Question:
{question}

Thoughts and answer:
{completion}"""
_FORMS = {
    "boxed": "in \\boxed{}",
    "answer_tags": "between <answer> and </answer>, in \\boxed{}",
}


class FileStep(Protocol):
    """From files to files, on one process."""

    def run(self, folder: Path) -> dict[str, int]:
        """Writes the outputs into the folder; what was counted, by name.

        Raises:
            UsageError: an input that cannot be used, or nothing is left.
        """


def is_rule(name: str) -> bool:
    """Whether a name is that of a function, package.module:function."""
    return _RULE.fullmatch(name) is not None


def load_rule(name: str, flag: str) -> Rule:
    """The function of that name.

    Raises:
        UsageError: there is none.
    """
    if not is_rule(name):
        raise UsageError(f"{flag}: expected package.module:function, got {name!r}")
    module, _, function = name.partition(":")
    see_working_directory()
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UsageError(f"{flag}: {name} cannot be imported ({error})") from error
    if not callable(found):
        raise UsageError(f"{flag}: expected a function in {name}, got {found!r}")
    return found


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file; columns that a sample does not have are left out.

    Raises:
        UsageError: it cannot be read, or a line is no sample.
    """
    names = {each.name for each in fields(Sample)}
    needed = ("question", "completion", "correct")
    samples = []
    for place, number, record in _records(path):
        missing = [name for name in needed if name not in record]
        if missing:
            raise UsageError(
                f"{place}: expected the columns {', '.join(needed)} of a sample, got no "
                f"{missing[0]!r}"
            )
        text = {name: _text(record, name, place) for name in ("question", "completion")}
        if not isinstance(record["correct"], bool):
            raise UsageError(
                f"{place}: expected true or false in column 'correct', got {record['correct']!r}"
            )
        known = {name: value for name, value in record.items() if name in names} | text
        samples.append(Sample(**_SAMPLE_DEFAULTS | {"problem_id": f"{path.stem}/{number}"} | known))
    return samples


_SAMPLE_DEFAULTS: dict[str, Any] = {
    "answer": "",
    "prompt": "",
    "extracted": None,
    "status": "ok",
    "reward": None,
    "parts": {},
    "length": 0,
    "finish_reason": "stop",
    "mean_logprob": None,
}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file for fine-tuning.

    Raises:
        UsageError: it cannot be read, or a line lacks a question or a completion.
    """
    return [
        record | {name: _text(record, name, place) for name in ("question", "completion")}
        for place, _, record in _records(path)
    ]


def _records(path: Path) -> Iterable[tuple[str, int, Row]]:
    try:
        for place, number, record in open_records(str(path), "train")[0]:
            if not isinstance(record, dict):
                raise UsageError(f"{place}: expected an object with columns, got {record!r:.40}")
            yield place, number, record
    except DataError as error:
        raise UsageError(str(error)) from error


def _text(record: Row, name: str, place: str) -> str:
    try:
        return text_of(record, name, place)
    except DataError as error:
        raise UsageError(str(error)) from error


def write_lines(path: Path, records: Iterable[Row]) -> None:
    """Writes one object a line, whole or not at all."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_atomically(path, "".join(lines))


def _write_counts(folder: Path, counts: dict[str, int]) -> dict[str, int]:
    write_atomically(folder / "counts.json", json.dumps(counts, indent=1) + "\n")
    return counts


def _require_some(rows: Sequence[Row], counts: dict[str, int], source: Path) -> None:
    if not rows:
        dropped = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise UsageError(f"expected rows to learn from in {source}, got none ({dropped})")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectSamples:
    """Keeps right and readable samples as rows, and adds the user's general data."""

    samples: Path
    template: str
    limits: ReadabilityLimits
    readable: str | None
    """A function of question and completion that those kept must satisfy too."""
    general: Path | None

    def run(self, folder: Path) -> dict[str, int]:
        """Writes rows.jsonl and counts.json."""
        samples = read_samples(self.samples)
        rule = None if self.readable is None else load_rule(self.readable, "--readable")
        chosen = select_readable(samples, template_by_name(self.template), self.limits, rule)
        rows = [asdict(sample) for sample in chosen.kept]
        counts = {"read": len(samples), **chosen.dropped, "kept": len(rows)}
        _require_some(rows, counts, self.samples)
        if self.general is not None:
            general = read_rows(self.general)
            rows, counts = rows + general, counts | {"general": len(general)}
        write_lines(folder / "rows.jsonl", rows)
        return _write_counts(folder, counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteByRule:
    """Rewrites each row by a function of question and completion."""

    rows: Path
    rule: str
    template: str

    def run(self, folder: Path) -> dict[str, int]:
        """Writes rows.jsonl and counts.json."""
        rule, template = load_rule(self.rule, "--rewrite"), template_by_name(self.template)
        rows = read_rows(self.rows)
        texts = [rule(row["question"], row["completion"]) for row in rows]
        return _write_rewritten(folder, self.rows, rows, texts, template)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRequests:
    """Writes what a model is asked that rewrites each row.

    DeepSeek-R1 (arXiv 2501.12948 v2, B.3.2 and listing 1) asks DeepSeek-V3; the words are ours.
    """

    rows: Path
    template: str

    def run(self, folder: Path) -> dict[str, int]:
        """Writes requests.jsonl."""
        form = _FORMS[template_by_name(self.template).answer_in]
        requests = [
            {
                "problem_id": str(number),
                "question": _request(row["question"], row["completion"], form),
                "answer": row.get("answer") or row.get("extracted") or "",
            }
            for number, row in enumerate(read_rows(self.rows))
        ]
        write_lines(folder / "requests.jsonl", requests)
        return {"requests": len(requests)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRewrites:
    """Takes the answers of the model that was asked, where they have the right answer still."""

    rows: Path
    rewrites: Path

    template: str

    def run(self, folder: Path) -> dict[str, int]:
        """Writes rows.jsonl and counts.json."""
        rows = read_rows(self.rows)
        found = {sample.problem_id: sample for sample in read_samples(self.rewrites)}
        answers = [found.get(str(number)) for number in range(len(rows))]
        texts = [None if one is None or not one.correct else one.completion for one in answers]
        template = template_by_name(self.template)
        return _write_rewritten(folder, self.rows, rows, texts, template)


def _request(question: str, completion: str, form: str) -> str:
    values = {"question": question, "completion": completion, "form": form}
    return re.sub(r"\{(question|completion|form)\}", lambda match: values[match[1]], _REWRITING)


def _write_rewritten(
    folder: Path,
    source: Path,
    rows: Sequence[Row],
    texts: Sequence[str | None],
    template: Template,
) -> dict[str, int]:
    """Writes the rows whose new text keeps answer and format."""
    kept: list[Row] = []
    dropped: Counter[str] = Counter()
    for row, text in zip(rows, texts, strict=True):
        if text is not None and template.opens_think:
            text = text.strip().removeprefix(THINK_OPEN)
        reason = _why_not_rewritten(row["completion"], text, template)
        if reason is None:
            kept.append(row | {"completion": text, "original": row["completion"]})
        else:
            dropped[reason] += 1
    counts = {"read": len(rows), **dropped, "kept": len(kept)}
    _require_some(kept, counts, source)
    write_lines(folder / "rows.jsonl", kept)
    return _write_counts(folder, counts)


def _why_not_rewritten(original: str, text: str | None, template: Template) -> str | None:
    if text is None:
        return "not rewritten"
    if format_reward(text, template) < 1:
        return "format"
    before, after = (extract_answer(each, template) for each in (original, text))
    same = before is None or (after is not None and answers_match(before, after))
    return None if same else "another answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeGeneralData:
    """Makes up general data of the bilingual task: prompts with answers as people write them,
    prompts, and preference pairs."""

    FILES: ClassVar = ("rows.jsonl", "prompts.jsonl", "helpful.jsonl", "harmless.jsonl")
    seed: int
    rows: int = 2000
    pairs: int = 4000

    def run(self, folder: Path) -> dict[str, int]:
        """Writes FILES; a pair whose rejected answer is rude is one about harmlessness, the others
        are about helpfulness and hold summaries alone."""
        task = bilingual_task
        samples = [task.general_sample(self.seed, index) for index in range(self.rows)]
        questions = {task.general_question(self.seed, index): None for index in range(self.rows)}
        pairs = [task.preference_pair(self.seed, index) for index in range(self.pairs)]
        rude = tuple(task.translate(task.RUDE, language) for language in task.LANGUAGES)
        harmless = [pair for pair in pairs if pair.rejected.endswith(rude)]
        helpful = [pair for pair in pairs if not pair.rejected.endswith(rude)]
        contents: list[list[Row]] = [
            [{"question": question, "completion": answer} for question, answer in samples],
            [{"question": question} for question in questions],
            [
                _pair(pair.question, summary(pair.chosen), summary(pair.rejected))
                for pair in helpful
            ],
            [_pair(*pair) for pair in harmless],
        ]
        for name, content in zip(self.FILES, contents, strict=True):
            write_lines(folder / name, content)
        return dict(zip(self.FILES, map(len, contents), strict=True))


def _pair(prompt: str, chosen: str, rejected: str) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteResults:
    """Writes the table over models, shaped like the paper's of Dev1, Dev2, Dev3 and R1."""

    samples: tuple[tuple[str, Path], ...]
    """Label and samples on the held-out problems of each model."""
    template: str
    limits: ReadabilityLimits
    readable: str | None
    helpful: str | None
    """A function of question and completion that says whether a general answer is a good one."""

    def run(self, folder: Path) -> dict[str, int]:
        """Writes results.json, results.md and results.png."""
        rule = None if self.readable is None else load_rule(self.readable, "--readable")
        helpful = None if self.helpful is None else load_rule(self.helpful, "--helpful")
        template = template_by_name(self.template)
        rows = {
            label: result_rows(read_samples(path), template, self.limits, rule, helpful)
            for label, path in self.samples
        }
        write_atomically(folder / "results.json", json.dumps(rows, indent=1, default=asdict) + "\n")
        write_atomically(folder / "results.md", table_text(rows) + "\n")
        write_figure(folder / "results.png", rows)
        return {"models": len(rows)}

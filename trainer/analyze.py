"""What a base model can do before any training: `python trainer/analyze.py --model DIR_OR_NAME
--suite gsm8k`.

First how often it answers at all under each template; then, under the one with most answers in the
place that is graded, pass@k and self-reflection by temperature. Each setting is an evaluation of
`trainer/evaluate.py` in a folder of its own, with every sample; one that is complete is not made
again, so the same command goes on where a killed one was. Writes `analysis.json` and `analysis.md`.

Source: Dr. GRPO, arXiv 2503.20783, section 2 and appendix D, which asks a language model whether a
completion tries to answer, and whether one with a keyword reflects; this has rules alone.

Exit codes: 0 done; 2 a mistake of the caller, in one sentence; 130 interrupted.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from trainer import evaluate
from trainer.command_line import check_flag_names, one_sentence_errors
from trainer.config import UsageError, check_at_least
from trainer.durable import write_atomically
from trainer.estimates import Estimate, share
from trainer.evaluation import Estimates
from trainer.evaluation_options import parse_evaluate_options, suite_name
from trainer.evaluation_report import aligned, read_result
from trainer.monitors import DRGRPO_REFLECTION, R1_REFLECTION, ReflectionWords, reflection_words
from trainer.suites import TASK_OF_MODEL
from trainer.templates import TEMPLATES
from trainer.training_run import check_child, exit_code_of

TEMPLATES_OF_THE_PAPER = ("none", "r1-drgrpo", "qwen-math")
RESULT, TABLE = "analysis.json", "analysis.md"
Sample = dict[str, Any]
# An answer that stands elsewhere than the template wants it.
_STATED = re.compile(
    r"\\boxed\s*\{|<answer>|####\s*\S|\banswers?\b[^.\n]{0,40}?(?:\bis\b|\bare\b|[:=])\s*\S|答案",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyzeOptions:
    """Measures answering by template, and pass@k and self-reflection by temperature."""

    model: str = "tiny"
    """A Hugging Face folder, a hub name or an embedded model."""
    suite: str | None = None
    """Data set: its name (math500, gsm8k, ...), a .jsonl, .json or .parquet file, a hub data set;
    None: the task of an embedded model."""
    problems: int | None = None
    """The first so many of its problems; None: all (the paper has 500)."""
    templates: tuple[str, ...] = ()
    """Templates to compare; none given: none, r1-drgrpo and qwen-math (an embedded model: its
    task's)."""
    template_temperature: float = 1.0
    """Sampling temperature of that comparison."""
    temperatures: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Sampling temperatures under the best template."""
    samples: int = 8
    """Completions per problem in each setting."""
    max_new_tokens: int | None = None
    """Longest completion; None: 2048 or what the model has room for."""
    grader: Literal["exact", "strict", "lenient"] = "strict"
    """How an answer is compared, as in training."""
    data_dir: Path | None = None
    """Folder with the files of data sets given by name; None takes them from the hub."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples."""
    ranks: int = 1
    """Processes that share the problems, one for each GPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation."""
    rows_per_batch: int = 64
    """Completions that transformers decodes together on one rank."""
    cpu_threads: int | None = None
    """Threads of each process on the CPU; None leaves it to torch."""
    seed: int = 0
    """Every random choice derives from it."""
    out: Path | None = None
    """Where everything is written; None stands for analyses/<model>-<data set>."""
    cache_dir: Path = Path("~/.cache/onepass-rl")
    """Where the embedded models are kept."""

    def __post_init__(self) -> None:
        for name in ("problems", "samples", "max_new_tokens", "ranks", "rows_per_batch"):
            check_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        check_at_least("--cpu-threads", self.cpu_threads, 1)
        check_at_least("--seed", self.seed, 0)
        if not self.temperatures:
            raise ValueError("--temperatures: expected at least one, got none")
        for temperature in (self.template_temperature, *self.temperatures):
            check_at_least("temperature", temperature, 0, exclusive=True)
        for name in self.templates:
            if name not in TEMPLATES:
                raise ValueError(f"--templates: expected {', '.join(TEMPLATES)}, got {name!r}")
        if not self.source:
            raise ValueError("--suite: expected a data set, got none")

    @property
    def source(self) -> str:
        """The data set."""
        return self.suite or TASK_OF_MODEL.get(self.model, "")

    @property
    def compared(self) -> tuple[str, ...]:
        """The templates to compare."""
        if self.templates:
            return self.templates
        of_task = TASK_OF_MODEL.get(self.model)
        return TEMPLATES_OF_THE_PAPER if of_task is None else (of_task,)

    @property
    def folder(self) -> Path:
        """Where everything is written, absolute."""
        name = f"{suite_name(self.model)}-{suite_name(self.source)}"
        return (self.out or Path("analyses") / name).expanduser().absolute()

    def flags(self, template: str, temperature: float) -> list[str]:
        """The command line of `trainer/evaluate.py` for a setting."""
        values: dict[str, object] = {
            "model": self.model,
            "suite": self.source,
            "template": template,
            "temperature": temperature,
            "top_p": 1.0,
            "out": self.folder / f"{template}-temperature-{temperature:g}",
        }
        for name in (
            *("problems", "samples", "max_new_tokens", "grader", "data_dir", "engine", "dtype"),
            *("rows_per_batch", "cpu_threads", "seed", "cache_dir"),
        ):
            values[name] = getattr(self, name)
        return [
            f"--{name.replace('_', '-')}={value}"
            for name, value in values.items()
            if value is not None
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What was found with a template at a temperature."""

    template: str
    temperature: float
    estimates: Estimates
    """Those of an evaluation, and `answering` (a completion that states an answer anywhere),
    `in_place` (where the template wants it), `ended` (not cut at --max-new-tokens),
    `correct/reflecting` and `correct/other` (of completions with and without a word of Dr. GRPO's
    list)."""
    words: dict[str, int]
    """How often each word of the two lists occurs."""


def states_answer(completion: str, extracted: str | None) -> bool:
    """Whether a completion states an answer: where its template wants it, or by another box, tag or
    phrase ("the answer is 3")."""
    return extracted is not None or _STATED.search(completion) is not None


def measure(
    template: str, temperature: float, estimates: Estimates, samples: Sequence[Sample]
) -> Setting:
    """A setting from an evaluation's estimates and its samples."""
    texts = [str(each["completion"]) for each in samples]
    counts = Counter[str]()
    for words in (R1_REFLECTION, DRGRPO_REFLECTION):
        for word in words.words:
            alone = ReflectionWords(words=(word,), whole_words=words.whole_words)
            counts[word] += sum(reflection_words(text, alone) for text in texts)

    def reflects(one: Sample) -> bool:
        return reflection_words(str(one["completion"]), DRGRPO_REFLECTION) > 0

    def of(
        value: Callable[[Sample], bool], chosen: Callable[[Sample], bool] = lambda one: True
    ) -> Estimate | None:
        by_problem: dict[str, list[float]] = {}
        for one in samples:
            if chosen(one):
                by_problem.setdefault(one["problem_id"], []).append(float(value(one)))
        return share(list(by_problem.values())) if by_problem else None

    return Setting(
        template=template,
        temperature=temperature,
        estimates={
            **estimates,
            "answering": of(lambda one: states_answer(one["completion"], one["extracted"])),
            "in_place": of(lambda one: one["extracted"] is not None),
            "ended": of(lambda one: one["finish_reason"] != "length"),
            "correct/reflecting": of(lambda one: one["correct"], reflects),
            "correct/other": of(lambda one: one["correct"], lambda one: not reflects(one)),
        },
        words=dict(counts),
    )


def analyze(options: AnalyzeOptions) -> tuple[list[Setting], list[Setting]]:
    """By template, and by temperature under the template with most answers where it wants them,
    which alone are graded; where templates do not differ in that, with most stated anywhere.

    Raises:
        UsageError: a model, template, data set or engine that cannot be used.
    """
    if "RANK" in os.environ:
        raise UsageError("--ranks: expected a start with python, which starts the ranks itself")
    # Refused before any is sampled.
    for template in options.compared:
        parse_evaluate_options(options.flags(template, options.template_temperature))
    by_template = [
        _evaluated(options, template, options.template_temperature) for template in options.compared
    ]
    best = max(by_template, key=lambda each: (_value(each, "in_place"), _value(each, "answering")))
    by_temperature = [
        _evaluated(options, best.template, temperature) for temperature in options.temperatures
    ]
    return by_template, by_temperature


def _evaluated(options: AnalyzeOptions, template: str, temperature: float) -> Setting:
    """A setting, evaluated now or by an earlier start."""
    print(f"\ntemplate {template}, temperature {temperature:g}", flush=True)
    flags = options.flags(template, temperature)
    given = parse_evaluate_options(flags)
    if options.engine == "transformers" and options.ranks == 1:
        evaluate.run(given)
    else:
        # An engine of vLLM cannot be made twice in a process.
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={options.ranks}"]
        command = [sys.executable, *(launcher if options.ranks > 1 else []), evaluate.__file__]
        code = subprocess.run([*command, *flags], check=False).returncode
        check_child(code, f"evaluation {given.folder}")
    name = suite_name(options.source)
    lines = (given.folder / f"samples-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    result = read_result(given.folder)[1][name]
    return measure(template, temperature, result.estimates, list(map(json.loads, lines)))


def tables(by_template: Sequence[Setting], by_temperature: Sequence[Setting]) -> str:
    """Both parts as Markdown, in percent but for tokens."""
    columns = {
        "states an answer": "answering",
        "in its place": "in_place",
        "ended": "ended",
        "right": "pass@1",
        "tokens": "length/mean",
    }
    rows = [[setting.template, *_cells(setting, columns)] for setting in by_template]
    text = aligned([["template", *columns], *rows])
    first = by_temperature[0]
    columns = {name: name for name in first.estimates if name.startswith("pass@")} | {
        "R1 words": "reflection/r1",
        "reflecting": "reflection/dr_grpo",
        "problems": "reflection/dr_grpo_problems",
        "right, reflecting": "correct/reflecting",
        "right, other": "correct/other",
    }
    rows = [[f"{setting.temperature:g}", *_cells(setting, columns)] for setting in by_temperature]
    return f"{text}\n\nBy temperature, template {first.template}:\n\n" + aligned(
        [["temperature", *columns], *rows]
    )


def _cells(setting: Setting, columns: dict[str, str]) -> list[str]:
    cells = []
    for name in columns.values():
        estimate = setting.estimates.get(name)
        scale = 1 if name.startswith("length/") else 100
        cells.append("-" if estimate is None else f"{estimate.value * scale:.1f}")
    return cells


def _value(setting: Setting, name: str) -> float:
    estimate = setting.estimates[name]
    return 0.0 if estimate is None else estimate.value


def run(options: AnalyzeOptions) -> None:
    """Analyzes, writes the results and prints the tables.

    Raises:
        UsageError: see `analyze`.
    """
    by_template, by_temperature = analyze(options)
    text = tables(by_template, by_temperature)
    result = {
        "options": asdict(options),
        "templates": list(map(asdict, by_template)),
        "temperatures": list(map(asdict, by_temperature)),
    }
    write_atomically(options.folder / RESULT, json.dumps(result, indent=1, default=str) + "\n")
    write_atomically(options.folder / TABLE, text + "\n")
    print(f"\n{text}\n\nResult, tables and every sample: {options.folder}")


def parse_analyze_options(arguments: Sequence[str]) -> AnalyzeOptions:
    """The options of a command line.

    Raises:
        UsageError: an unknown flag, or a value that cannot be used.
        SystemExit: after printing the reference, when `--help` is among the arguments.
    """
    names = [*(option.name for option in fields(AnalyzeOptions)), "help"]
    check_flag_names(arguments, [f"--{name.replace('_', '-')}" for name in names])
    with one_sentence_errors():
        return tyro.cli(
            AnalyzeOptions,
            prog="python trainer/analyze.py",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    return exit_code_of(lambda given: run(parse_analyze_options(given)), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

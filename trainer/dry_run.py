"""What a run would do and need, without weights: `--dry-run [NODE]` on the command line of
`trainer/train.py` (a pipeline too) or `trainer/sft.py`.

It prints the config and what the papers report of the preset, checks options and data, and plans
the memory. The model's shape comes from `known_models.py`, an embedded task or a config.json. NODE
is how many ranks there would be and what each one's GPU holds, in GiB, as 8x80; 2xcpu plans two
ranks of this machine without one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from trainer.command_line import parse_command_line, parse_config
from trainer.config import RunConfig, TrainConfig, UsageError
from trainer.data_records import DataError, open_records
from trainer.known_models import ONE_NODE, RECIPES, SHAPES
from trainer.lora import check_lora
from trainer.memory_check import gib, host_bytes_free, plan_table, what_cannot_fit
from trainer.memory_parts import MemoryPlan
from trainer.memory_plan import plan_memory, plan_tuning
from trainer.model_loading import (
    EMBEDDED_MODELS,
    TINY_MODELS,
    load_tokenizer,
    read_config,
    read_reward_models,
    resolve_model,
)
from trainer.pipeline import parse_pipeline_options
from trainer.pipeline_check import check_inputs, selected_stages
from trainer.pipeline_options import PipelineConfig
from trainer.pipeline_presets import PIPELINES
from trainer.presets import DEFAULT_PRESET, PRESETS
from trainer.problem_source import ListedProblems, open_problems
from trainer.rewards.scoring import check_rewards
from trainer.setup_run import check_backend, named_template
from trainer.sft_config import SftConfig
from trainer.sft_presets import DEFAULT_PRESET as SFT_DEFAULT
from trainer.sft_presets import PRESETS as SFT_PRESETS
from trainer.sft_rows import RowReader
from trainer.stages import SFT, TRAIN, pipeline_stages
from trainer.suites import EMBEDDED_TASKS, TASK_OF_MODEL
from trainer.tiny_model import model_config

FLAG = "--dry-run"
_NODE = re.compile(r"([1-9]\d*)x([1-9]\d*|cpu)")
# Stands for the chat template of a tokenizer that is not at hand.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True, slots=True)
class Node:
    """What a run is planned for."""

    ranks: int
    gpu_bytes: int | None
    """None without a GPU."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads RANKSxGIB or RANKSxcpu.

        Raises:
            UsageError: the text is neither.
        """
        match = _NODE.fullmatch(text)
        if match is None:
            raise UsageError(f"{FLAG}: expected ranks and GiB as 8x80, or 2xcpu, got {text!r}")
        ranks, memory = match.groups()
        return cls(int(ranks), None if memory == "cpu" else int(memory) << 30)

    @classmethod
    def of(cls, config: RunConfig | PipelineConfig) -> Self:
        """What the preset is meant for: GPUs, or a CPU for embedded models."""
        if config.model in EMBEDDED_MODELS:
            return cls(1, None)
        recipe = RECIPES.get(config.preset, ONE_NODE)
        return cls(recipe.ranks, recipe.gpu_gib << 30)

    @property
    def device(self) -> str:
        """Type of the device, as torch calls it."""
        return "cpu" if self.gpu_bytes is None else "cuda"

    def check(self, plan: MemoryPlan) -> str:
        """A sentence on the room that a plan leaves.

        Raises:
            UsageError: it does not fit.
        """
        on_host, ranks, room = False, 1, self.gpu_bytes
        if room is None:
            on_host, ranks, room = True, self.ranks, host_bytes_free()
        problem = what_cannot_fit(plan, on_host=on_host, ranks=ranks, room=room)
        if problem is not None:
            raise UsageError(problem)
        if room is None:
            return "not compared: this machine does not say what memory it has free"
        if on_host:
            return f"{self.ranks} of this machine, which has {gib(room)} free"
        return f"{self.ranks} with {gib(room)} each"


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without `--dry-run`, and the node it names ("" for none); None: a real run."""
    rest, node, is_after_flag = list[str](), None, False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_flag = name.replace("_", "-") == FLAG
        if is_flag:
            node = value
        elif is_after_flag and _may_be_node(argument, rest):
            node = argument
        else:
            rest.append(argument)
        is_after_flag = is_flag and not equals
    return rest, node


def _may_be_node(argument: str, before: Sequence[str]) -> bool:
    """A preset may follow --dry-run only where no argument came before it."""
    return bool(_NODE.fullmatch(argument) or (before and not argument.startswith("-")))


def dry_run(arguments: Sequence[str], *, node_text: str) -> None:
    """The dry run of trainer/train.py.

    Raises:
        UsageError: a config, data set or model that cannot be used, or a plan that does not fit.
    """
    if arguments and arguments[0] in PIPELINES:
        _dry_run_of_pipeline(parse_pipeline_options(arguments), node_text)
        return
    config = parse_config(
        arguments, PRESETS, DEFAULT_PRESET, f"torchrun {TRAIN}", PIPELINES, is_dry_run=True
    )
    node = _node(config, node_text)
    check_backend(config.backend)
    check_lora(config.lora)
    named_template(config.template)
    check_rewards(config.reward)
    print(f"data      {_problems_sentence(config)}")
    scorers = read_reward_models(config.reward)
    _print_plan(_plan(config, _shape(config.model, config.cache_dir), node, scorers), node)


def dry_run_of_tuning(arguments: Sequence[str], *, node_text: str) -> None:
    """The dry run of trainer/sft.py.

    Raises:
        UsageError: see `dry_run`.
    """
    config = parse_config(arguments, SFT_PRESETS, SFT_DEFAULT, f"torchrun {SFT}", is_dry_run=True)
    node = _node(config, node_text)
    check_backend(config.backend)
    check_lora(config.lora)
    print(f"data      {_rows_sentence(config)}")
    _print_plan(_plan(config, _shape(config.model, config.cache_dir), node), node)


def _dry_run_of_pipeline(config: PipelineConfig, node_text: str) -> None:
    """The stages and their commands; plans of those that train, whose model has the shape of the
    one that the pipeline starts from."""
    node = _node(config, node_text)
    stages = pipeline_stages(config)
    check_inputs(config, stages)
    made = {str(stage.output) for stage in stages}
    for stage in selected_stages(config, stages):
        inputs = " ".join(map(str, stage.inputs))
        print(f"stage {stage.name}\n  {' '.join(stage.command) or f'from {inputs}'}")
        if not stage.command or stage.command[0] not in (TRAIN, SFT):
            continue
        script, *flags = stage.command
        options: TrainConfig | SftConfig = (
            parse_command_line(flags)
            if script == TRAIN
            else parse_config(flags, SFT_PRESETS, SFT_DEFAULT, script)
        )
        model = config.model if options.model in made else options.model
        shape = _shape(model, options.cache_dir)
        scorers = {}
        if isinstance(options, TrainConfig):
            # One that a stage makes has the shape of the model it is made from.
            scorers = {
                name: shape if path in made else read_config(path, f"--{name}-model")
                for name, path in options.reward.reward_models.items()
            }
        plan = _plan(options, shape, node, scorers)
        needed = plan.peak(on_host=node.gpu_bytes is None)[1]
        print(f"  {gib(needed)} a rank; ranks: {node.check(plan)}")


def _node(config: RunConfig | PipelineConfig, node_text: str) -> Node:
    """The node to plan for, after the config and what is known of its preset are printed."""
    node = Node.parse(node_text) if node_text else Node.of(config)
    print(config.to_json(), end="")
    if config.preset in RECIPES:
        print(f"expected  {RECIPES[config.preset].expected}")
    return node


def _plan(
    config: TrainConfig | SftConfig,
    shape: PretrainedConfig,
    node: Node,
    reward_models: Mapping[str, PretrainedConfig] = MappingProxyType({}),
) -> MemoryPlan:
    if isinstance(config, SftConfig):
        return plan_tuning(shape, config, ranks=node.ranks, device=node.device)
    return plan_memory(
        shape,
        config,
        ranks=node.ranks,
        device=node.device,
        device_bytes=node.gpu_bytes,
        reward_models=reward_models,
    )


def _print_plan(plan: MemoryPlan, node: Node) -> None:
    print(plan_table(plan))
    print(f"ranks     {node.check(plan)}")


def _problems_sentence(config: TrainConfig) -> str:
    if not config.data.dataset:
        return "not checked: the preset needs --dataset to be given"
    source, held_out = open_problems(config.data, config.seed)
    listed = f"{len(source.problems)} problems" if isinstance(source, ListedProblems) else "made up"
    question = source.problem(0).question
    return f"{listed} to train on, {len(held_out)} held out, the first: {question[:60]!r}"


def _rows_sentence(config: SftConfig) -> str:
    read = RowReader(named_template(config.template), _tokenizer(config))
    named = [(config.data.dataset, config.data.split)]
    named.append((config.data.eval_dataset or "", config.data.eval_split))
    counts = []
    for source, split in named:
        try:
            records = open_records(source, split)[0] if source else ()
            completions = [len(read(content, place)) for place, _, content in records]
        except DataError as error:
            raise UsageError(str(error)) from error
        if source and not completions:
            raise UsageError(f"{source}: expected at least one row, got none")
        counts.append(f"{len(completions)} rows with {sum(completions)} completions")
    if not config.data.dataset:
        return "not checked: the preset needs --dataset to be given"
    return f"{counts[0]} to learn from" + (f", {counts[1]} held out" if named[1][0] else "")


def _tokenizer(config: SftConfig) -> PreTrainedTokenizerBase:
    """The model's, or another one that stands for it where that is not at hand."""
    name = config.model
    if name in TINY_MODELS:
        return EMBEDDED_TASKS[TASK_OF_MODEL[name]].build_tokenizer()
    if name and Path(name).expanduser().is_dir():
        return load_tokenizer(resolve_model(name, config.cache_dir, report=print))
    stand_in = EMBEDDED_TASKS["tiny"].build_tokenizer()
    stand_in.chat_template = CHAT_TEMPLATE
    return stand_in


def _shape(name: str, cache_dir: Path) -> PretrainedConfig:
    """The model's config.

    Raises:
        UsageError: there is none at hand.
    """
    if not name:
        raise UsageError("--model: expected it to be given, got none")
    if name in TINY_MODELS:
        tokenizer = EMBEDDED_TASKS[TASK_OF_MODEL[name]].build_tokenizer()
        return model_config(tokenizer, TINY_MODELS[name])
    if name in SHAPES:
        return SHAPES[name]
    return read_config(resolve_model(name, cache_dir, report=print))

"""What a run would do and need, without weights: `trainer/train.py PRESET ... --dry-run [NODE]`.

The model's shape comes from `known_models.py`, an embedded task, or the config of a local folder;
nothing is downloaded for it. NODE is how many ranks there would be and what each one's GPU holds, in
GiB, as 8x80; `cpu` plans ranks of a machine without one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from transformers import AutoConfig, PretrainedConfig

from trainer.command_line import parse_config
from trainer.config import TrainConfig, UsageError
from trainer.known_models import EXPECTED, NODES, ONE_NODE, SHAPES
from trainer.memory_check import plan_table, what_cannot_fit
from trainer.memory_plan import plan_memory
from trainer.model_loading import TINY_MODELS
from trainer.presets import DEFAULT_PRESET, PRESETS
from trainer.problem_source import ListedProblems, open_problems
from trainer.rewards.scoring import check_rewards
from trainer.setup_run import named_template
from trainer.suites import EMBEDDED_TASKS, TASK_OF_MODEL
from trainer.tiny_model import model_config

FLAG = "--dry-run"
_NODE = re.compile(r"([1-9]\d*)x(\d+|cpu)")


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
    def of(cls, config: TrainConfig) -> Self:
        """What the preset is meant for: one node of GPUs, or a CPU for embedded models."""
        if config.model in TINY_MODELS or config.model == "smollm2":
            return cls(1, None)
        ranks, gib = NODES.get(config.preset, ONE_NODE)
        return cls(ranks, gib << 30)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without `--dry-run`, and the node it names ("" for none); None: a real run."""
    rest, node = list[str](), None
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name.replace("_", "-") == FLAG:
            node = value
        elif node == "" and arguments[place - 1] == FLAG and _NODE.fullmatch(argument):
            node = argument
        else:
            rest.append(argument)
    return rest, node


def dry_run(arguments: Sequence[str], node_text: str) -> None:
    """Prints the config, what the papers report of the preset, the check of the data and the plan.

    Raises:
        UsageError: a config, data set or model that cannot be used, or a plan that does not fit.
    """
    config = parse_config(
        arguments, PRESETS, DEFAULT_PRESET, "torchrun trainer/train.py", is_dry_run=True
    )
    node = Node.parse(node_text) if node_text else Node.of(config)
    print(config.to_json(), end="")
    if config.preset in EXPECTED:
        print(f"expected  {EXPECTED[config.preset]}")
    named_template(config.template)
    check_rewards(config.reward)
    print(f"data      {_data_sentence(config)}")
    if not config.model:
        raise UsageError(f"--model: the preset {config.preset} needs it to be given")
    plan = plan_memory(
        _shape(config),
        config,
        ranks=node.ranks,
        device="cpu" if node.gpu_bytes is None else "cuda",
        device_bytes=node.gpu_bytes,
    )
    print(plan_table(plan))
    if node.gpu_bytes is None:
        return
    problem = what_cannot_fit(plan, on_host=False, ranks=1, room=node.gpu_bytes)
    if problem is not None:
        raise UsageError(problem)
    print(f"fits      {node.ranks} ranks with {node.gpu_bytes >> 30} GiB each")


def _data_sentence(config: TrainConfig) -> str:
    if not config.data.dataset:
        return "not checked: the preset needs --dataset to be given"
    source, held_out = open_problems(config.data, config.seed)
    listed = f"{len(source.problems)} problems" if isinstance(source, ListedProblems) else "made up"
    question = source.problem(0).question
    return f"{listed} to train on, {len(held_out)} held out, the first: {question[:60]!r}"


def _shape(config: TrainConfig) -> PretrainedConfig:
    """The model's config.

    Raises:
        UsageError: there is none at hand.
    """
    name = config.model
    if name in TINY_MODELS:
        tokenizer = EMBEDDED_TASKS[TASK_OF_MODEL[name]].build_tokenizer()
        return model_config(tokenizer, TINY_MODELS[name])
    if name in SHAPES:
        return SHAPES[name]
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--model: expected a folder with a config.json or, for {FLAG}, one of "
            f"{', '.join((*TINY_MODELS, *SHAPES))}, got {name!r}"
        )
    return AutoConfig.from_pretrained(folder)

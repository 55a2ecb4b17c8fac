"""What a run works with, made from its config: models, problems, optimizer, checkpoints, log."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kernels
from trainer.checkpoints import MODEL, CheckpointStore, step_of
from trainer.config import RunConfig, TrainConfig, UsageError
from trainer.fsdp import World, from_main_rank, full_tensors
from trainer.host_memory import return_free_memory
from trainer.lora import Adapters, check_lora
from trainer.memory_check import check_memory
from trainer.memory_plan import plan_memory
from trainer.model_loading import (
    load_model,
    load_tokenizer,
    open_model,
    read_reward_models,
    read_weights,
    resolve_model,
    stored_files,
)
from trainer.monitors import DivergenceAlarm
from trainer.policy import Policy
from trainer.problem_source import ProblemSource, listed_problems, open_problems
from trainer.rewards import Scorer
from trainer.rewards.scoring import check_rewards
from trainer.rollout import Sampler
from trainer.rollout.server_client import start_command
from trainer.rollout.server_sampler import ServerSampler
from trainer.rollout.transformers_sampler import TransformersSampler, end_token_ids
from trainer.rollout.vllm_sampler import VllmSampler, generation_config
from trainer.rollout_buffer import RolloutBuffer
from trainer.run_folder import config_fingerprint
from trainer.run_log import RunLog
from trainer.samples import Prompter
from trainer.stop_signal import StopSignal
from trainer.stored_tensors import StoredTensors
from trainer.tasks import Problem
from trainer.templates import Template, template_by_name
from trainer.training_run import TrainingRun
from trainer.weight_update import make_optimizer


@dataclass(slots=True, kw_only=True)
class Run(TrainingRun):
    """Everything the loop works with."""

    config: TrainConfig
    source: ProblemSource
    held_out: list[Problem]
    prompter: Prompter
    sampler: Sampler
    buffer: RolloutBuffer
    alarm: DivergenceAlarm

    def sync_sampler(self) -> None:
        """Gives the sampler the weights that the policy has after the last completed step."""
        dtype = getattr(torch, self.config.dtype)
        self.sampler.load_weights(
            lambda: full_tensors(self.policy.weights(), dtype=dtype), self.completed
        )


def start_run(
    config: TrainConfig, world: World, store: CheckpointStore, checkpoint: Path | None
) -> Run:
    """Loads everything, from the checkpoint where there is one.

    Raises:
        UsageError: a model, tokenizer, template, data set or backend that cannot be used.
    """
    check_backend(config.backend)
    # Refused before the minutes that loading may take.
    check_rewards(config.reward)
    check_lora(config.lora)
    template = named_template(config.template)
    source, held_out = open_problems(config.data, config.seed)
    log = RunLog(
        config.run_folder,
        total_steps=config.optimizer.steps,
        rank=world.rank,
        resume_step=None if checkpoint is None else step_of(checkpoint),
    )
    start = from_main_rank(world, lambda: start_of_weights(config, checkpoint, log.message))
    tokenizer = load_tokenizer(start)
    model, stored = open_model(start, report=log.message)
    check_vocabulary(tokenizer, model)
    template = template_for_tokenizer(template, tokenizer)
    prompts = [template.prompt_ids(problem.question, tokenizer) for problem in held_out]
    memory = check_memory(
        config,
        world,
        log,
        lambda device_bytes: plan_memory(
            model.config,
            config,
            ranks=world.size,
            device=world.device.type,
            device_bytes=device_bytes,
            prompt_tokens=min(config.rollout.max_prompt_tokens, max(map(len, prompts))),
            reward_models=read_reward_models(config.reward),
        ),
    )
    scorer = Scorer(
        config.reward,
        template,
        max_new_tokens=config.rollout.max_new_tokens,
        runs_code=any(problem.tests for problem in (*listed_problems(source), *held_out)),
    )
    if scorer.grader.sandbox_level is not None:
        log.message(f"code sandbox: {scorer.grader.sandbox_level}")
    prompter = Prompter(
        tokenizer,
        template,
        scorer,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        limit="--max-prompt-tokens",
    )
    sampler = _make_sampler(config, model, start, tokenizer, template, world, log)
    policy = make_policy(model, stored, config, world)
    reference = None
    if config.loss_spec.kl_weight and policy.adapters is None:
        model, stored = open_model(start, report=log.message)
        reference = make_policy(model, stored, config, world).requires_grad_(False)
    optimizer = make_optimizer(policy, config.optimizer)
    completed = 0 if checkpoint is None else step_of(checkpoint)
    run = Run(
        config=config,
        world=world,
        tokenizer=tokenizer,
        source=source,
        held_out=held_out,
        prompter=prompter,
        sampler=sampler,
        policy=policy,
        reference=reference,
        optimizer=optimizer,
        store=store,
        buffer=RolloutBuffer(config.run_folder, world, warn=log.message),
        alarm=_alarm(scorer, log),
        log=log,
        memory=memory,
        stop=StopSignal(),
        completed=completed,
        fingerprint=config_fingerprint(config),
        total_steps=config.optimizer.steps,
        saved=completed,
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    run.sync_sampler()
    return_free_memory()
    return run


def _alarm(scorer: Scorer, log: RunLog) -> DivergenceAlarm:
    """The alarm with what an earlier start of the run logged."""
    alarm = DivergenceAlarm([reward.name for reward in scorer.user_rewards])
    for record in log.kept:
        alarm.add(record["step"], record)
    return alarm


def _make_sampler(
    config: TrainConfig,
    model: PreTrainedModel,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    world: World,
    log: RunLog,
) -> Sampler:
    """What `--rollout` names, with the weights of `source`."""
    options = config.rollout
    if options.rollout == "vllm-server":
        return ServerSampler(
            options.vllm_url,
            world,
            end_ids=sorted(end_token_ids(generation_config(source), tokenizer, template)),
            stop_strings=template.stop,
            in_flight=options.vllm_in_flight,
            timeout_seconds=options.vllm_timeout,
            retry_seconds=options.vllm_retry,
            start_command=lambda url: start_command(config.model, config.dtype, url),
            report=log.message,
        )
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
    dtype = getattr(torch, config.dtype)
    return TransformersSampler(
        load_model(source, dtype).to(world.device),  # type: ignore[arg-type]
        tokenizer,
        template,
        dtype=dtype,
        rows_per_batch=options.rows_per_batch,
    )


def start_of_weights(
    config: RunConfig, checkpoint: Path | None, report: Callable[[str], None]
) -> str:
    """The folder or hub name that the weights are read from; they are on this machine then."""
    # A checkpoint has adapters merged into the weights, which cannot be undone to the bit.
    if checkpoint is not None and not config.lora.lora_rank:
        return str(checkpoint / MODEL)
    start = resolve_model(config.model, config.cache_dir, report=report)
    try:
        stored_files(start)
    except OSError as error:
        raise UsageError(f"--model: {start} cannot be downloaded ({error})") from error
    return start


def make_policy(
    model: PreTrainedModel, stored: StoredTensors | None, config: RunConfig, world: World
) -> Policy:
    """A model of `open_model`, sharded, with new adapters if `--lora-rank` says so; each rank reads
    its part of the weights."""
    if stored is None:
        model.to(world.device)  # type: ignore[arg-type]
    adapters = Adapters(model, config.lora) if config.lora.lora_rank else None
    policy = Policy(model, adapters)
    policy.shard(world, getattr(torch, config.dtype), config.sharding)
    if stored is not None:
        offload = config.sharding.cpu_offload
        read_weights(policy, model, stored, world.device, offload=offload)
    if adapters is not None:
        adapters.initialise(config.seed)
    return policy


def check_backend(name: str) -> None:
    """Raises UsageError unless the kernels have that backend here."""
    available = kernels.available_backends()
    if name != "auto" and name not in available:
        raise UsageError(f"--backend: expected auto or one of {', '.join(available)}, got {name!r}")
    if name != "auto" and available[name] != "available":
        raise UsageError(f"--backend: {name} is not available ({available[name]})")


def named_template(name: str) -> Template:
    """The template of that name.

    Raises:
        UsageError: there is none.
    """
    try:
        return template_by_name(name)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def template_for_tokenizer(template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template with what depends on the tokenizer.

    Raises:
        UsageError: they do not go together.
    """
    try:
        return template.for_tokenizer(tokenizer)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raises UsageError for a tokenizer with more tokens than the model."""
    rows = model.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UsageError(
            f"--model: expected a tokenizer of at most {rows} tokens, the rows of the model's "
            f"embedding, got {len(tokenizer)}"
        )

"""Bytes that a rank will need, from the model's config and the run's alone: no weights, no device.

The model is made on the meta device; its parameters are counted, and what autograd keeps of a
forward pass is counted by running one there. Lengths are taken at their limits, so a plan is what a
run may need, not what it needs on average.
"""

import copy
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from kernels.linear_head import CHUNK_BYTES
from trainer.config import RunConfig, TrainConfig
from trainer.cpu_layers import bytes_kept_less, keeps_gradients
from trainer.exact_head import BLOCK_ROWS
from trainer.fsdp import check_replicate
from trainer.kept_activations import ATTENTION, activation_bytes
from trainer.memory_parts import PHASES, UPDATE, MemoryPart, MemoryPlan
from trainer.model_sizes import ModelSizes
from trainer.parity import WINDOW_TOKENS
from trainer.sft_config import SftConfig

FLOAT32 = 4
# Of the key-value cache of vLLM on a CPU, which has no share of a GPU to live in.
VLLM_CPU_CACHE_BYTES = 2 << 30
# Float64 matrices [drawn tokens, vocabulary] that the parity gate has at a time.
PARITY_MATRICES = 8
# Copies of a chunk of logits that a backend makes: the reference works with whole tensors.
CHUNK_COPIES = {"reference": 6}


def plan_memory(
    model_config: PretrainedConfig,
    config: TrainConfig,
    *,
    ranks: int,
    device: str,
    device_bytes: int | None = None,
    prompt_tokens: int | None = None,
    reward_models: Mapping[str, PretrainedConfig] = MappingProxyType({}),
) -> MemoryPlan:
    """The memory of each rank of a run.

    Args:
        model_config: of a model for causal language modelling, as transformers reads it.
        config: of the run.
        ranks: of the run.
        device: "cpu" or "cuda".
        device_bytes: memory of a GPU, which `--vllm-gpu-memory` is a share of.
        prompt_tokens: the longest prompt; None takes `--max-prompt-tokens`.
        reward_models: configs of the models of `RewardOptions.reward_models`, by their names.
    """
    if prompt_tokens is None:
        prompt_tokens = config.rollout.max_prompt_tokens
    sizes = ModelSizes(model_config, config)
    longest = prompt_tokens + config.rollout.max_new_tokens
    return MemoryPlan(
        device=device,
        ranks=ranks,
        parts=(
            *_weight_parts(
                sizes, config, ranks, device, has_reference=bool(config.loss_spec.kl_weight)
            ),
            *_sampler_parts(sizes, config, ranks, device, longest, device_bytes),
            *_reward_model_parts(reward_models, device),
            *_update_parts(sizes, config, ranks, device, longest),
        ),
    )


def plan_tuning(
    model_config: PretrainedConfig,
    config: SftConfig,
    *,
    ranks: int,
    device: str,
    longest: int | None = None,
) -> MemoryPlan:
    """The memory of each rank of supervised fine-tuning.

    Args:
        model_config, config, ranks, device: see `plan_memory`.
        longest: tokens of the longest sequence; None takes `--max-tokens`.
    """
    sizes = ModelSizes(model_config, config)
    longest, options = longest or config.data.max_tokens, config.optimizer
    of_rank = -(-options.batch_size // ranks) * longest
    tokens = max(min(options.micro_batch_tokens, of_rank), longest)
    return MemoryPlan(
        device=device,
        ranks=ranks,
        parts=(
            *_weight_parts(sizes, config, ranks, device, has_reference=False),
            *_pass_parts(
                sizes,
                config,
                ranks,
                device,
                tokens=tokens,
                positions=tokens,
                head=_head_bytes(sizes, config, ranks, device, tokens),
            ),
        ),
        phases=UPDATE,
    )


def _weight_parts(
    sizes: ModelSizes, config: RunConfig, ranks: int, device: str, *, has_reference: bool
) -> Iterator[MemoryPart]:
    check_replicate(config.sharding, ranks)
    shards = ranks // config.sharding.replicate
    own, trained = (-(-count // shards) * FLOAT32 for count in (sizes.numel, sizes.trained_numel))
    on_cpu, keeps = device == "cpu", keeps_gradients(sizes.width, sizes.itemsize, device, ranks)
    on_host = on_cpu or config.sharding.cpu_offload
    more_ranks = "more ranks" if on_cpu else "--cpu-offload True or more ranks"
    # With adapters it is the model without them.
    has_reference = has_reference and not sizes.has_adapters
    smaller = "a smaller --model"
    # Kept in host memory from the first checkpoint on; each rank has its share of whole tensors.
    yield MemoryPart(
        name="checkpoint being written",
        bytes=-(-(sizes.numel * (1 + has_reference) + 2 * sizes.trained_numel) // ranks) * FLOAT32,
        phases=PHASES,
        knob="more ranks" if ranks == 1 else smaller,
        on_host=True,
    )
    for name, size, phases, knob in (
        ("weights", own, PHASES, more_ranks),
        ("optimizer", 2 * trained, PHASES, more_ranks),
        ("gradients", trained, PHASES if keeps else UPDATE, more_ranks),
        ("reference", own * has_reference, PHASES, "--kl-weight 0 or more ranks"),
    ):
        yield MemoryPart(name=name, bytes=size, phases=phases, knob=knob, on_host=on_host)
    if not is_sharded(config, ranks):
        return
    # FSDP gathers the next layer while one is computed, and keeps the root gathered throughout.
    gathered = (sizes.root_numel + 2 * sizes.layer_numel) * sizes.itemsize
    yield MemoryPart(
        name="gathered weights",
        bytes=gathered,
        phases=UPDATE,
        knob="--shard-head True" if not sizes.is_tied else smaller,
        on_host=on_cpu,
    )


def is_sharded(config: RunConfig, ranks: int) -> bool:
    """Whether FSDP has the weights; one rank in float32 goes without."""
    return ranks > 1 or config.dtype != "float32" or config.sharding.cpu_offload


def _reward_model_parts(
    reward_models: Mapping[str, PretrainedConfig], device: str
) -> Iterator[MemoryPart]:
    """Every rank scores with whole models, in float32, which stay where they compute."""
    for name, model_config in reward_models.items():
        one_output = copy.deepcopy(model_config)
        one_output.num_labels = 1
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                one_output, dtype=torch.float32, attn_implementation=ATTENTION
            )
        yield MemoryPart(
            name=f"{name} reward model",
            bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
            phases=PHASES,
            knob=f"a smaller --{name}-model",
            on_host=device == "cpu",
        )


def _sampler_parts(
    sizes: ModelSizes,
    config: TrainConfig,
    ranks: int,
    device: str,
    longest: int,
    device_bytes: int | None,
) -> Iterator[MemoryPart]:
    options, evaluation, on_cpu = config.rollout, config.evaluation, device == "cpu"
    if options.rollout == "vllm":
        yield from _vllm_parts(sizes, config, device, device_bytes)
    if options.rollout != "transformers":
        return
    completions = max(
        -(-options.num_prompts // ranks) * options.group_size,
        -(-config.data.eval_problems // ranks) * evaluation.eval_samples,
    )
    rows = min(max(options.rows_per_batch, options.group_size), completions)
    layer_cache = rows * sizes.cache_width * sizes.itemsize
    cache = layer_cache * _cache_room(longest - options.max_new_tokens, longest) * len(sizes.layers)
    # While a layer's room grows, both are there; the attention of transformers repeats the keys
    # and values of one layer for grouped heads.
    cache += layer_cache * longest * (1 + (sizes.grouping if sizes.grouping > 1 else 0))
    # Of the logits: log-probabilities in float32, then probabilities and their sums in float64.
    logits = rows * sizes.vocabulary * (sizes.itemsize + 4 + 8 + 8)
    for name, size, phases, knob in (
        (
            "sampler's weights",
            # One rank in float32 samples from the policy's own, where these are not merged.
            (sizes.sampled_numel if is_sharded(config, ranks) else sizes.merged_numel)
            * sizes.itemsize,
            PHASES,
            "--rollout vllm" if not on_cpu else "a smaller --model",
        ),
        ("key-value cache", cache, ("rollout",), "a smaller --rows-per-batch"),
        ("sampler's logits", logits, ("rollout",), "a smaller --rows-per-batch"),
    ):
        yield MemoryPart(name=name, bytes=size, phases=phases, knob=knob, on_host=on_cpu)


def _cache_room(prompt_tokens: int, longest: int) -> int:
    """Positions that a layer of the sampler's cache has room for at the end; see
    `transformers_sampler.GrowingLayer`."""
    room = 0
    positions = prompt_tokens
    while positions <= longest:
        room = positions + max(16, positions // 2)
        positions = room + 1
    return room


def _vllm_parts(
    sizes: ModelSizes, config: TrainConfig, device: str, device_bytes: int | None
) -> Iterator[MemoryPart]:
    weights = sizes.sampled_numel * sizes.itemsize // config.rollout.vllm_tensor_parallel
    if device == "cpu":
        smaller = "a smaller --model"
        for name, size, knob in (
            ("vLLM's weights", weights, smaller),
            ("vLLM's cache", VLLM_CPU_CACHE_BYTES, "VLLM_CPU_KVCACHE_SPACE (GiB)"),
        ):
            yield MemoryPart(name=name, bytes=size, phases=PHASES, knob=knob, on_host=True)
        return
    share = int((device_bytes or 0) * config.rollout.vllm_gpu_memory)
    # It sleeps during the update.
    yield MemoryPart(
        name="vLLM's share",
        bytes=max(share, weights),
        phases=("rollout",),
        knob="a smaller --vllm-gpu-memory",
        on_host=False,
    )


def _update_parts(
    sizes: ModelSizes, config: TrainConfig, ranks: int, device: str, longest: int
) -> Iterator[MemoryPart]:
    options, rollout = config.optimizer, config.rollout
    completions = rollout.num_prompts * rollout.group_size
    # A group has its prompt once in the packed tokens, and once a completion in attention.
    of_prompt = longest - rollout.max_new_tokens + rollout.group_size * rollout.max_new_tokens
    in_attention = rollout.group_size * longest
    of_rank = -(-rollout.num_prompts // ranks) * of_prompt
    if options.minibatches > 1:
        # They take completions from their groups.
        of_rank = -(-completions // (ranks * options.minibatches)) * longest
    tokens = max(min(options.micro_batch_tokens, of_rank), longest)
    yield from _pass_parts(
        sizes,
        config,
        ranks,
        device,
        tokens=tokens,
        positions=tokens * in_attention // of_prompt,
        head=_policy_head_bytes(sizes, config, ranks, device, tokens),
    )
    yield MemoryPart(
        name="rollout buffers",
        bytes=completions * rollout.max_new_tokens * (8 + 3 * FLOAT32),
        phases=UPDATE,
        knob="a smaller --num-prompts",
        on_host=device == "cpu",
    )


def _pass_parts(
    sizes: ModelSizes,
    config: RunConfig,
    ranks: int,
    device: str,
    *,
    tokens: int,
    positions: int,
    head: int,
) -> Iterator[MemoryPart]:
    """Of a forward and backward of packed tokens with so many positions of attention."""
    checkpointing = config.sharding.activation_checkpointing
    kept = activation_bytes(
        sizes.model, tokens, positions, checkpointing=checkpointing, device=device
    )
    is_float32_on_cpu = device == "cpu" and sizes.itemsize == FLOAT32
    if is_float32_on_cpu and not checkpointing:
        kept -= tokens * bytes_kept_less(sizes.model)
    smaller = "a smaller --micro-batch-tokens"
    itemsize = max(sizes.itemsize, FLOAT32) if not is_sharded(config, ranks) else sizes.itemsize
    # Gradients of the embedding and of the head, whole, and FSDP's float32 copy to reduce.
    has_embedding_apart = not keeps_gradients(sizes.width, sizes.itemsize, device, ranks)
    whole = sizes.vocabulary * sizes.width * itemsize * (1 + has_embedding_apart)
    if is_sharded(config, ranks):
        whole += sizes.root_numel * FLOAT32
    if sizes.has_adapters:
        whole = 0
    for name, size, phases, knob in (
        (
            "activations",
            kept,
            ("forward",),
            smaller if checkpointing else f"--activation-checkpointing True or {smaller}",
        ),
        ("head", head, ("forward",), smaller),
        ("whole gradients", whole, ("backward",), "a smaller --model"),
    ):
        yield MemoryPart(name=name, bytes=size, phases=phases, knob=knob, on_host=device == "cpu")


def _policy_head_bytes(
    sizes: ModelSizes, config: TrainConfig, ranks: int, device: str, tokens: int
) -> int:
    """Of the LM head under a policy loss: a chunk of logits, or what the parity gate needs after
    it."""
    rows, tokens_in_head = _head_shape(sizes, config, ranks, tokens)
    whole, gate = 0, 0
    if config.loss_spec.couples_tokens:
        whole = min(config.rollout.max_new_tokens, tokens_in_head) * rows * FLOAT32
    if config.parity_every:
        gate = PARITY_MATRICES * min(WINDOW_TOKENS, tokens_in_head) * rows * 8
        gate += min(BLOCK_ROWS, rows) * sizes.width * 8
    return _head_bytes(sizes, config, ranks, device, tokens, logits=whole, gate=gate)


def _head_bytes(
    sizes: ModelSizes,
    config: RunConfig,
    ranks: int,
    device: str,
    tokens: int,
    *,
    logits: int = 0,
    gate: int = 0,
) -> int:
    """Of the LM head at its fullest: the gradient by its weight, and a chunk of logits, at least
    `logits`, or `gate`."""
    rows, tokens = _head_shape(sizes, config, ranks, tokens)
    logits = max(logits, min(CHUNK_BYTES[device], tokens * rows * FLOAT32))
    logits *= CHUNK_COPIES.get(config.backend, 1)
    if device != "cpu":
        # Converted for the products.
        logits += logits * sizes.itemsize // FLOAT32
    weight_gradient = rows * sizes.width * FLOAT32
    if sizes.itemsize < FLOAT32:
        weight_gradient += rows * sizes.width * sizes.itemsize
    if sizes.has_adapters:
        weight_gradient = 0
    states = 2 * tokens * sizes.width * sizes.itemsize
    return max(logits, gate) + weight_gradient + states


def _head_shape(sizes: ModelSizes, config: RunConfig, ranks: int, tokens: int) -> tuple[int, int]:
    """Rows of the output layer on a rank, and the tokens they are multiplied with."""
    if config.sharding.shard_head:
        return -(-sizes.vocabulary // ranks), tokens * ranks
    return sizes.vocabulary, tokens

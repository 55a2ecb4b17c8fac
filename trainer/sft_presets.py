"""Ready configurations of supervised fine-tuning, by the name that comes first on the command
line."""

from trainer.config import CheckpointOptions, ShardingOptions
from trainer.sft_config import SftConfig, SftDataOptions, SftOptimizerOptions

# Base model and initial learning rate of each distilled model: DeepSeek-R1 (2501.12948 v2), B.4.3;
# 2 to 3 epochs over 800,000 samples.
DISTILLED = {
    "r1-distill-qwen-1.5b": ("Qwen/Qwen2.5-Math-1.5B", 1e-4),
    "r1-distill-qwen-7b": ("Qwen/Qwen2.5-Math-7B", 8e-5),
    "r1-distill-qwen-14b": ("Qwen/Qwen2.5-14B", 7e-5),
    "r1-distill-qwen-32b": ("Qwen/Qwen2.5-32B", 6e-5),
    "r1-distill-llama-8b": ("meta-llama/Llama-3.1-8B", 5e-5),
    "r1-distill-llama-70b": ("meta-llama/Llama-3.3-70B-Instruct", 2e-5),
}


def _of_the_paper(preset: str, model: str = "", learning_rate: float = 5e-6) -> SftConfig:
    """DeepSeek-R1 (2501.12948 v2), B.4.2: 2 epochs, batches of 64, 32,768 tokens, a cosine to a
    tenth of the learning rate."""
    return SftConfig(
        preset=preset,
        model=model,
        dtype="bfloat16",
        optimizer=SftOptimizerOptions(
            epochs=2, batch_size=64, learning_rate=learning_rate, micro_batch_tokens=32768
        ),
        data=SftDataOptions(max_tokens=32768),
        sharding=ShardingOptions(activation_checkpointing=True),
        checkpoint=CheckpointOptions(save_every=200),
    )


PRESETS: dict[str, tuple[str, SftConfig]] = {
    "sft": ("The schedule of DeepSeek-R1 in float32; give --model.", SftConfig(preset="sft")),
    "sft-tiny": (
        "The tiny base model in seconds on a CPU core.",
        SftConfig(
            preset="sft-tiny",
            model="tiny",
            template="tiny",
            cpu_threads=1,
            data=SftDataOptions(max_tokens=256),
            optimizer=SftOptimizerOptions(
                batch_size=32, learning_rate=1e-3, micro_batch_tokens=4096
            ),
        ),
    ),
    "r1-sft": (
        "The fine-tuning of the DeepSeek-R1 paper; give --model.",
        _of_the_paper("r1-sft"),
    ),
    **{
        name: (f"DeepSeek-R1's distillation into {model}.", _of_the_paper(name, model, rate))
        for name, (model, rate) in DISTILLED.items()
    },
}
DEFAULT_PRESET = "sft"

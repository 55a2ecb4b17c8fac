"""Ready runs of the R1 pipeline, by the name that comes first on the command line."""

from trainer.config import DataOptions
from trainer.pipeline_options import PipelineConfig
from trainer.readability import ReadabilityLimits

PIPELINES: dict[str, tuple[str, PipelineConfig]] = {
    "r1-tiny": (
        "The whole R1 pipeline on two CPU cores: tiny base models on made-up arithmetic.",
        PipelineConfig(
            preset="r1-tiny",
            model="tiny-bilingual",
            small_model="tiny-bilingual-small",
            template="tiny-bilingual",
            rl_preset="r1-zero-tiny",
            sft_preset="sft-tiny",
            data=DataOptions(dataset="tiny-bilingual", eval_problems=128),
            rewrite="trainer.bilingual_task:rewrite",
            readable="trainer.bilingual_task:has_summary",
            general_task="tiny-bilingual",
            helpful="trainer.bilingual_task:is_helpful",
            # The rewriting translates what is mixed.
            cold_start_limits=ReadabilityLimits(least_consistency=None, most_words=80),
            rejection_limits=ReadabilityLimits(least_consistency=1.0, most_words=100),
            stage_flags=(
                ("rl", "--target-language question --grader exact --format-weight 0"),
                ("rl", "--learning-rate 2e-4 --warmup-updates 10"),
                ("r1-zero", "--steps 80 --language-weight 0"),
                ("reasoning-rl", "--steps 60 --language-weight 1"),
                ("reasoning-rl", "--loss r1 --reference-reset-every 30"),
                ("general-rl", "--steps 30 --language-weight 1 --temperature 0.7"),
                ("general-rl", "--loss r1 --reference-reset-every 30"),
                ("reward", "--batch-size 32 --learning-rate 1e-3 --eval-share 0.1"),
                ("reward", "--max-tokens 256 --cpu-threads 1"),
                ("preference-rl", "--steps 30 --language-weight 1 --format-weight 1"),
                ("preference-rl", "--loss r1 --reference-reset-every 30 --temperature 0.7"),
                ("samples", "--target-language question --grader exact --cpu-threads 1"),
                ("cold-start-samples", "--count 256 --samples 8"),
                ("rejection-samples", "--count 2048 --samples 4"),
                ("sft", "--learning-rate 2e-3 --warmup-updates 10"),
                ("rejection-sft", "--epochs 3"),
                ("distill", "--learning-rate 4e-3 --epochs 4"),
                ("evaluate", "--samples 4"),
            ),
        ),
    ),
    # DeepSeek-R1 (2501.12948 v2), section 3 and B.4: see r1-zero for the first stage. Not stated,
    # and chosen here: the steps of reasoning-rl, and how many prompts are sampled how often (the
    # paper has "thousands" of samples for the cold start, and 600,000 of rejection sampling).
    # The last reinforcement learning has 1,700 updates, 16 a rollout, the last 400 of them with
    # general prompts.
    "r1": (
        "The numbers of the DeepSeek-R1 paper; give --model, --small-model, --rewrite, --dataset.",
        PipelineConfig(
            preset="r1",
            model="",
            small_model=None,
            template="r1",
            rl_preset="r1-zero",
            data=DataOptions(dataset="", eval_problems=64),
            rejection_limits=ReadabilityLimits(most_paragraph_words=400, code_blocks=False),
            stage_flags=(
                ("reasoning-rl", "--language-weight 1 --format-weight 0 --steps 650"),
                (
                    "general-rl",
                    "--language-weight 1 --format-weight 1 --temperature 0.7 --steps 81",
                ),
                (
                    "preference-rl",
                    "--language-weight 1 --format-weight 1 --temperature 0.7 --steps 25",
                ),
                ("reward", "--dtype bfloat16"),
                ("samples", "--dtype bfloat16 --max-new-tokens 32768 --rows-per-batch 64"),
                ("cold-start-samples", "--count 8192 --samples 4"),
                ("cold-start-rewriting", "--max-new-tokens 16384"),
                ("rejection-samples", "--count 150000 --samples 8"),
                ("evaluate", "--samples 16 --temperature 0.6 --top-p 0.95"),
                ("sft", "--dtype bfloat16"),
                ("distill", "--learning-rate 1e-4"),
            ),
        ),
    ),
}

"""TRL's GRPOTrainer in a process of its own: `python trl_steps.py MODEL STEPS KIND SEED`.

KIND is checkpointing or plain. Prints one JSON object: seconds of each step, and mean completion
length.
"""

import json
import sys
import tempfile
import time
from typing import Any

from datasets import Dataset
from step_tasks import GROUP_SIZE, MAX_NEW_TOKENS, QUESTIONS, TEMPLATE, coin
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trainer.templates import template_by_name


class StepClock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stops it."""
        self.seconds.append(time.perf_counter() - self.started)


def main(model: str, steps: int, checkpointing: bool, seed: int) -> None:
    """Trains and prints."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = template_by_name(TEMPLATE).for_tokenizer(tokenizer)
    prompts = [tokenizer.decode(template.prompt_ids(question, tokenizer)) for question in QUESTIONS]
    clock = StepClock()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=coin,
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=len(QUESTIONS) * GROUP_SIZE,
            num_generations=GROUP_SIZE,
            max_completion_length=MAX_NEW_TOKENS,
            max_steps=steps,
            seed=seed,
            loss_type="dr_grpo",
            scale_rewards="none",
            learning_rate=2e-6,
            temperature=1.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=checkpointing,
            model_init_kwargs={"dtype": "float32"},
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    lengths = [
        entry["completions/mean_length"]
        for entry in trainer.state.log_history
        if "completions/mean_length" in entry
    ]
    print(json.dumps({"seconds": clock.seconds, "lengths": lengths}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "checkpointing", int(sys.argv[4]))

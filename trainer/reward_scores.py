"""Scores of a reward model: any AutoModelForSequenceClassification with one output.

Shapes: B sequences, T positions of the longest one.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer.config import UsageError
from trainer.model_loading import cannot_load, load_tokenizer, read_config
from trainer.preference_pairs import conversation_ids
from trainer.templates import THINK_CLOSE


class RewardModel:
    """Scores completions with a reward model; a reward function for `--reward`.

    A module that a run names by `--reward my_rewards:helpful my_rewards:harmless` may hold

        helpful = RewardModel("runs/helpful/model", reads="summary", only={"kind": "helpful"})
        harmless = RewardModel("runs/harmless/model", reads="whole", only={"kind": "harmless"})

    The config is checked at once, the weights are read when first needed.

    Args:
        folder: of the model and its tokenizer, or a hub name.
        reads: "summary" is what follows the last </think>, nothing where there is none; "whole" is
            the whole completion.
        only: values that columns of the data set must have; other completions are left out.
        device: None is the GPU where there is one.
        batch_tokens: positions of one forward pass, padding included.

    Raises:
        UsageError: the model has another head, or cannot be loaded.

    Source: DeepSeek-R1 (2501.12948 v2), section 3.1: helpfulness on the final summary alone,
    harmlessness on the whole response, each query by the model of its own data set.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        reads: Literal["summary", "whole"] = "summary",
        only: Mapping[str, object] | None = None,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_tokens: int = 16384,
    ) -> None:
        self.folder, self.reads, self.only = str(folder), reads, dict(only or {})
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype, self.batch_tokens = dtype, batch_tokens
        if reads not in ("summary", "whole"):
            raise UsageError(f"reads: expected summary or whole, got {reads!r}")
        config = read_config(self.folder, "reward model")
        head = (config.architectures or ["none"])[0]
        if not head.endswith("ForSequenceClassification") or config.num_labels != 1:
            outputs = f" with {config.num_labels} outputs" if "Classification" in head else ""
            raise UsageError(
                f"reward model: expected a sequence classifier with one output in {self.folder}, "
                f"got {head}{outputs}"
            )
        self.tokenizer = load_tokenizer(self.folder)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model with its weights."""
        model = load_classifier(self.folder, self.tokenizer, self.dtype)
        model.to(self.device)  # type: ignore[arg-type]
        return model.eval()

    @torch.no_grad()
    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The score of each completion of its prompt."""
        read = completions if self.reads == "whole" else list(map(summary, completions))
        ids = conversation_ids(self.tokenizer, prompts, read)
        scores = [0.0] * len(ids)
        for places in batches_by_length(list(map(len, ids)), self.batch_tokens):
            batch_B = classifier_scores(self.model, [ids[place] for place in places])
            for place, score in zip(places, batch_B.tolist(), strict=True):
                scores[place] = score
        return scores

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        """The scores as a reward function of TRL's signature; None for what `only` leaves out.

        The question is scored, where the columns have it, not the prompt that a template made.
        """
        asked = columns.get("question", prompts)
        absent: list[Any] = [None] * len(prompts)
        values = {name: columns.get(name, absent) for name in self.only}
        chosen = [
            place
            for place in range(len(prompts))
            if all(values[name][place] == wanted for name, wanted in self.only.items())
        ]
        scored = self.scores([asked[i] for i in chosen], [completions[i] for i in chosen])
        by_place = dict(zip(chosen, scored, strict=True))
        return [by_place.get(place) for place in range(len(prompts))]


def summary(completion: str) -> str:
    """What follows the thought; nothing where no thought was ended."""
    _, _, rest = completion.rpartition(THINK_CLOSE)
    return rest.strip() if THINK_CLOSE in completion else ""


def load_classifier(
    source: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PreTrainedModel:
    """A classifier with one output on the CPU; a new head where the model has another.

    Raises:
        UsageError: it cannot be loaded, or its tokenizer has no token to pad with.
    """
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if padding is None:
        raise UsageError(f"reward model: expected a padding or end token, got none in {source}")
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=1, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(cannot_load("classifier", source, error, "reward model")) from error
    model.config.get_text_config().pad_token_id = padding
    # Sharding renames the class.
    model.config.architectures = [type(model).__name__]
    return model


def classifier_scores(model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> Tensor:
    """Scores of sequences, float32 [B], padded on the right."""
    padding, longest = model.config.get_text_config().pad_token_id, max(map(len, ids))
    device = next(model.parameters()).device
    ids_BT = torch.tensor([[*one, *[padding] * (longest - len(one))] for one in ids], device=device)
    lengths_B1 = torch.tensor([[len(one)] for one in ids], device=device)
    mask_BT = torch.arange(longest, device=device) < lengths_B1
    return model(input_ids=ids_BT, attention_mask=mask_BT.long()).logits[:, 0].float()


def batches_by_length(lengths: Sequence[int], budget_tokens: int) -> Iterator[list[int]]:
    """Places of all sequences, alike in length and within a budget once padded; at least one."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[place] * (len(batch) + 1) > budget_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch

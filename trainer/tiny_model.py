"""The base model of an embedded task: a small Llama, pretrained once and kept in a cache folder.

Rows of a batch are whole documents, padded on the right; the loss is on the answer, not on the
prompt, whose numbers nothing could predict.

Shape legend: B documents of a batch, T positions, V vocabulary.
"""

import fcntl
import hashlib
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer import drawn_sums, tiny_task
from trainer.durable import flush_to_disk
from trainer.seeds import derive_key

_IGNORED = -100


class EmbeddedTask(Protocol):
    """What a module offers that a base model is made for."""

    __file__: str | None
    PROMPT_END: str
    """Last token of a prompt."""

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer of all that the documents hold."""

    def textbook_document(self, rng: random.Random) -> str:
        """A prompt and an answer of which there is something to learn."""

    def corpus_document(self, rng: random.Random) -> str:
        """A prompt and an answer of the mixture that the base model imitates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingSettings:
    """Sizes of the model and of its pretraining."""

    hidden_size: int = 64
    """Model width."""
    intermediate_size: int = 192
    """Width of the feed-forward layers."""
    num_layers: int = 2
    """Layers; a third one learns the steps later and costs half as much again."""
    num_heads: int = 4
    """Attention heads."""
    steps: int = 900
    """Optimizer steps."""
    textbook_documents: int = 64
    """Documents of a batch while all of them are the textbook's."""
    corpus_documents: int = 128
    """Documents of a batch while all of them are the corpus's, which are shorter on average."""
    learning_rate: float = 5e-3
    """Peak of the cosine schedule of AdamW."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly."""
    textbook_until: float = 0.7
    """Share of the steps after which documents of the corpus begin to replace the textbook's."""
    corpus_from: float = 0.85
    """Share of the steps from which all documents are the corpus's."""
    report_seconds: float = 2.0
    """Time between progress lines."""

    def corpus_share(self, step: int) -> float:
        """Probability that a document of this step is one of the corpus."""
        ramp = self.corpus_from - self.textbook_until
        return min(1.0, max(0.0, (step / self.steps - self.textbook_until) / ramp))

    def learning_rate_at(self, step: int) -> float:
        """Warm-up, then a cosine from the peak to a fiftieth of it."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return (
            self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * (0.02 + 0.98 * cosine)
        )


SETTINGS = PretrainingSettings()


def base_model_folder(
    cache_folder: Path,
    *,
    task: EmbeddedTask = tiny_task,
    seed: int = 0,
    settings: PretrainingSettings = SETTINGS,
    report: Callable[[str], None] = print,
) -> Path:
    """The Hugging Face folder of the base model; pretrains it the first time.

    The folder's name is a hash of all that determines its content but the machine: the settings,
    the seed, the code of the task and of the pretraining, the versions of torch and transformers.
    It appears complete or not at all, however the process ends; of several processes that ask at
    once, one builds and the others wait.

    Args:
        cache_folder: made if missing.
        task: what the model learns.
        seed: of the initial weights and of the documents.
        settings: sizes of the model and of its pretraining.
        report: gets short progress lines.

    Returns: folder with configuration, safetensors, tokenizer and generation configuration.

    Raises:
        OSError: the cache folder cannot be written.
    """
    folder = cache_folder / f"tiny-{_content_key(task, seed, settings)}"
    if folder.is_dir():
        return folder
    cache_folder.mkdir(parents=True, exist_ok=True)
    with (cache_folder / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        # Whoever made these was killed: this process holds the lock.
        for abandoned in cache_folder.glob(f".{folder.name}.partial-*"):
            shutil.rmtree(abandoned)
        partial = Path(tempfile.mkdtemp(dir=cache_folder, prefix=f".{folder.name}.partial-"))
        tokenizer = task.build_tokenizer()
        model = pretrain(tokenizer, task=task, seed=seed, settings=settings, report=report)
        model.generation_config = GenerationConfig(
            do_sample=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for written in (*partial.iterdir(), partial):
            flush_to_disk(written)
        partial.rename(folder)
        flush_to_disk(cache_folder)
    return folder


def pretrain(
    tokenizer: PreTrainedTokenizerFast,
    *,
    task: EmbeddedTask = tiny_task,
    seed: int,
    settings: PretrainingSettings = SETTINGS,
    report: Callable[[str], None] = print,
) -> LlamaForCausalLM:
    """A model that imitates the corpus of an embedded task, in float32 on the CPU.

    The same arguments give the same weights on one machine with one number of threads. Torch's
    global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(seed, "tiny initial weights"))
        model = LlamaForCausalLM(model_config(tokenizer, settings))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(derive_key(seed, "tiny documents"))
    prompt_end_id = tokenizer.convert_tokens_to_ids(task.PROMPT_END)
    assert isinstance(prompt_end_id, int)
    started = reported = time.monotonic()
    count = sum(parameter.numel() for parameter in model.parameters())
    report(f"base model: {count} parameters, {settings.steps} steps of pretraining")
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        documents = _encoded_documents(task, tokenizer, rng, settings, step)
        loss = _accumulate_gradient(model, documents, prompt_end_id)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        now, done = time.monotonic(), step + 1
        if now - reported >= settings.report_seconds or done == settings.steps:
            reported, rate = now, done / (now - started)
            left = (settings.steps - done) / rate
            report(
                f"base model {done}/{settings.steps}  loss {loss:.3f}  {rate:.1f} steps/s  "
                f"ETA {left:.0f} s"
            )
    return model.eval()


def model_config(tokenizer: PreTrainedTokenizerFast, settings: PretrainingSettings) -> LlamaConfig:
    """The shape of the model."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _encoded_documents(
    task: EmbeddedTask,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    settings: PretrainingSettings,
    step: int,
) -> list[list[int]]:
    """Token ids of a batch of documents, shortest first, each with its end-of-text token."""
    corpus_share = settings.corpus_share(step)
    growth = settings.corpus_documents - settings.textbook_documents
    documents = [
        task.corpus_document(rng) if rng.random() < corpus_share else task.textbook_document(rng)
        for _ in range(settings.textbook_documents + round(growth * corpus_share))
    ]
    encoded = tokenizer([f"{document} {tokenizer.eos_token}" for document in documents])
    return sorted(encoded["input_ids"], key=len)


def _accumulate_gradient(
    model: LlamaForCausalLM, documents: list[list[int]], prompt_end_id: int
) -> float:
    """Adds the gradient of the mean loss over answer tokens and returns that loss.

    The shorter and the longer half are padded apart: less padding than in one batch.
    """
    answer_tokens = sum(len(ids) - ids.index(prompt_end_id) - 1 for ids in documents)
    half = len(documents) // 2
    pad_id = model.config.pad_token_id
    assert pad_id is not None
    total = 0.0
    for part in (documents[:half], documents[half:]):
        ids_BT, targets_BT = _padded(part, prompt_end_id, pad_id)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        loss = F.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=_IGNORED, reduction="sum"
        )
        loss = loss / answer_tokens
        loss.backward()
        total += float(loss.detach())
    return total


def _padded(documents: list[list[int]], prompt_end_id: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and, for each place of an answer, the id that follows [B, T], both int64."""
    longest = max(map(len, documents))
    ids, targets = [], []
    for document in documents:
        prompt = document.index(prompt_end_id)
        padding = longest - len(document)
        ids.append(document + [pad_id] * padding)
        targets.append([_IGNORED] * prompt + document[prompt + 1 :] + [_IGNORED] * (padding + 1))
    return torch.tensor(ids), torch.tensor(targets)


def _content_key(task: EmbeddedTask, seed: int, settings: PretrainingSettings) -> str:
    content = hashlib.sha256(
        repr((seed, asdict(settings), torch.__version__, transformers.__version__)).encode()
    )
    for module_file in (__file__, drawn_sums.__file__, task.__file__):
        assert module_file is not None
        content.update(Path(module_file).read_bytes())
    return content.hexdigest()[:16]

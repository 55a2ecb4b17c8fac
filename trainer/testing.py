"""A model with known probabilities and a task to go with it, for tests of the trainer.

The model is a Llama that computes a bigram table: embeddings are one-hot, attention and MLP add
next to nothing, and the output layer holds the table. So what it says is known in closed form, and
it answers in the right format often enough for rewards to differ within a group.
"""

import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DIGITS = [str(digit) for digit in range(10)]
WORDS = [
    *"<pad> <eos> User: Assistant: <think> </think> <answer> </answer> + <unk> so".split(),
    *DIGITS,
]
# Next words and their weights; a word that is not named is followed by any word.
FOLLOWERS: dict[str, dict[str, float]] = {
    "Assistant:": {"<think>": 9, "<answer>": 1},
    "<think>": {"so": 8, "</think>": 2},
    "so": {"so": 5, "</think>": 5},
    "</think>": {"<answer>": 9, "<eos>": 1},
    "<answer>": dict.fromkeys(DIGITS, 1.0),
    **{digit: {"</answer>": 9, digit: 1} for digit in DIGITS},
}


def bigram_logprobs() -> Tensor:
    """log p(next word | word) of the model before training, float64 [V, V], rows by word."""
    weights_VV = torch.full((len(WORDS), len(WORDS)), 1e-4, dtype=torch.float64)
    for word, followers in FOLLOWERS.items():
        for follower, weight in followers.items():
            weights_VV[WORDS.index(word), WORDS.index(follower)] = weight
    return (weights_VV / weights_VV.sum(dim=1, keepdim=True)).log()


def bigram_model(*, layers: int = 2, noise: float = 1e-4, seed: int = 0) -> LlamaForCausalLM:
    """The model; `noise` is the standard deviation of what attention and MLP write."""
    torch.manual_seed(seed)
    width = len(WORDS) + len(WORDS) % 2
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=256,
            rms_norm_eps=1e-12,
            tie_word_embeddings=False,
            pad_token_id=WORDS.index("<pad>"),
            eos_token_id=WORDS.index("<eos>"),
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(width)[: len(WORDS)])
        # The final norm turns a one-hot vector into sqrt(width) times itself.
        table_VD = torch.zeros(len(WORDS), width)
        table_VD[:, : len(WORDS)] = bigram_logprobs().T / math.sqrt(width)
        model.lm_head.weight.copy_(table_VD)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.normal_(std=noise)
            layer.mlp.down_proj.weight.normal_(std=noise)
    return model.eval()


def wide_bigram_model(*, noise: float = 1e-4) -> LlamaForCausalLM:
    """The model with two attention heads, of a width that vLLM has kernels for on a CPU."""
    narrow = bigram_model(noise=noise)
    narrow.config.head_dim = 32
    narrow.config.num_attention_heads = narrow.config.num_key_value_heads = 2
    wide = LlamaForCausalLM(narrow.config).eval()
    weights = {
        name: tensor for name, tensor in narrow.state_dict().items() if "self_attn" not in name
    }
    assert all("self_attn" in name for name in wide.load_state_dict(weights, strict=False)[0])
    for layer in wide.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=noise)
    return wide


def bigram_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, words separated by spaces."""
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def write_bigram_model(folder: Path) -> Path:
    """Saves model and tokenizer as a Hugging Face folder."""
    bigram_model().save_pretrained(folder)
    bigram_tokenizer().save_pretrained(folder)
    return folder


def write_sums(path: Path) -> Path:
    """Saves all sums of two digits that have one digit, as .jsonl with question and answer."""
    sums = [(left, right) for left in range(10) for right in range(10 - left)]
    lines = [
        json.dumps({"question": f"{left} + {right}", "answer": str(left + right)})
        for left, right in sums
    ]
    path.write_text("\n".join(lines) + "\n")
    return path

"""A real `GRPOTrainer`, its own loss and ours: the same numbers on a tiny random model."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from kernels.adapters.trl import ChunkedLogProbFunction, GRPOLossMixin, grpo_loss_spec  # noqa: E402

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(29))]
BATCH_SIZE, NUM_POSITIONS, PROMPT_LENGTH = 4, 6, 3


class FusedTrainer(GRPOLossMixin, trl.GRPOTrainer):
    """TRL's trainer with our loss."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model and its tokenizer on disk: TRL loads its reference model from a path."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def reward(completions: list[str], **_: Any) -> list[float]:
    """Varies within groups."""
    return [float(len(set(text))) for text in completions]


def make_config(tmp_path: Path, **options: Any) -> Any:
    """A `GRPOConfig` that reaches for nothing outside the test."""
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": BATCH_SIZE,
        "num_generations": 2,
        "max_completion_length": NUM_POSITIONS,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 3,
        "temperature": 0.9,
        "disable_tqdm": True,
    }
    return trl.GRPOConfig(**(defaults | options))


def make_trainer(kind: Callable[..., Any], model_dir: Path, config: Any) -> Any:
    return kind(
        model=str(model_dir),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5"] * 8}),
    )


def loss_inputs(**changes: Any) -> dict[str, Any]:
    """What TRL hands to its loss: padded prompts, a tool's tokens, a sequence that is masked."""
    generator = torch.Generator().manual_seed(0)

    def logprobs(scale: float) -> Tensor:
        return -3.4 + scale * torch.randn(BATCH_SIZE, NUM_POSITIONS, generator=generator)

    def ids(length: int) -> Tensor:
        return torch.randint(3, len(WORDS), (BATCH_SIZE, length), generator=generator)

    lengths = torch.tensor([6, 3, 0, 5])
    completion_mask = (torch.arange(NUM_POSITIONS) < lengths[:, None]).int()
    prompt_mask = torch.ones(BATCH_SIZE, PROMPT_LENGTH, dtype=torch.int32)
    prompt_mask[1, 0] = 0
    tool_mask = torch.ones_like(completion_mask)
    tool_mask[0, 2] = 0
    inputs = {
        "prompt_ids": ids(PROMPT_LENGTH),
        "prompt_mask": prompt_mask,
        "completion_ids": ids(NUM_POSITIONS),
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.1]),
        "num_items_in_batch": torch.tensor(29),
        "old_per_token_logps": logprobs(0.9),
        "ref_per_token_logps": logprobs(0.9),
    }
    return inputs | changes


# Options, changes of the inputs.
SUPPORTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {}),
    "grpo-kl": ({"loss_type": "grpo", "beta": 0.1}, {}),
    "grpo-unbiased-kl": (
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
        {},
    ),
    "on-policy": ({"loss_type": "grpo", "beta": 0.1}, {"old_per_token_logps": None}),
    "two-sided": ({"loss_type": "grpo", "delta": 1.5, "epsilon_high": 0.28}, {}),
    "token-advantages": (
        {"loss_type": "grpo"},
        {"advantages": torch.linspace(-1, 1, BATCH_SIZE * NUM_POSITIONS).view(BATCH_SIZE, -1)},
    ),
    "accumulated": ({"loss_type": "grpo", "gradient_accumulation_steps": 2}, {}),
    "float32-head": ({"loss_type": "grpo", "cast_lm_head_to_fp32": True}, {}),
    "bnpo": ({"loss_type": "bnpo"}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.1}, {}),
    "dapo-accumulated": ({"loss_type": "dapo", "gradient_accumulation_steps": 2}, {}),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {}),
    "luspo": ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, {}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.1}, {}),
    "sapo": ({"loss_type": "sapo", "beta": 0.1}, {}),
    "vespo": ({"loss_type": "vespo"}, {}),
    "off-policy-mask": ({"loss_type": "grpo", "off_policy_mask_threshold": 0.1}, {}),
    "off-policy-mask-on-policy": (
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.1},
        {"old_per_token_logps": None},
    ),
}


def loss_and_gradients(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch and its gradients by the weights."""
    inputs = {name: value for name, value in inputs.items() if value is not None}
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, copy.deepcopy(inputs))
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}
    return loss.detach(), gradients


def assert_same_loss(wanted: Any, trainer: Any, inputs: dict[str, Any]) -> None:
    for one in (wanted, trainer):
        one.model.train()
        one.current_gradient_accumulation_steps = one.args.gradient_accumulation_steps
    torch.testing.assert_close(
        loss_and_gradients(trainer, inputs),
        loss_and_gradients(wanted, inputs),
        rtol=1e-4,
        atol=1e-6,
    )
    assert trainer._metrics["train"].keys() == wanted._metrics["train"].keys()
    for name, values in wanted._metrics["train"].items():
        assert trainer._metrics["train"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("name", SUPPORTED)
def test_loss_gradient_and_metrics_match_trl(name: str, model_dir: Path, tmp_path: Path) -> None:
    options, changes = SUPPORTED[name]
    wanted, trainer = (
        make_trainer(kind, model_dir, make_config(tmp_path, **options))
        for kind in (trl.GRPOTrainer, FusedTrainer)
    )
    assert_same_loss(wanted, trainer, loss_inputs(**changes))


@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
def test_sampler_correction_matches_trl(mode: str, model_dir: Path, tmp_path: Path) -> None:
    inputs = loss_inputs()
    gap = 0.4 * torch.sin(torch.arange(BATCH_SIZE * NUM_POSITIONS)).view(BATCH_SIZE, -1)
    inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] - gap
    inputs["sampling_per_token_logps"][0, 1] = torch.nan
    # TRL computes this ratio when it generates, which needs vLLM; the definition is its
    # documentation's: exp of the gap, per token or summed, cut at 1.2, masks keep 0.7 to 1.2.
    scored = inputs["completion_mask"] * inputs["tool_mask"]
    gap = (gap * scored).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(0.0))
    ratio = (gap.sum(dim=1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    if mode.endswith("truncate"):
        inputs["importance_sampling_ratio"], low = ratio.clamp(max=1.2), None
    else:
        inputs["importance_sampling_ratio"] = ratio * ((ratio >= 0.7) & (ratio <= 1.2))
        low = 0.7
    options = {"loss_type": "grpo", "beta": 0.1, "vllm_importance_sampling_mode": mode}
    trainers = []
    for kind in (trl.GRPOTrainer, FusedTrainer):
        trainer = make_trainer(kind, model_dir, make_config(tmp_path, **options))
        trainer.use_vllm = trainer.args.use_vllm = True
        trainer.args.vllm_importance_sampling_clip_min = low
        trainer.args.vllm_importance_sampling_clip_max = 1.2
        trainers.append(trainer)
    trainers[1]._loss_spec = grpo_loss_spec(trainers[1].args)
    assert trainers[1]._loss_spec.sampler_correction == mode
    assert_same_loss(*trainers, inputs)


def test_batch_without_scored_tokens_has_zero_loss_and_gradient(
    model_dir: Path, tmp_path: Path
) -> None:
    trainer = make_training(FusedTrainer, model_dir, make_config(tmp_path, loss_type="grpo"))
    inputs = loss_inputs()
    inputs["tool_mask"] = torch.zeros_like(inputs["tool_mask"])
    loss, gradients = loss_and_gradients(trainer, inputs)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def make_trainer_of(kind: Callable[..., Any], model: Any, model_dir: Path, config: Any) -> Any:
    """A trainer of a model in memory, without a reference model."""
    return kind(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2"] * 8}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model_dir),
    )


def test_soft_capped_logits_with_bias_match_trl(model_dir: Path, tmp_path: Path) -> None:
    trainers = []
    for kind in (trl.GRPOTrainer, FusedTrainer):
        model = LlamaForCausalLM.from_pretrained(model_dir)
        model.config.final_logit_softcapping = 2.0
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, len(WORDS)))
        config = make_config(tmp_path, loss_type="grpo")
        trainers.append(make_trainer_of(kind, model, model_dir, config))
    assert_same_loss(*trainers, loss_inputs())


def test_bfloat16_autocast_is_no_worse_than_trls(model_dir: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, loss_type="grpo")
    _, exact = loss_and_gradients(make_training(trl.GRPOTrainer, model_dir, config), loss_inputs())
    config = make_config(tmp_path, loss_type="grpo", bf16=True)
    errors = []
    for kind in (FusedTrainer, trl.GRPOTrainer):
        _, gradients = loss_and_gradients(make_training(kind, model_dir, config), loss_inputs())
        pairs = [(gradients[name] - exact[name], exact[name]) for name in exact]
        errors.append(sum(d.norm() for d, _ in pairs) / sum(want.norm() for _, want in pairs))
    assert errors[0] <= 1.1 * errors[1] < 0.1


def make_training(kind: Callable[..., Any], model_dir: Path, config: Any) -> Any:
    """A trainer in the state in which TRL calls its loss."""
    trainer = make_trainer(kind, model_dir, config)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    return trainer


def test_evaluation_matches_trl(model_dir: Path, tmp_path: Path) -> None:
    losses = []
    for kind in (trl.GRPOTrainer, FusedTrainer):
        trainer = make_trainer(kind, model_dir, make_config(tmp_path, loss_type="dapo"))
        trainer.model.eval()
        with torch.no_grad():
            losses.append(trainer._compute_loss(trainer.model, loss_inputs()))
    torch.testing.assert_close(losses[1], losses[0])


def trained(kind: Callable[..., Any], model_dir: Path, config: Any) -> tuple[list[Any], Any]:
    """Log history without timings, and weights, of a run of two steps."""
    trainer = make_trainer(kind, model_dir, config)
    trainer.train()
    history = [
        {key: value for key, value in record.items() if not key.endswith(("time", "per_second"))}
        for record in trainer.state.log_history
        if "loss" in record
    ]
    return history, trainer.model.state_dict()


def assert_same_run(got: tuple[list[Any], Any], want: tuple[list[Any], Any]) -> None:
    assert len(want[0]) == 2
    for got_record, want_record in zip(got[0], want[0], strict=True):
        assert got_record == pytest.approx(want_record, rel=1e-3, abs=1e-6, nan_ok=True)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dapo", "beta": 0.05},
        {"loss_type": "grpo", "num_iterations": 2, "epsilon": 0.01},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
    ],
    ids=["dapo-kl", "grpo-two-iterations", "gspo"],
)
def test_two_training_steps_match_trl(
    options: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    want = trained(trl.GRPOTrainer, model_dir, make_config(tmp_path, **options))
    got = trained(FusedTrainer, model_dir, make_config(tmp_path, **options))
    start = LlamaForCausalLM.from_pretrained(model_dir).state_dict()
    assert not torch.equal(want[1]["lm_head.weight"], start["lm_head.weight"])
    assert_same_run(got, want)


def test_two_training_steps_on_our_chunked_function_match_trl(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = trained(trl.GRPOTrainer, model_dir, make_config(tmp_path, beta=0.05))
    calls = []

    class Counted(ChunkedLogProbFunction):
        @staticmethod
        def apply(*args: Any) -> Any:
            calls.append(args)
            return ChunkedLogProbFunction.apply(*args)

    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Counted)
    got = trained(trl.GRPOTrainer, model_dir, make_config(tmp_path, beta=0.05))
    assert calls
    assert_same_run(got, want)


REFUSED: dict[str, dict[str, Any]] = {
    "top_entropy_quantile": {"top_entropy_quantile": 0.2},
    "entropy_coef": {"entropy_coef": 0.01},
    "use_adaptive_entropy": {"use_adaptive_entropy": True},
    "importance_sampling_level": {"loss_type": "cispo", "importance_sampling_level": "sequence"},
    "use_bias_correction_kl": {
        "loss_type": "grpo",
        "beta": 0.1,
        "use_bias_correction_kl": True,
        "importance_sampling_level": "sequence",
    },
    "epsilon_high": {"loss_type": "cispo"},
    "vespo_k_pos": {"loss_type": "vespo", "vespo_k_pos": 1.0},
    "vllm_importance_sampling_correction": {"loss_type": "vespo", "use_vllm": True},
    "vllm_importance_sampling_clip_min": {
        "use_vllm": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_min": 0.5,
    },
    "vllm_importance_sampling_clip_max": {
        "use_vllm": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": None,
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_option_that_is_not_computed_is_refused(name: str, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    for option, value in REFUSED[name].items():
        setattr(config, option, value)
    with pytest.raises(ValueError, match=rf"^GRPOConfig\.{name}: expected .*, got ") as refusal:
        grpo_loss_spec(config)
    assert "\n" not in str(refusal.value)


def test_trainer_refuses_when_it_is_made(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_entropy_quantile"):
        make_trainer(FusedTrainer, model_dir, make_config(tmp_path, top_entropy_quantile=0.2))


def test_images_are_refused(model_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(FusedTrainer, model_dir, make_config(tmp_path))
    with pytest.raises(ValueError, match="expected text only, got 'pixel_values'"):
        trainer._compute_loss(trainer.model, loss_inputs(pixel_values=torch.zeros(1)))


def test_model_with_scaled_logits_is_refused(model_dir: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(model_dir)
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="logit_scale: expected logits without a factor, got 0.5"):
        make_trainer_of(FusedTrainer, model, model_dir, make_config(tmp_path))

"""The loss of TRL 1.16's `GRPOTrainer` through `linear_policy_loss`.

The mixin replaces `GRPOTrainer._compute_loss`: the backbone runs as TRL runs it, then one call
turns hidden states into loss, gradient and metrics, with three products by the LM head instead of
TRL's four. Log-probs of the old and of the reference policy stay TRL's.

Shapes: B rows and T positions of a completion batch, N its scored tokens, D model width.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.adapters.common import head_operands
from kernels.ops import PolicyLoss, linear_policy_loss
from kernels.spec import LossSpec, check_choice

AGGREGATION = {
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "vespo": "token_mean",
    "dr_grpo": "constant",
    "luspo": "sequence_sum",
}
# Loss types that TRL divides by the token count of the whole batch and not by its accumulation.
GLOBAL_TOKEN_MEAN = ("dapo", "cispo", "vespo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
VESPO_CONSTANTS = {
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}
# What a model may multiply its logits by, under the names that TRL 1.16 knows.
LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
IMAGE_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def grpo_loss_spec(args: Any) -> LossSpec:
    """The loss that a `GRPOConfig` describes.

    Args:
        args: `trl.GRPOConfig`.

    Returns:
        `LossSpec`. Advantages are TRL's own, so its `advantage_` fields are not used.

    Raises:
        ValueError: an option that `linear_policy_loss` does not compute; the message names it.
    """
    loss_type = args.loss_type
    check_choice("loss_type", loss_type, tuple(AGGREGATION))
    _refuse_unsupported(args)
    low, high = args.epsilon, args.epsilon if args.epsilon_high is None else args.epsilon_high
    fields: dict[str, Any] = {"clip_low": low, "clip_high": high}
    if loss_type in CLIPPED:
        fields |= {"ratio_level": args.importance_sampling_level, "ratio_cap": args.delta}
    elif loss_type == "sapo":
        fields |= {
            "surrogate": "sapo",
            "ratio_level": args.importance_sampling_level,
            "sapo_temperature_pos": args.sapo_temperature_pos,
            "sapo_temperature_neg": args.sapo_temperature_neg,
        }
    elif loss_type == "cispo":
        # epsilon_high is a cap of the ratio itself here, and there is no lower bound.
        fields |= {"surrogate": "cispo", "clip_low": 1.0, "clip_high": high - 1}
    else:
        fields |= {"surrogate": "vespo"}
    if args.beta != 0:
        fields |= {
            "kl": "k3",
            "kl_weight": args.beta,
            "kl_ratio_weighted": args.use_bias_correction_kl,
        }
    if args.use_vllm and args.vllm_importance_sampling_correction:
        fields |= {
            "sampler_correction": args.vllm_importance_sampling_mode,
            "sampler_low": args.vllm_importance_sampling_clip_min,
            "sampler_high": args.vllm_importance_sampling_clip_max,
        }
    return LossSpec(
        aggregation=AGGREGATION[loss_type],  # type: ignore[arg-type]
        max_tokens=args.max_completion_length if loss_type == "dr_grpo" else None,
        off_policy_threshold=args.off_policy_mask_threshold,
        **fields,
    )


def _refuse_unsupported(args: Any) -> None:
    loss_type, level = args.loss_type, args.importance_sampling_level
    check_choice("importance_sampling_level", level, ("token", "sequence"))
    corrects_sampler = args.use_vllm and args.vllm_importance_sampling_correction

    def refuse(name: str, expected: str) -> None:
        raise ValueError(f"GRPOConfig.{name}: expected {expected}, got {getattr(args, name)!r}")

    if args.top_entropy_quantile < 1:
        refuse("top_entropy_quantile", "1.0 (no mask by entropy)")
    if args.entropy_coef != 0:
        refuse("entropy_coef", "0.0 (the loss has no entropy bonus with TRL's own token mean)")
    if args.use_adaptive_entropy:
        refuse("use_adaptive_entropy", "False (no entropy bonus)")
    if level == "sequence" and loss_type in ("cispo", "vespo"):
        refuse("importance_sampling_level", f"'token' with loss_type {loss_type!r}")
    if level == "sequence" and args.beta != 0 and args.use_bias_correction_kl:
        refuse("use_bias_correction_kl", "False with importance_sampling_level 'sequence'")
    if loss_type == "cispo" and not (args.epsilon_high is not None and args.epsilon_high >= 1):
        refuse("epsilon_high", "at least 1 with loss_type 'cispo', where it caps the ratio")
    if loss_type == "vespo":
        for name, value in VESPO_CONSTANTS.items():
            if getattr(args, name) != value:
                refuse(name, f"{value}")
        if corrects_sampler:
            refuse("vllm_importance_sampling_correction", "False with loss_type 'vespo'")
    if corrects_sampler and args.vllm_importance_sampling_mode.endswith("_truncate"):
        if args.vllm_importance_sampling_clip_min is not None:
            refuse("vllm_importance_sampling_clip_min", "None with a truncate mode")
        if args.vllm_importance_sampling_clip_max is None:
            refuse("vllm_importance_sampling_clip_max", "a number with a truncate mode")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionBatch:
    """The scored tokens of a batch, packed."""

    mask_BT: Tensor
    """bool; tokens that count: neither padding nor written by a tool."""
    cu_seqlens: Tensor
    token_ids_N: Tensor
    advantages_N: Tensor
    old_logprobs_N: Tensor | None
    ref_logprobs_N: Tensor | None
    sampler_logprobs_N: Tensor | None

    @classmethod
    def of(cls, inputs: dict[str, Any], spec: LossSpec) -> "CompletionBatch":
        """Packs what `GRPOTrainer._generate_and_score_completions` returns."""
        mask_BT = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask_BT = mask_BT & inputs["tool_mask"].bool()
        advantages = inputs["advantages"]
        if advantages.dim() == 1:
            advantages = advantages[:, None]

        def packed(name: str) -> Tensor | None:
            values_BT = inputs.get(name)
            return None if values_BT is None else values_BT[mask_BT]

        old_N, sampler_N = packed("old_per_token_logps"), packed("sampling_per_token_logps")
        if spec.off_policy_threshold is not None and sampler_N is None:
            # As in TRL: without a rollout engine's own log-probs the drift counts from the old
            # policy, and on-policy there is none; NaN says so.
            none_N = torch.full((int(mask_BT.sum()),), torch.nan, device=mask_BT.device)
            sampler_N = none_N if old_N is None else old_N
        return cls(
            mask_BT=mask_BT,
            cu_seqlens=torch.nn.functional.pad(mask_BT.sum(dim=1).cumsum(0), (1, 0)),
            token_ids_N=inputs["completion_ids"][mask_BT],
            advantages_N=advantages.expand(mask_BT.shape)[mask_BT],
            old_logprobs_N=old_N,
            ref_logprobs_N=packed("ref_per_token_logps") if spec.kl != "none" else None,
            sampler_logprobs_N=sampler_N,
        )

    def padded(self, values_N: Tensor) -> Tensor:
        """[B, T] with 0 where no token counts."""
        return values_N.new_zeros(self.mask_BT.shape).masked_scatter(self.mask_BT, values_N)


def attach_loss_head(model: Any) -> None:
    """Lets `model(..., onepass_loss=f)` return f(last hidden states, LM head).

    The loss runs inside the model's forward, where FSDP and its like have the head's weight at
    hand. Without `onepass_loss` the forward is unchanged.

    Args:
        model: a transformers causal language model.

    Raises:
        ValueError: the model multiplies its logits by a factor.
    """
    config = model.config.get_text_config()
    for name in LOGIT_SCALES:
        scale = getattr(config, name, None)
        if scale not in (None, 1.0):
            raise ValueError(f"model.config.{name}: expected logits without a factor, got {scale}")
    plain_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, onepass_loss: Callable[..., Any] | None = None, **kwargs: Any
    ) -> Any:
        if onepass_loss is None:
            return plain_forward(*args, **kwargs)
        # Wrappers (PEFT) hand on None for every argument that was not given.
        given = {name: value for name, value in kwargs.items() if value is not None}
        given["use_cache"] = False
        hidden_BLD = self.base_model(*args, **given).last_hidden_state
        return onepass_loss(hidden_BLD, self.get_output_embeddings())

    model.forward = types.MethodType(forward, model)


class GRPOLossMixin:
    """Computes the loss of a TRL `GRPOTrainer` by `linear_policy_loss`.

        class GRPOTrainer(GRPOLossMixin, trl.GRPOTrainer): ...

    Takes the arguments of `GRPOTrainer`. Values, gradients and logged metrics are TRL's; what is
    not computed (top-entropy mask, entropy bonus, router loss, images, a scaled or adapted LM
    head) raises ValueError when the trainer is made or, for images, when they arrive.
    """

    args: Any
    accelerator: Any
    model: Any
    temperature: float
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    importance_sampling_level: str
    aux_loss_enabled: bool
    current_gradient_accumulation_steps: int
    get_gamma_weights: Callable[..., Tensor]
    _metrics: dict[str, dict[str, list[float]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError(
                "model: expected no router loss, got one (set router_aux_loss_coef to 0.0)"
            )
        self._loss_spec = grpo_loss_spec(self.args)
        peft_wrapped = hasattr(self.model, "get_base_model")
        attach_loss_head(self.model.get_base_model() if peft_wrapped else self.model)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        for name in IMAGE_INPUTS:
            if inputs.get(name) is not None:
                raise ValueError(f"inputs: expected text only, got {name!r}")
        batch = CompletionBatch.of(inputs, self._loss_spec)
        mode = "train" if self.model.training else "eval"
        with self.accelerator.autocast():
            out = model(
                input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                onepass_loss=functools.partial(
                    self._loss_of_hidden,
                    batch=batch,
                    denominator=self._global_token_count(inputs, mode),
                ),
            )
        with torch.no_grad():
            self._log_loss(out, batch, inputs["advantages"], mode)
        if self.loss_type in GLOBAL_TOKEN_MEAN or mode == "eval":
            return out.loss
        return out.loss / self.current_gradient_accumulation_steps

    def _global_token_count(self, inputs: dict[str, Any], mode: str) -> Tensor | None:
        """Tokens of an accumulation window and a rank, for the losses that divide by it."""
        if self.loss_type not in GLOBAL_TOKEN_MEAN:
            return None
        count = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "eval":
            return count
        return count * self.current_gradient_accumulation_steps / self.args.steps_per_generation

    def _loss_of_hidden(
        self,
        hidden_BLD: Tensor,
        lm_head: torch.nn.Module,
        *,
        batch: CompletionBatch,
        denominator: Tensor | None,
    ) -> PolicyLoss:
        """The loss, given hidden states of prompt and completion."""
        if not isinstance(lm_head, torch.nn.Linear):
            raise ValueError(f"LM head: expected a torch.nn.Linear, got {type(lm_head).__name__}")
        num_positions = batch.mask_BT.shape[1]
        hidden_BTD = hidden_BLD[:, -num_positions - 1 : -1].to(lm_head.weight.device)
        weight, bias = (
            parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            for parameter in (lm_head.weight, lm_head.bias)
        )
        hidden_ND, weight, bias = head_operands(
            hidden_BTD[batch.mask_BT],
            weight,
            bias,
            torch.float32 if self.args.cast_lm_head_to_fp32 else None,
        )
        config = self.accelerator.unwrap_model(self.model).config.get_text_config()
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return linear_policy_loss(
                hidden_ND,
                weight,
                batch.token_ids_N,
                batch.old_logprobs_N,
                spec=self._loss_spec,
                bias=bias,
                advantages=batch.advantages_N,
                cu_seqlens=batch.cu_seqlens,
                ref_logprobs=batch.ref_logprobs_N,
                sampler_logprobs=batch.sampler_logprobs_N,
                temperature=self.temperature,
                softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
                denominator=denominator,
            )

    def _log_loss(
        self, out: PolicyLoss, batch: CompletionBatch, advantages: Tensor, mode: str
    ) -> None:
        """Adds TRL's metrics of the loss, under its names and by its definitions."""
        from trl.trainer.utils import nanmax, nanmin

        log, mask_BT = self._metrics[mode], batch.mask_BT
        tokens = out.metrics["tokens"]
        if self._loss_spec.kl != "none":
            log["kl"].append(self._ratio_of_sums(out.metrics["kl"] * tokens, tokens))
        log["entropy"].append(self._ratio_of_sums(out.metrics["entropy"] * tokens, tokens))
        old_N = out.logprobs if batch.old_logprobs_N is None else batch.old_logprobs_N
        log_ratio_BT = batch.padded(out.logprobs - old_N)
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        if self.loss_type == "vespo":
            phi = self.get_gamma_weights(advantages, log_ratio_BT, mask_BT, None)
            log["vespo/phi_seq_mean"].append(self._global_mean(phi, mask_BT))
            return
        if self.importance_sampling_level == "sequence":
            counts_B1 = mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
            ratio = (log_ratio_BT.sum(dim=1, keepdim=True) / counts_B1).exp()
        else:
            ratio = log_ratio_BT.exp()
        if self.loss_type == "cispo":
            clipped = (ratio > self.epsilon_high) & (advantages > 0)
            log["cispo_clip_ratio"].append(self._global_mean(clipped.float(), mask_BT))
        elif self.loss_type in CLIPPED:
            low = ((ratio < 1 - self.epsilon_low) & (advantages < 0)).float()
            high = ((ratio > 1 + self.epsilon_high) & (advantages > 0)).float()
            for name, clipped in (("low", low), ("high", high), ("region", low + high)):
                log[f"clip_ratio/{name}_mean"].append(self._global_mean(clipped, mask_BT))
            low_B, high_B = (
                self.accelerator.gather(_row_mean(clipped, mask_BT)) for clipped in (low, high)
            )
            log["clip_ratio/low_min"].append(nanmin(low_B).item())
            log["clip_ratio/high_max"].append(nanmax(high_B).item())

    def _global_mean(self, values: Tensor, mask_BT: Tensor) -> float:
        """Mean over all ranks, of the tokens of [B, T] or of the rows of [B, 1]."""
        if values.shape[1] == 1:
            return self._ratio_of_sums(values.sum(), torch.full_like(values, 1.0).sum())
        return self._ratio_of_sums((values * mask_BT).sum(), mask_BT.sum().float())

    def _ratio_of_sums(self, total: Tensor, count: Tensor) -> float:
        """sum of totals / sum of counts, both over all ranks."""
        sums = self.accelerator.reduce(torch.stack([total, count]), reduction="sum")
        return (sums[0] / sums[1].clamp(min=1.0)).item()


def _row_mean(values: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of each row's tokens, [B], NaN for a row without any; a [B, 1] is the mean already."""
    if values.shape[1] == 1:
        return values[:, 0]
    return (values * mask_BT).sum(dim=1) / mask_BT.sum(dim=1)

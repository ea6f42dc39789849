"""Which of DeepSpeed's keys may be set, and to what."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from vimnas_ds.config.section import ConfigError
from vimnas_ds.config.words import nearest

#: DeepSpeed keys that may be set (some more are derived); anything else is unknown or refused
DEEPSPEED_KEYS = frozenset(
    "train_batch_size gradient_accumulation_steps gradient_clipping bf16 zero_optimization "
    "data_types steps_per_print wall_clock_breakdown".split()
)
ZERO_KEYS = frozenset(
    "stage reduce_bucket_size allgather_bucket_size overlap_comm contiguous_gradients "
    "reduce_scatter use_multi_rank_bucket_allreduce round_robin_gradients".split()
)
#: Real DeepSpeed keys that are refused, with the reason.
REFUSED_KEYS = {
    "optimizer": "the sampled-only AdamW is this project's own (vimnas.optimizer); DeepSpeed "
    "would silently ignore the section",
    "train_micro_batch_size_per_gpu": "give train_batch_size (the global batch); the micro "
    "batch is derived from the number of processes",
    "scheduler": "the learning rate follows vimnas.schedule",
    "fp16": "AutoFormer-B diverges in fp16 and the loss scaler is untested here: use bf16",
    "amp": "use bf16",
    "activation_checkpointing": "use vimnas.model.activation_checkpointing",
    "elasticity": "the global batch is fixed by the recipe",
    "sparse_attention": "attention goes through scaled_dot_product_attention",
    "compression_training": "not proved with sliced weights",
    "data_efficiency": "data order follows (seed, dataset, epoch)",
    "curriculum_learning": "data order follows (seed, dataset, epoch)",
    "pipeline": "only data parallelism is proved with sliced weights",
    "tensor_parallel": "only data parallelism is proved with sliced weights",
    "autotuning": "the batch is fixed by the recipe",
    "torch_autocast": "use bf16",
    "zero_force_ds_cpu_optimizer": "the sampled-only AdamW is the only optimiser",
    "sparse_gradients": "gradients are dense blocks",
    "tensorboard": "this project writes its own (vimnas.output_dir/tensorboard)",
    "csv_monitor": "this project writes its own log and TensorBoard files",
    "wandb": "this project writes its own log and TensorBoard files",
    "checkpoint": "this project writes its own (vimnas.checkpoint)",
    "flops_profiler": "costs are computed in closed form (scripts/train.py --dry_run)",
    "communication_data_type": "not proved with the sampled-only update",
    "prescale_gradients": "not proved with the sampled-only update",
    "gradient_predivide_factor": "not proved with the sampled-only update",
    "zero_allow_untested_optimizer": "it is set for the sampled-only AdamW",
}
ZERO_KEYS_REFUSED = {
    "round_robin_gradients": "DeepSpeed's own parameter map is wrong with it, so sampled blocks "
    "could not be found (set it to false)",
    "offload_optimizer": "no test proves the sampled-only update there",
    "offload_param": "no test proves the sampled-only update there",
    "cpu_offload": "no test proves the sampled-only update there",
}
_CAUSE = "accumulating them was found detrimental (supplement, Appendix A)"


def check_deepspeed(config: dict[str, Any]) -> None:
    """DeepSpeed's keys; what is left out is filled in. Raises ConfigError."""
    for key, value in config.items():
        if key in REFUSED_KEYS:
            raise ConfigError(f'"{key}" is refused (got {value!r}): {REFUSED_KEYS[key]}')
        if key not in DEEPSPEED_KEYS:
            raise ConfigError(f'unknown key "{key}"{nearest(key, [*DEEPSPEED_KEYS, "vimnas"])}')
    batch = config.get("train_batch_size")
    if not _is_whole(batch) or batch < 1:
        raise ConfigError(f"train_batch_size must be a positive whole number, got {batch!r}")
    accumulation = config.get("gradient_accumulation_steps", 1)
    if accumulation != 1 or not _is_whole(accumulation):
        raise ConfigError(
            f"gradient_accumulation_steps {accumulation!r} is refused, it must be 1: gradients are "
            f"never accumulated across steps or datasets, {_CAUSE}"
        )
    clipping = config.get("gradient_clipping")
    if not _is_number(clipping) or not 0 <= clipping < math.inf:
        raise ConfigError(
            "gradient_clipping must be written, 0 for off (DeepSpeed's default changed from 0 to "
            f"1.0), got {clipping!r}"
        )
    if not _is_whole(config.get("steps_per_print", 1)):
        raise ConfigError(
            f"steps_per_print must be a whole number, got {config['steps_per_print']!r}"
        )
    if not isinstance(config.get("wall_clock_breakdown", False), bool):
        raise ConfigError(
            f"wall_clock_breakdown must be true or false, got {config['wall_clock_breakdown']!r}"
        )
    bf16 = config.setdefault("bf16", {"enabled": "auto"})
    enabled = bf16.setdefault("enabled", "auto") if isinstance(bf16, dict) else bf16
    if not isinstance(enabled, bool) and enabled != "auto":
        raise ConfigError(f'bf16.enabled must be true, false or "auto", got {enabled!r}')
    for key in bf16:
        if key not in ("enabled", "check_grad_overflow"):
            raise ConfigError(
                f'unknown key "bf16.{key}"{nearest(key, ["enabled", "check_grad_overflow"])}'
            )
    if bf16.get("check_grad_overflow", True) is not True:
        raise ConfigError(
            "bf16.check_grad_overflow false is refused: one NaN would reach every weight"
        )
    _check_zero(config.get("zero_optimization"))
    _check_types(config)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_zero(zero: Any) -> None:
    stage = zero.get("stage") if isinstance(zero, dict) else zero
    if not _is_whole(stage) or stage != 2:
        raise ConfigError(
            f"zero_optimization.stage must be 2, got {stage!r}: it is the stage whose "
            "sampled-only update the tests prove"
        )
    for key, value in zero.items():
        if key in ZERO_KEYS_REFUSED and value not in (False, None):
            reason = ZERO_KEYS_REFUSED[key]
            raise ConfigError(f"zero_optimization.{key} is refused (got {value!r}): {reason}")
        if key not in ZERO_KEYS:
            near = nearest(key, ZERO_KEYS)
            raise ConfigError(f'unknown or unproved key "zero_optimization.{key}"{near}')
        if key.endswith("_size"):
            if not _is_whole(value) or value < 1:
                raise ConfigError(
                    f"zero_optimization.{key} must be a positive whole number written out "
                    f"(500000000, not 5e8), got {value!r}"
                )
        elif key != "stage" and not isinstance(value, bool):
            raise ConfigError(f"zero_optimization.{key} must be true or false, got {value!r}")


def _check_types(config: dict[str, Any]) -> None:
    types = config.get("data_types", {})
    if not isinstance(types, dict):
        raise ConfigError(f"data_types must be an object, got {types!r}")
    for key, value in types.items():
        if key != "grad_accum_dtype":
            raise ConfigError(f'unknown key "data_types.{key}"{nearest(key, ["grad_accum_dtype"])}')
        if value != "fp32":
            raise ConfigError(
                f'data_types.grad_accum_dtype must be "fp32", got {value!r}: bf16 loses gradients'
            )

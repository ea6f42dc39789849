"""The network's switches, schedule, optimisers, log, checkpoints, faults and the guard."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vimnas_ds.config.section import FROM_JSON, Decays, Fraction, Place, Positive, Section
from vimnas_ds.space import Arch


class ModelSection(Section):
    """The network around the space; stability switches are off as in the paper."""

    qk_norm: bool = Field(False, description="LayerNorm on q and k per head (ViT-22B)")
    layer_scale: float | None = Field(
        None, gt=0, description="LayerScale's initial value (DeiT-III: 1e-4); null: off"
    )
    drop_path: Fraction = Field(0.1, description="Stochastic depth of the last sampled layer")
    activation_checkpointing: bool = Field(
        False, description="Recompute blocks in backward: less memory, a third more time"
    )
    gelu: Literal["tanh", "erf"] = Field(
        "tanh", description="GELU's form; erf (AutoFormer, timm) has no compiled operator here"
    )
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-6, description="LayerNorm's eps (AutoFormer: 1e-5)"
    )
    class_token: bool = Field(
        False, description="A learned token that attends with the others; pooling leaves it out"
    )
    positions: Literal["fixed", "learned"] = Field(
        "fixed",
        description="fixed: sin/cos of the tubes' centres; learned: a vector for every token of "
        "images of one size, no videos",
    )
    relative_positions: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None,
        description="Learned 2-D relative positions in every layer, for images of one size: the "
        "largest distance told apart (AutoFormer: 14). Attention then makes its scores, no flash "
        "kernel; null: off",
    )
    packed_qkv_bias: bool = Field(
        False,
        description="AutoFormer's biases of q, k and v: one vector, of which h heads take the "
        "first 3 h head_dim, so that they change roles with h",
    )
    init: Place | None = Field(
        None, description="Warm start: a local timm ViT checkpoint (.safetensors, .pth)"
    )
    inherit: Place | None = Field(
        None, description="Start from the weights of a supernet run or checkpoint of this project"
    )

    @model_validator(mode="after")
    def _one_start(self) -> ModelSection:
        if self.init is not None and self.inherit is not None:
            raise ValueError("init and inherit exclude each other")
        return self

    @property
    def places(self) -> tuple[str, ...]:
        """The switches, as written, that hold for images of one size alone."""
        found = ['positions "learned"'] if self.positions == "learned" else []
        if self.relative_positions is not None:
            found += [f"relative_positions {self.relative_positions}"]
        return tuple(found)


class ScheduleSection(Section):
    """Algorithm 1's two phases and the learning rate."""

    epochs: int = Field(500, ge=1, description="E; an epoch is one pass over what a phase draws")
    image_epochs: int | None = Field(
        None, ge=0, description="Epochs on the image dataset alone; null: floor(E / 3)"
    )
    image_dataset: str | None = Field(
        None, description="Dataset of the image phase; null: the only image dataset"
    )
    lr: Positive | None = Field(
        None, description="Peak learning rate; null: the image dataset's base_lr in a joint run"
    )
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the cosine")
    warmup: float = Field(20, ge=0, description="Linear warm-up, in warmup_unit")
    warmup_unit: Literal["epochs", "steps"] = Field(
        "epochs", description='Table 10 says "steps", its text "epochs": decided as epochs'
    )


class AlphaSection(Section):
    """Architecture parameters (TangleNAS's values)."""

    enabled: bool = Field(True, description="Whether alphas are learned at all")
    every: int = Field(1, ge=1, description="Steps between alpha updates; 1 in the paper")
    lr: Positive = Field(3e-4, description="Learning rate of the alphas' Adam")
    betas: Decays = Field((0.5, 0.999), description="Its moments' decay")
    weight_decay: float = Field(1e-3, ge=0, description="Its weight decay (added to the gradient)")
    init_std: float = Field(1e-3, ge=0, description="Alphas start at this times a standard normal")
    batch: int | None = Field(
        None, ge=1, description="Global alpha batch; null: the training batch size"
    )


class OptimizerSection(Section):
    """AdamW on exactly the sampled sub-blocks."""

    betas: Decays = Field((0.9, 0.999), description="The moments' decay")
    eps: Positive = Field(1e-8, description="Added to the root of the second moment")
    max_skipped: int = Field(
        20,
        ge=1,
        description="Consecutive skipped (non-finite) steps, of weights or of alphas, that stop "
        "the run",
    )


class SandwichSection(Section):
    """The sandwich rule (US-Nets, NASViT): every step trains the largest sub-network, the smallest
    and some random ones on one batch, by the sum of their losses. Only the largest gets drop path;
    the logged loss and top-1 are its. A step costs that many passes, and the activations of all of
    them are alive until its one backward pass: `model.activation_checkpointing`, or a smaller
    batch, makes room. A single sub-network (`arch`) is trained as without it."""

    random: int = Field(2, ge=0, description="Random sub-networks besides largest and smallest")
    distill: bool = Field(
        True,
        description="In-place distillation: all but the largest learn its soft predictions (which "
        "get no gradient from them) in place of the labels",
    )


class EmaSection(Section):
    """Moving average of the supernet's weights, 4 bytes per parameter over all ranks. A block's
    average moves in the steps that train the block, and in no other."""

    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.9999,
        description="Of an update; after n updates of the block (1 + n) / (10 + n) where less",
    )


class LogSection(Section):
    """What is written how often (steps count optimiser steps)."""

    every: int = Field(20, ge=1, description="Steps between log lines and scalars")
    images_every: int = Field(500, ge=1, description="Steps between pictures in TensorBoard")
    eval_every: int | None = Field(
        None, ge=1, description="Steps between evaluations on `select`; null: every epoch"
    )
    eval_subnets: int = Field(2, ge=0, description="Fixed random sub-networks evaluated as well")
    eval_batch: int = Field(64, ge=1, description="Evaluation batch per process")
    test_at_end: bool = Field(
        True, description="Whether the run ends with its scores on the test splits"
    )


class CheckpointSection(Section):
    """Atomic checkpoints under OUTPUT_DIR/checkpoints."""

    every: int | None = Field(None, ge=1, description="Steps between saves; null: every epoch")
    minutes: Positive | None = Field(
        None, description="Save as well when so much time has passed since the last; null: never"
    )
    keep: int = Field(3, ge=1, description="Checkpoints kept, the newest ones")
    keep_best: bool = Field(
        True,
        description="Keep besides (`checkpoints/best`) the one with the best mean top-1 on `select`"
        " over the datasets drawn so far and the sub-networks evaluated",
    )


class FaultsSection(Section):
    """How long a training waits before it ends itself, on all ranks."""

    stuck_minutes: Positive = Field(
        10.0,
        le=60,
        description="A rank that gets nowhere for so long while the others wait for it is stuck "
        "(three times as long in a save); it is named and the run ends",
    )
    silent_seconds: Annotated[float, Field(ge=10)] = Field(
        60.0, description="A rank that is not heard of for so long counts as dead"
    )
    grace_seconds: Positive = Field(
        25.0,
        description="Time to save and leave after SIGTERM, or without a launcher; launchers kill "
        "30 s after SIGTERM",
    )


class GuardSection(Section):
    """The collapse guard: rewinds to a good checkpoint when training is no longer sound. Steps of
    a dataset are those that draw it."""

    enabled: bool | None = Field(None, description="null: on for the spaces vit_b and vit_l")
    every: int = Field(
        10, ge=1, description="Steps between judgements; each costs one small all-reduce"
    )
    skipped: int = Field(
        3, ge=2, description="Non-finite steps of a dataset in a row that are an event"
    )
    spike_steps: int = Field(
        10, ge=3, description="Steps of a dataset in a row whose loss is far above the usual"
    )
    spike_rise: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="Far above: this share of the way from the usual loss to that of chance"
    )
    collapse_steps: int = Field(
        50, ge=10, description="Steps of a dataset over which loss or accuracy is that of chance"
    )
    collapse_loss: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.9, description="That of chance: this share of what was gained over it is lost again"
    )
    collapse_gain: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15,
        description="What must have been gained before: share of the loss of chance, or accuracy",
    )
    margin: int = Field(
        100,
        ge=0,
        description="Steps between the checkpoint rewound to and the first bad step (PaLM: 100)",
    )
    max_rewinds: int = Field(5, ge=1, description="Rewinds at one place; then the run stops")
    near: int = Field(
        1000, ge=1, description="Events at most this many steps after one another are at one place"
    )
    lr_factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="On the learning rate at every further rewind at one place"
    )


class ArchSection(Section):
    """One sub-network of the space, spelled as in arch.json."""

    embed_dim: int = Field(description="Width of all layers")
    depth: int = Field(description="Number of layers")
    num_heads: Annotated[tuple[int, ...], FROM_JSON] = Field(description="Per layer")
    mlp_ratio: Annotated[tuple[float, ...], FROM_JSON] = Field(description="Per layer")

    def arch(self) -> Arch:
        return Arch(self.embed_dim, self.depth, self.num_heads, self.mlp_ratio)

"""One JSON file = DeepSpeed's keys + an "about" text + one "vimnas" section.

DeepSpeed ignores unknown top-level keys (`zero_optimisation` silently turns ZeRO off), so every
key is checked here, and whatever this project has not proved under test is refused with the
reason. `load_config` gives a `RunConfig` (pydantic, every field described); `deepspeed_dict` gives
what `deepspeed.initialize` gets, with the batch arithmetic done.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from vimnas_ds.space import SPACES, Arch, SearchSpace
from vimnas_ds.tubes import MAX_SIDE, TUBELET, TUBEVIT, TokenGeometry, Tube


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and what would be right."""


class Section(BaseModel):
    """Base of all sections: immutable; unknown keys, and `true` or "8" for a number, are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


def _named(path: Any) -> Any:
    if isinstance(path, str) and (not path or "\0" in path):
        raise ValueError("must name a file or folder")
    return path


FROM_JSON = Field(strict=False)  #: texts become paths, lists tuples; their items stay strict
Place = Annotated[Path, FROM_JSON, BeforeValidator(_named)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[tuple[float, float], FROM_JSON]
Decays = Annotated[tuple[Fraction, Fraction], FROM_JSON]
Triple = Annotated[tuple[int, int, int], FROM_JSON]


class TubeSection(Section):
    """One convolution tube; each triple is (t, h, w) in frames and pixels."""

    kernel: Triple = Field(description="Extent")
    stride: Triple = Field(description="Distance between neighbouring tokens")
    offset: Triple = Field((0, 0, 0), description="Start of the first token")

    @model_validator(mode="after")
    def _positive(self) -> TubeSection:
        if min(self.kernel) < 1 or min(self.stride) < 1 or min(self.offset) < 0:
            raise ValueError("kernel and stride must be positive, offset at least 0")
        return self


class TokensSection(Section):
    """How inputs become tokens."""

    kind: Literal["tubes", "tubelet"] = Field(
        "tubes", description="tubes: TubeViT's sparse tubes; tubelet: dense 2x16x16 (VideoMAE)"
    )
    tubes: Annotated[tuple[TubeSection, ...], FROM_JSON] | None = Field(
        None, description="Tube geometry; null: the published one of `kind`"
    )
    image_tube: int | None = Field(
        None, ge=0, description="Index of the tube that also embeds images; null: the last"
    )

    @model_validator(mode="after")
    def _index(self) -> TokensSection:
        if self.tubes == ():
            raise ValueError("tubes needs one at least; null takes the published ones")
        if self.tubes is not None and self.kind == "tubelet":
            raise ValueError('kind "tubelet" has its own geometry; own tubes go with kind "tubes"')
        if self.tubes is None and self.image_tube is not None:
            raise ValueError("image_tube goes with tubes; the published geometries have their own")
        if self.tubes and self.image_tube is not None and self.image_tube >= len(self.tubes):
            raise ValueError(f"image_tube {self.image_tube} is not one of {len(self.tubes)} tubes")
        return self

    def geometry(self) -> TokenGeometry:
        if self.tubes is None:
            return TUBEVIT if self.kind == "tubes" else TUBELET
        tubes = tuple(Tube(t.kernel, t.stride, t.offset) for t in self.tubes)
        return TokenGeometry(tubes, len(tubes) - 1 if self.image_tube is None else self.image_tube)


class RandAugmentSection(Section):
    """RandAugment (applied in DALI, one draw for a whole clip)."""

    n: int = Field(2, ge=1, le=4, description="Operations per sample")
    m: float = Field(9, ge=0, le=10, description="Magnitude on timm's scale of 0 to 10")
    std: float = Field(0.0, ge=0, description="Standard deviation of the magnitude")


Layout = Literal["folders", "csv", "lists", "kinetics", "ssv2", "imagenet"]
#: The keys that name a layout's files.
LAYOUT_FILES = ("annotations", "test_annotations", "videos", "synsets")
#: layout -> (keys it needs, with what they name; keys it may have besides)
LAYOUT_KEYS: dict[str, tuple[dict[str, str], frozenset[str]]] = {
    "folders": ({}, frozenset()),
    "csv": ({"annotations": "the file"}, frozenset()),
    "lists": (
        {"annotations": "the training list", "test_annotations": "the test list"},
        frozenset({"videos"}),
    ),
    "kinetics": ({"annotations": "the CSV"}, frozenset({"test_annotations", "videos"})),
    "ssv2": ({}, frozenset({"annotations", "videos"})),
    "imagenet": ({"annotations": "the validation ground truth"}, frozenset({"synsets"})),
}


class DatasetSection(Section):
    """One dataset: where it lies, how it is read, its recipe (Table 10)."""

    kind: Literal["image", "video"] = Field(description="Images (B, 3, H, W) or clips")
    root: Place | None = Field(None, description="Folder of the data; must be set to train")
    shards: Place | None = Field(
        None, description="Folder that scripts/make_shards.py wrote, read in place of the root"
    )
    layout: Layout = Field(
        "folders",
        description="folders: root/TRAIN/CLASS/FILE and root/TEST/CLASS/FILE; csv: an annotation "
        "file with the columns path, class, split; lists: headerless `path label` files; kinetics: "
        "the official CSV; ssv2: the official JSON files and webm folder; imagenet: class folders "
        "for training, the official flat validation folder",
    )
    annotations: Place | None = Field(
        None,
        description="Relative to root. csv, lists: the (training) file; kinetics: a CSV or a "
        "folder of them; ssv2: folder of the JSON files; imagenet: the validation ground truth",
    )
    test_annotations: Place | None = Field(
        None, description="lists: the test file; kinetics: the validation CSV (relative to root)"
    )
    videos: Place | None = Field(
        None,
        description="Relative to root. ssv2: the webm folder; kinetics: where the files are looked "
        "for; lists: what goes before each path",
    )
    synsets: Place | None = Field(
        None, description="imagenet: order of the devkit's class numbers (map_clsloc.txt)"
    )
    train_split: str = Field("train", description="Folder, or value of the split column")
    test_split: str = Field("val", description="The official validation set: reported numbers only")
    num_classes: int = Field(ge=2, description="Outputs of this dataset's head")
    reference_files: int | None = Field(
        None, ge=1, description="Training files of the public copy, to compare what is found with"
    )
    reference_test_files: int | None = Field(
        None, ge=1, description="Its validation files, likewise"
    )
    size: int = Field(224, ge=8, description="Input height and width in pixels")
    resize: int | None = Field(
        None, ge=8, description="Shorter side before the test crop; null: size * 256 / 224"
    )
    export_interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear",
        description="Filter by which predict.py resizes pictures for an exported network (images "
        "only; written to its preprocess.json). Training and evaluation here are bilinear",
    )
    frames: int | None = Field(None, ge=1, description="Frames of a clip (video only)")
    fps: Positive | None = Field(None, description="Clip sampling rate; frames are taken by time")
    base_lr: Positive = Field(description="Learning rate when this is the only dataset")
    weight_decay: float = Field(ge=0, description="Weight decay of the steps that draw this one")
    randaugment: RandAugmentSection | None = Field(None, description="null: off")
    random_erasing: Fraction = Field(0.0, description="Probability")
    crop_scale: Pair = Field((0.08, 1.0), description="Area of the random crop")
    crop_ratio: Pair = Field((0.75, 4 / 3), description="Aspect ratio of the crop")
    test_clips: int | None = Field(
        None, ge=1, description="Clips of a test video; null: 4, SSV2 2 (images 1)"
    )
    test_crops: Literal[1, 3] | None = Field(
        None, description="Crops along the longer side of each; null: 3 for video, 1 for images"
    )
    directional_labels: bool = Field(
        False, description="Labels change under a mirror: never flip (always so for ssv2)"
    )
    mixup: float = Field(0.0, ge=0, description="Mixup alpha; 0: off")
    cutmix: float = Field(0.0, ge=0, description="CutMix alpha; 0: off")
    label_smoothing: Fraction = Field(0.0, description="Mass spread over all classes; 0: off")

    @model_validator(mode="after")
    def _consistent(self) -> DatasetSection:
        if self.kind == "video" and (self.frames is None or self.fps is None):
            raise ValueError("a video dataset needs frames and fps")
        if self.kind == "image" and (self.frames is not None or self.fps is not None):
            raise ValueError(
                f"frames and fps are for video datasets only, got {self.frames} and {self.fps}"
            )
        if self.kind == "video" and self.export_interpolation != "bilinear":
            raise ValueError(
                f'export_interpolation "{self.export_interpolation}" is for image datasets only'
            )
        if self.kind == "image" and self.test_clips is not None:
            raise ValueError(f"test_clips is for video datasets only, got {self.test_clips}")
        if self.layout in ("ssv2", "kinetics") and self.kind != "video":
            raise ValueError(f'layout "{self.layout}" is for video')
        if self.layout == "imagenet" and self.kind != "image":
            raise ValueError('layout "imagenet" is for images')
        needed, allowed = LAYOUT_KEYS[self.layout]
        for key in LAYOUT_FILES:
            if getattr(self, key) is None and key in needed:
                raise ValueError(f'layout "{self.layout}" needs {key}: {needed[key]}')
            if getattr(self, key) is not None and key not in {*needed, *allowed}:
                layouts = [f'"{k}"' for k, (n, a) in LAYOUT_KEYS.items() if key in {*n, *a}]
                raise ValueError(
                    f"{key} is for the layouts {', '.join(layouts)}, "
                    f'not "{self.layout}" (got {str(getattr(self, key))!r})'
                )
        if self.test_resize < self.size:
            raise ValueError(f"resize {self.resize} is smaller than the crop of size {self.size}")
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} needs 0 < low <= high, got {(low, high)}")
        if self.crop_scale[1] > 1:
            raise ValueError(
                f"crop_scale is a share of the area: at most 1, got {self.crop_scale[1]}"
            )
        return self

    @property
    def is_image(self) -> bool:
        return self.kind == "image"

    @property
    def folder(self) -> Path | None:
        """Where the data are read from."""
        return self.shards or self.root

    @property
    def flip(self) -> bool:
        """Whether training may mirror: never where left and right are labels."""
        return not self.directional_labels and self.layout != "ssv2"

    @property
    def views(self) -> tuple[int, int]:
        """(clips, crops) of a test sample: 4 x 3 Kinetics, 2 x 3 SSV2, 1 x 1 images."""
        if self.is_image:
            return 1, self.test_crops or 1
        return self.test_clips or (2 if self.layout == "ssv2" else 4), self.test_crops or 3

    @property
    def test_resize(self) -> int:
        return self.resize or round(self.size * 256 / 224)


class DataSection(Section):
    """All datasets, and how training files are held out."""

    datasets: dict[str, DatasetSection] = Field(
        min_length=1, description="By name; each has its own head"
    )
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.05,
        description="Share of the training files of every class kept from training: half for the "
        "alpha steps (`alpha`), half for evaluation and search scores (`select`)",
    )
    index_dir: Place = Field(
        Path("indexes"),
        description="Folder of the dataset indexes (DATASET.parquet), outside the data; one that "
        "is missing is built by the first run, see scripts/index_data.py",
    )
    workers: int | None = Field(None, ge=1, description="Decoding threads; null: from the machine")
    prefetch: int = Field(
        2,
        ge=1,
        description="Batches decoded ahead at least; in training 8, fewer where memory is short",
    )
    max_bad_share: Fraction = Field(
        0.05,
        description="A dataset of whose files the index calls more than this share unusable is "
        "refused; substituted samples above this share stop the run (of 50 at least)",
    )
    file_timeout: Positive = Field(
        60.0,
        le=120,
        description="Seconds that reading one file may take in training and evaluation; one that "
        "takes longer counts as unusable. A disk that is gone blocks for ever and ends the run "
        "after three times as long at most, so 120 at most: the other ranks wait ten minutes",
    )
    cache_mb: int = Field(
        512,
        ge=0,
        description="Memory (the device's) for decoded `select` splits, per process, in MiB",
    )

    @model_validator(mode="after")
    def _names(self) -> DataSection:
        for name in self.datasets:
            if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                raise ValueError(f"dataset name {name!r}: letters, digits and _ only")
        return self


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


class VimnasSection(Section):
    """Everything that is not DeepSpeed's."""

    output_dir: Place = Field(description="Folder of the run: log, checkpoints, TensorBoard")
    space: str = Field(description=f"Search space: {', '.join(SPACES)}")
    arch: ArchSection | None = Field(
        None, description="Train this sub-network alone (scripts/train.py --arch); null: the space"
    )
    seed: int = Field(0, ge=0, description="Of weights, draws, data order and augmentation")
    cpu_threads: int | None = Field(
        None, ge=1, description="torch threads per process on a CPU; null: cores / ranks"
    )
    tokens: TokensSection = Field(TokensSection(), description=TokensSection.__doc__)
    model: ModelSection = Field(ModelSection(), description=ModelSection.__doc__)
    data: DataSection = Field(description=DataSection.__doc__)
    schedule: ScheduleSection = Field(ScheduleSection(), description=ScheduleSection.__doc__)
    optimizer: OptimizerSection = Field(OptimizerSection(), description=OptimizerSection.__doc__)
    alpha: AlphaSection = Field(AlphaSection(), description=AlphaSection.__doc__)
    sandwich: SandwichSection | None = Field(
        None, description="The sandwich rule; null: off as in the paper, {}: on"
    )
    ema: EmaSection | None = Field(
        None, description="Moving average of the weights; null: off as in the paper, {}: on"
    )
    log: LogSection = Field(LogSection(), description=LogSection.__doc__)
    checkpoint: CheckpointSection = Field(
        CheckpointSection(), description=CheckpointSection.__doc__
    )
    faults: FaultsSection = Field(FaultsSection(), description=FaultsSection.__doc__)
    guard: GuardSection = Field(GuardSection(), description=GuardSection.__doc__)

    @model_validator(mode="after")
    def _consistent(self) -> VimnasSection:
        if self.space not in SPACES:
            raise ValueError(f"space {self.space!r} is none of {', '.join(SPACES)}")
        if self.arch is not None:
            try:
                SPACES[self.space].validate(self.arch.arch())
            except ValueError as err:
                raise ValueError(f"arch: {err}") from err
        datasets, image = self.data.datasets, self.schedule.image_dataset
        images = [n for n, d in datasets.items() if d.is_image]
        if image is not None and image not in images:
            raise ValueError(f"schedule.image_dataset {image!r} is not an image dataset: {images}")
        if image is None and len(images) > 1 and len(datasets) > 1:
            raise ValueError(f"schedule.image_dataset must name one of {images}")
        if self.schedule.image_epochs and not images:
            raise ValueError("schedule.image_epochs needs an image dataset")
        if self.schedule.min_lr >= self.peak_lr:
            raise ValueError(
                f"schedule.min_lr {self.schedule.min_lr:g} is not below the peak {self.peak_lr:g}"
            )
        if self.schedule.warmup_unit == "epochs" and self.schedule.warmup > self.schedule.epochs:
            raise ValueError(
                f"schedule.warmup {self.schedule.warmup:g} exceeds schedule.epochs "
                f"{self.schedule.epochs}: the peak would never be reached"
            )
        if self.output_dir == Path():
            raise ValueError("output_dir must name a folder of the run's own, not '.'")
        if (self.schedule.image_epochs or 0) > self.schedule.epochs:
            raise ValueError(
                f"schedule.image_epochs {self.schedule.image_epochs} exceeds schedule.epochs "
                f"{self.schedule.epochs}"
            )
        geometry = self.tokens.geometry()
        for name, data in datasets.items():
            try:
                geometry.num_tokens(data.frames, data.size)
            except ValueError as err:
                raise ValueError(f"data.datasets.{name}: {err} (tokens.tubes)") from err
        for switch in self.model.places:
            self._check_places(f"model.{switch}")
        return self

    def _check_places(self, switch: str) -> None:
        """Raise ValueError unless all inputs are images of one plain grid of patches."""
        datasets, geometry = self.data.datasets, self.tokens.geometry()
        videos = [name for name, data in datasets.items() if not data.is_image]
        if videos:
            raise ValueError(
                f"{switch} is for images alone, and data.datasets has the videos of "
                f"{', '.join(videos)}: leave it out, or them"
            )
        sizes = {name: data.size for name, data in datasets.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{switch} is for images of one size, data.datasets has {sizes}")
        tube = geometry.tubes[geometry.image_tube]
        if tube.kernel[1:] != tube.stride[1:] or any(tube.offset):
            raise ValueError(
                f"{switch} needs patches that neither overlap nor leave gaps, the image's tube "
                f"{tube} (kernel/stride/offset) does: make its stride its kernel (tokens.tubes)"
            )
        if (self.side or 0) > MAX_SIDE:
            raise ValueError(
                f"{switch}: {self.side} patches along a side, {MAX_SIDE} at most (size, tokens)"
            )

    @property
    def side(self) -> int | None:
        """Patches along an image's side where the model's positions depend on it, else None."""
        if not self.model.places:
            return None
        geometry, data = self.tokens.geometry(), next(iter(self.data.datasets.values()))
        tube = geometry.tubes[geometry.image_tube]
        return tube.grid((geometry.image_frames, data.size, data.size))[1]

    @property
    def search_space(self) -> SearchSpace:
        """What is trained: the named space, or its one member `arch`."""
        space = SPACES[self.space]
        if self.arch is not None:
            return SearchSpace.single(self.arch.arch(), space.head_dim)
        return space

    @property
    def position_dim(self) -> int:
        """Channels over which position frequencies spread: the named space's largest width."""
        return SPACES[self.space].max_embed_dim

    @property
    def image_dataset(self) -> str | None:
        """The dataset of the image phase, None if there is no image dataset."""
        images = (n for n, d in self.data.datasets.items() if d.is_image)
        return self.schedule.image_dataset or next(images, None)

    @property
    def guarded(self) -> bool:
        """Whether the collapse guard is on."""
        enabled = self.guard.enabled
        return self.space in ("vit_b", "vit_l") if enabled is None else enabled

    @property
    def peak_lr(self) -> float:
        """Joint runs take the image dataset's learning rate (supplement, Appendix A)."""
        if self.schedule.lr is not None:
            return self.schedule.lr
        datasets = self.data.datasets
        return datasets[self.image_dataset or next(iter(datasets))].base_lr

    @property
    def image_epochs(self) -> int:
        """Length of the image phase in epochs: floor(E/3) when there is something to join."""
        if self.schedule.image_epochs is not None:
            return self.schedule.image_epochs
        joint = self.image_dataset is not None and len(self.data.datasets) > 1
        return self.schedule.epochs // 3 if joint else 0


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


class RunConfig(Section):
    """A whole, checked configuration."""

    about: str = Field("", description="What the file reproduces, its cost, its command")
    deepspeed: dict[str, Any]
    vimnas: VimnasSection

    @property
    def global_batch(self) -> int:
        return int(self.deepspeed["train_batch_size"])

    @property
    def alpha_batch(self) -> int:
        return self.vimnas.alpha.batch or self.global_batch

    def micro_batch(self, world_size: int, total: int | None = None) -> int:
        """Samples per process of a step. Raises ConfigError if they cannot be shared evenly."""
        total = total or self.global_batch
        key = "train_batch_size" if total == self.global_batch else "vimnas.alpha.batch"
        if total % world_size:
            raise ConfigError(
                f"{key} {total} cannot be shared evenly by {world_size} processes: "
                f"use a multiple of {world_size}, e.g. {math.ceil(total / world_size) * world_size}"
            )
        micro = total // world_size
        mixed = [n for n, d in self.vimnas.data.datasets.items() if d.mixup or d.cutmix]
        if mixed and total == self.global_batch and micro % 2:
            raise ConfigError(
                f"mixup pairs samples within a process: {micro} samples per process is odd "
                f"(train_batch_size {total} on {world_size}); datasets with mixup: {mixed}"
            )
        return micro

    def bf16(self, has_gpu: bool) -> bool:
        """ "auto" is bf16 on a GPU, fp32 on a CPU (where bf16 GEMMs are slow)."""
        enabled = self.deepspeed["bf16"]["enabled"]
        return has_gpu if enabled == "auto" else bool(enabled)

    def deepspeed_dict(self, world_size: int, has_gpu: bool) -> dict[str, Any]:
        """What `deepspeed.initialize` gets."""
        config = json.loads(json.dumps(self.deepspeed))
        bf16 = self.bf16(has_gpu)
        config["bf16"]["enabled"] = bf16
        config["gradient_accumulation_steps"] = 1
        config["train_micro_batch_size_per_gpu"] = self.micro_batch(world_size)
        config["zero_allow_untested_optimizer"] = True  # ours
        config.setdefault("steps_per_print", 10**9)
        if bf16:  # the owned gradient stays in fp32 after its reduction
            config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        return config


def dataset_section(name: str, values: dict[str, Any]) -> DatasetSection:
    """One dataset's section from its keys. Raises ConfigError in words."""
    try:
        return DatasetSection.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, ("data", "datasets", name))) from error


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read, override (`vimnas.data.datasets.k400.root=/data/k400`) and check a configuration.

    Overrides may also say `vimnas.data.k400.root`: a dataset's name stands for its section.
    Raises ConfigError for anything that could not run as written.
    """
    path = Path(path)
    try:
        raw = _parse(path.read_text(encoding="utf-8").removeprefix("\ufeff"), str(path))
    except OSError as err:
        raise ConfigError(f"cannot read the configuration {path}: {err.strerror}") from err
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} is not valid JSON: {err}") from err
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> RunConfig:
    """Check a configuration given as one object (the file's content)."""
    ours = {"about", "vimnas"}
    deepspeed = {k: v for k, v in raw.items() if k not in ours}
    _check_deepspeed(deepspeed)
    if "vimnas" not in raw:
        raise ConfigError('the configuration has no "vimnas" section')
    if not isinstance(raw["vimnas"], dict):
        raise ConfigError(f"vimnas must be an object, got {raw['vimnas']!r}")
    try:
        vimnas = VimnasSection.model_validate(raw["vimnas"])
    except ValidationError as err:
        raise ConfigError(_explain(err)) from err
    about = raw.get("about", "")
    if not isinstance(about, str):
        raise ConfigError(f"about must be a text, got {about!r}")
    return RunConfig(about=about, deepspeed=deepspeed, vimnas=vimnas)


def _check_deepspeed(config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key in REFUSED_KEYS:
            raise ConfigError(f'"{key}" is refused (got {value!r}): {REFUSED_KEYS[key]}')
        if key not in DEEPSPEED_KEYS:
            raise ConfigError(f'unknown key "{key}"{_nearest(key, [*DEEPSPEED_KEYS, "vimnas"])}')
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
                f'unknown key "bf16.{key}"{_nearest(key, ["enabled", "check_grad_overflow"])}'
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
            near = _nearest(key, ZERO_KEYS)
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
            raise ConfigError(
                f'unknown key "data_types.{key}"{_nearest(key, ["grad_accum_dtype"])}'
            )
        if value != "fp32":
            raise ConfigError(
                f'data_types.grad_accum_dtype must be "fp32", got {value!r}: bf16 loses gradients'
            )


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, [str(k) for k in known], n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(sorted(known))}"


def _parse(text: str, source: str) -> Any:
    """JSON. Raises JSONDecodeError for other texts, ConfigError for what no key can take."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError as err:
        raise ConfigError(f"{source}: lists or objects nest too deeply") from err
    except ValueError as err:
        if isinstance(err, json.JSONDecodeError | ConfigError):
            raise
        raise ConfigError(f"{source}: {err}") from err  # a number of thousands of digits


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f'the key "{key}" stands twice in the configuration')
        found[key] = value
    return found


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes KEY=VALUE, got {override!r}")
    value = override_value(key, text)
    parts = key.split(".")
    datasets: Any = raw
    for part in ("vimnas", "data", "datasets"):
        datasets = datasets.get(part, {}) if isinstance(datasets, dict) else {}
    if parts[:2] == ["vimnas", "data"] and len(parts) > 3 and parts[2] != "datasets":
        if parts[2] not in datasets:
            raise ConfigError(f"--set {key}: no dataset {parts[2]}{_nearest(parts[2], datasets)}")
        parts.insert(2, "datasets")
    node: Any = raw
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f'--set {key}: "{part}" is not a section')
        node = child
    node[parts[-1]] = value


#: pydantic's kinds of error that speak of Python, in words of JSON
_JSON_WORDS = {
    "path_type": "must be a path, in quotes",
    "string_type": "must be a text, in quotes",
    "tuple_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
}


def override_value(key: str, text: str) -> Any:
    """What `--set KEY=TEXT` gives: JSON, or a bare word as a string (--set vimnas.space=vit_s)."""
    try:
        return _parse(text, f"--set {key}")
    except json.JSONDecodeError:
        return text


def _explain(error: ValidationError, at: tuple[int | str, ...] = ()) -> str:
    """pydantic's findings about the section `at`, one line each, with the nearest valid key for
    unknown ones."""
    lines = []
    for item in error.errors():
        location = (*at, *item["loc"])
        path = ".".join(["vimnas", *map(str, location)])
        if item["type"] == "extra_forbidden":
            fields = _fields_at(location[:-1])
            lines.append(f'unknown key "{path}"{_nearest(str(location[-1]), fields)}')
        elif item["type"] == "missing" and isinstance(location[-1], int):
            short = path.rpartition(".")[0]
            lines.append(f"{short}: value {location[-1] + 1} is missing (got {item['input']!r})")
        elif item["type"] == "missing":
            lines.append(f'missing key "{path}"')
        else:
            message = _JSON_WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
            given = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            lines.append(f"{path}: {message}{given}")
    return "\n".join(lines)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = VimnasSection
    for part in location:
        if isinstance(part, str) and part in getattr(model, "model_fields", {}):
            model = _section_type(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section_type(annotation: Any) -> Any:
    """The Section inside dict[str, S], S | None, tuple[S, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_type(inner)
        if found:
            return found
    return None

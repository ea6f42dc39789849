"""How inputs become tokens, and the datasets with their recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vimnas_ds.config.section import FROM_JSON, Fraction, Pair, Place, Positive, Section, Triple
from vimnas_ds.tubes import TUBELET, TUBEVIT, TokenGeometry, Tube


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

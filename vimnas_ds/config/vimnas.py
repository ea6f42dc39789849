"""Everything that is not DeepSpeed's, as one section, and what its parts must agree on."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from vimnas_ds.config.data import DataSection, TokensSection
from vimnas_ds.config.section import Place, Section
from vimnas_ds.config.training import (
    AlphaSection,
    ArchSection,
    CheckpointSection,
    EmaSection,
    FaultsSection,
    GuardSection,
    LogSection,
    ModelSection,
    OptimizerSection,
    SandwichSection,
    ScheduleSection,
)
from vimnas_ds.space import SPACES, SearchSpace
from vimnas_ds.tubes import MAX_SIDE


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

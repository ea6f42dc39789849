"""The network's switches: what it is made of besides its widths."""

from __future__ import annotations

from dataclasses import dataclass

from vimnas_ds.tubes import MAX_SIDE

NORM_EPS = 1e-6  # timm's ViT


@dataclass(frozen=True)
class ModelOptions:
    """See `config.ModelSection` for their meaning. `side`: patches along a side of every image,
    where positions are learned or relative. Raises ValueError for what is no network."""

    qk_norm: bool = False
    layer_scale: float | None = None
    drop_path: float = 0.0
    activation_checkpointing: bool = False
    gelu: str = "tanh"  #: or "erf"
    norm_eps: float = NORM_EPS
    class_token: bool = False
    positions: str = "fixed"  #: or "learned"
    relative_positions: int | None = None  #: the largest distance told apart
    packed_qkv_bias: bool = False
    side: int | None = None

    def __post_init__(self) -> None:
        for key, choices in (("gelu", ("tanh", "erf")), ("positions", ("fixed", "learned"))):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} {getattr(self, key)!r} is none of {', '.join(choices)}")
        for key in ("class_token", "packed_qkv_bias"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} {getattr(self, key)!r} is neither true nor false")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps {self.norm_eps!r} is not between 0 and 1")
        if self.relative_positions is not None and self.relative_positions < 1:
            raise ValueError(f"relative_positions {self.relative_positions}: at least 1 is needed")
        if self.has_places and (self.side is None or not 1 <= self.side <= MAX_SIDE):
            raise ValueError(
                f"{self.side} patches along a side: 1 to {MAX_SIDE} are taken where positions are "
                "learned or relative, for memory is needed for all pairs of patches"
            )

    @property
    def has_places(self) -> bool:
        """Whether inputs must be images of `side` x `side` patches."""
        return self.positions == "learned" or self.relative_positions is not None

    @property
    def num_places(self) -> int:
        """Tokens of such an image, the class token included."""
        assert self.side is not None
        return self.side**2 + self.class_token

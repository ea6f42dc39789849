"""From pixels to tokens: entangled convolution tubes and positions, fixed ones of their centres.

A tube is a strided convolution, computed as patches times a sliced weight. Position is a fixed
sin/cos of the tube's physical centre (t, y, x) (TubeViT; its K600 ablation: 84.5 fixed, 79.2
learned). Channel c belongs to axis (c mod 6) // 2 and frequency 10000^(-(c // 6) / J): the axes
are interleaved, so any leading `embed_dim` channels keep all three. A class token, the first where
there is one, has no fixed position; learned positions have a vector for it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vimnas_ds.layout import Axis
from vimnas_ds.model.layers import EntangledLinear, EntangledTable
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.tubes import Size3, TokenGeometry, Tube


def sincos_positions(centres: Tensor, dim: int) -> Tensor:
    """(N, 3) centres (frames, pixels, pixels) -> (N, dim) in float32."""
    bands = math.ceil(dim / 6)
    omega = 10000.0 ** (-torch.arange(bands, dtype=torch.float64) / bands)
    angle = centres.double()[:, None, :] * omega[None, :, None]  # (N, J, 3)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim].float()


def fixed_positions(
    geometry: TokenGeometry, size: Size3, is_image: bool, dim: int, class_token: bool
) -> Tensor:
    """(N, dim) in float32 of an input's tokens, zeros for the class token."""
    found = sincos_positions(token_centres(geometry, size, is_image), dim)
    return F.pad(found, (0, 0, 1, 0)) if class_token else found


def check_places(
    options: ModelOptions, geometry: TokenGeometry, size: Size3, is_image: bool
) -> None:
    """Raise ValueError for an input that learned or relative positions are not made for."""
    if not options.has_places:
        return
    side, found = options.side, geometry.tubes[geometry.image_tube].grid(size)
    if not is_image or found != (1, side, side):
        what = f"images of {found[1]} x {found[2]} patches" if is_image else "clips"
        raise ValueError(
            f"this network's positions are those of images of {side} x {side} patches, not {what}"
        )


def token_centres(geometry: TokenGeometry, size: Size3, is_image: bool) -> Tensor:
    """Centres (t, y, x) of all tokens of an input, in token order: (N, 3). Images stand at t=0."""
    rows: list[tuple[float, float, float]] = []
    for index in geometry.active_tubes(is_image):
        rows += geometry.tubes[index].centres(size)
    centres = torch.tensor(rows)
    if is_image:
        centres[:, 0] = 0
    return centres


def to_clip(x: Tensor, geometry: TokenGeometry) -> tuple[Tensor, bool]:
    """(B, 3, H, W) or (B, 3, T, H, W) -> the 5-D clip that tubes see, and whether x is images."""
    if x.ndim == 5:
        return x, False
    if x.ndim != 4:
        raise ValueError(f"input must be (B, 3, H, W) or (B, 3, T, H, W), got {tuple(x.shape)}")
    return x[:, :, None].expand(-1, -1, geometry.image_frames, -1, -1), True


def tube_patches(x: Tensor, tube: Tube) -> Tensor:
    """(B, 3, T, H, W) -> (B, N, 3*kt*kh*kw): one row per token, in the kernel's own order."""
    for axis, (k, s, o) in enumerate(zip(tube.kernel, tube.stride, tube.offset, strict=True)):
        x = x.narrow(2 + axis, o, x.shape[2 + axis] - o).unfold(2 + axis, k, s)
    x = x.permute(0, 2, 3, 4, 1, 5, 6, 7)  # (B, t, h, w, 3, kt, kh, kw)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3], -1)


class Tokens(nn.Module):
    """All tubes. Images and clips differ in shape only; the image tube serves both."""

    tubes: Sequence[EntangledLinear]

    def __init__(
        self, geometry: TokenGeometry, embed_dim: int, position_dim: int, options: ModelOptions
    ):
        super().__init__()
        self.geometry, self.position_dim, self.options = geometry, position_dim, options
        self.tubes = nn.ModuleList(  # type: ignore[assignment]
            EntangledLinear(
                Axis("embed", embed_dim),
                Axis("all", 3 * math.prod(tube.kernel)),
                video_only=index != geometry.image_tube,
            )
            for index, tube in enumerate(geometry.tubes)
        )
        for tube in self.tubes:  # as timm's patch embedding: a convolution's own default
            nn.init.kaiming_uniform_(tube.weight, a=math.sqrt(5))
        embed = Axis("embed", embed_dim)
        self.class_token = EntangledTable(1, embed) if options.class_token else None
        learned = options.positions == "learned"
        self.position = EntangledTable(options.num_places, embed) if learned else None
        self._positions: dict[tuple[Size3, bool, torch.device], Tensor] = {}

    def positions(self, size: Size3, is_image: bool, device: torch.device) -> Tensor:
        """(N, position_dim) float32; a pure function of its arguments, computed once for each."""
        key = (size, is_image, device)
        if key not in self._positions:
            class_token = self.options.class_token
            found = fixed_positions(self.geometry, size, is_image, self.position_dim, class_token)
            self._positions[key] = found.to(device)
        return self._positions[key]

    def forward(self, x: Tensor, embed_dim: int, frozen: bool = False) -> Tensor:
        """(B, 3, H, W) or (B, 3, T, H, W) -> (B, N, embed_dim); `frozen`: no weight gradients."""
        clip, is_image = to_clip(x, self.geometry)
        size = (clip.shape[2], clip.shape[3], clip.shape[4])
        check_places(self.options, self.geometry, size, is_image)
        tokens = []
        if self.class_token is not None:
            tokens.append(self.class_token(embed_dim, frozen).expand(len(x), 1, -1))
        for index in self.geometry.active_tubes(is_image):
            layer, patches = self.tubes[index], tube_patches(clip, self.geometry.tubes[index])
            tokens.append(layer.forward_frozen(patches) if frozen else layer(patches, embed_dim))
        if self.position is None:
            positions = self.positions(size, is_image, x.device)[:, :embed_dim]
        else:
            positions = self.position(embed_dim, frozen)
        return torch.cat(tokens, 1) + positions.to(x.dtype)  # (B, N, D)

"""Where tokens come from: convolution tubes over (t, h, w), as geometry alone (no torch).

A video is cut by several sparse tubes at once (TubeViT), an image by one of them. With plain floor
convolutions a tube of kernel k, stride s, offset o over an extent n gives floor((n-o-k)/s) + 1
positions per axis, each centred at o + i*s + (k-1)/2: pixels in space, frames in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Size3 = tuple[int, int, int]
#: Patches along an image's side where positions are learned or relative; at this many a table of
#: the distances of all pairs takes 134 MB.
MAX_SIDE = 64


@dataclass(frozen=True)
class Tube:
    """One convolution: `kernel`, `stride`, `offset`, each (t, h, w) in frames and pixels."""

    kernel: Size3
    stride: Size3
    offset: Size3 = (0, 0, 0)

    def grid(self, size: Size3) -> Size3:
        """Token counts (t, h, w) over an input of `size`. Raises ValueError if none fits."""
        counts = [
            (n - o - k) // s + 1 if n - o >= k else 0
            for n, k, s, o in zip(size, self.kernel, self.stride, self.offset, strict=True)
        ]
        if min(counts) < 1:
            raise ValueError(
                f"tube {self} does not fit an input of {size} (frames, height, width): "
                "use smaller kernels and offsets (as ds_configs/weizmann_cifar10.json for 32 "
                "pixels), or a larger input"
            )
        return counts[0], counts[1], counts[2]

    def centres(self, size: Size3) -> Iterator[tuple[float, float, float]]:
        """Physical centre (t, y, x) of every token, t slowest, as the convolution orders them."""
        axes = [
            [o + i * s + (k - 1) / 2 for i in range(n)]
            for n, k, s, o in zip(
                self.grid(size), self.kernel, self.stride, self.offset, strict=True
            )
        ]
        for t in axes[0]:
            for y in axes[1]:
                for x in axes[2]:
                    yield t, y, x

    def __str__(self) -> str:
        k, s, o = ("x".join(map(str, v)) for v in (self.kernel, self.stride, self.offset))
        return f"{k}/{s}/{o}"


@dataclass(frozen=True)
class TokenGeometry:
    """All tubes of a model. `image_tube` indexes the one that images share with video: an image
    is repeated to that kernel's number of frames (one, for the default)."""

    tubes: tuple[Tube, ...]
    image_tube: int

    @property
    def image_frames(self) -> int:
        """Frames an image is repeated to before its tube."""
        return self.tubes[self.image_tube].kernel[0]

    def active_tubes(self, is_image: bool) -> tuple[int, ...]:
        """Indices of the tubes such an input passes through."""
        return (self.image_tube,) if is_image else tuple(range(len(self.tubes)))

    def num_tokens(self, frames: int | None, size: int) -> int:
        """Tokens of a square input of `size` pixels; `frames` is None for an image."""
        total = 0
        for index in self.active_tubes(frames is None):
            t, h, w = self.tubes[index].grid((frames or self.image_frames, size, size))
            total += t * h * w
        return total


#: TubeViT's four tubes (METHOD.md section 2): 196 tokens an image, 539 / 1176 for 32 / 64 frames.
TUBEVIT = TokenGeometry(
    (
        Tube((8, 8, 8), (16, 32, 32)),
        Tube((16, 4, 4), (6, 32, 32), (4, 8, 8)),
        Tube((4, 12, 12), (16, 32, 32), (0, 16, 16)),
        Tube((1, 16, 16), (32, 16, 16)),
    ),
    image_tube=3,
)
#: VideoMAE's dense cut, for comparison: an image is repeated to two frames.
TUBELET = TokenGeometry((Tube((2, 16, 16), (2, 16, 16)),), image_tube=0)

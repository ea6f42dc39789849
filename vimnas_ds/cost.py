"""Parameters and multiply-accumulates of any sub-network, in closed form (no torch, no model).

With E = embed_dim, K = head_dim, and for layer l: h heads, F = int(E*r) hidden units, N tokens:

    params  = sum_tubes (3 t h w + 1) E + sum_l [4E + (qkv) + E(hK) + E + EF + F + FE + E] + 2E
              + E C + C                                 (biases on every linear layer, two norms)
    MACs    = sum_tubes n 3 t h w E + sum_l N [3E hK + 2 N hK + hK E + 2 E F] + E C

Our convention (METHOD.md section 7): trunk + all tubes + one named head; the two attention
matmuls count (peers that leave them out are 20 to 40 % low on video); norms, GELU, softmax and
additions do not, nor do the products of relative positions (as many as those two matmuls again),
which the published numbers leave out. Where the package reports GFLOPs it means 1e9 MACs, the
papers' own convention. `Layout` has what published layouts differ in, so that their numbers can be
checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from vimnas_ds.space import Arch
from vimnas_ds.tubes import TUBEVIT, TokenGeometry


@dataclass(frozen=True)
class Layout:
    """What a model is made of besides its architecture. The defaults are this project's model."""

    tokens: TokenGeometry = TUBEVIT
    head_dim: int = 64
    qkv_bias: str = "qkv"  #: which of q, k, v have a bias: "qkv", "qv" (VideoMAE) or ""
    qk_norm: bool = False  #: LayerNorm over head_dim on q and on k, shared by a layer's heads
    layer_scale: bool = False  #: one vector of E per branch
    class_token: bool = False
    learned_positions: int = 0  #: number of learned position vectors (0: fixed sin/cos)
    relative_position_params: int = 0  #: per layer (AutoFormer: 7680)

    def num_tokens(self, frames: int | None, size: int) -> int:
        """Tokens of a square input of `size` pixels; `frames` is None for an image."""
        return self.tokens.num_tokens(frames, size) + self.class_token


def count_params(arch: Arch, num_classes: int, layout: Layout) -> int:
    """Parameters of the sub-network with one head of `num_classes` outputs, exactly."""
    e, k = arch.embed_dim, layout.head_dim
    volumes = (t.kernel[0] * t.kernel[1] * t.kernel[2] for t in layout.tokens.tubes)
    total = sum((3 * volume + 1) * e for volume in volumes)
    total += (layout.class_token + layout.learned_positions) * e
    for layer in range(arch.depth):
        inner, hidden = arch.num_heads[layer] * k, arch.hidden_dim(layer)
        total += 4 * e  # two norms
        total += 3 * e * inner + len(layout.qkv_bias) * inner + inner * e + e
        total += e * hidden + hidden + hidden * e + e
        total += 4 * k * layout.qk_norm + 2 * e * layout.layer_scale
        total += layout.relative_position_params
    return total + 2 * e + e * num_classes + num_classes


def count_macs(
    arch: Arch, num_classes: int, layout: Layout, *, frames: int | None, size: int
) -> int:
    """Multiply-accumulates of one forward pass over one input of `size` x `size` pixels.

    `frames` is None for an image. Raises ValueError if a tube does not fit.
    """
    e, k = arch.embed_dim, layout.head_dim
    shape = (frames or layout.tokens.image_frames, size, size)
    total, n = 0, int(layout.class_token)
    for index in layout.tokens.active_tubes(frames is None):
        tube = layout.tokens.tubes[index]
        (kt, kh, kw), (t, h, w) = tube.kernel, tube.grid(shape)
        total += t * h * w * 3 * kt * kh * kw * e
        n += t * h * w
    for layer in range(arch.depth):
        inner, hidden = arch.num_heads[layer] * k, arch.hidden_dim(layer)
        total += n * (3 * e * inner + 2 * n * inner + inner * e + 2 * e * hidden)
    return total + e * num_classes

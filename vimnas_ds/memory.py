"""Peak memory of a stand-alone sub-network's inference, in closed form (no torch, no model).

With B inputs of N tokens, E = embed_dim, I = h K and F = int(E r), in elements of the run's dtype:

    peak = params + B 3 T H W + max(stem, max_l attention_l, max_l mlp_l),  and 4 N E_max bytes
    attention = B N (5E + 4I), or B N (4E + 6I) if that is more with qk_norm
    mlp       = B N (6E + 2F)
    stem      = max_tubes (copy of the clip from the tube's offset on + kernel's copy + outputs)

5E: the trunk's input, the tubes' outputs, the block's input, norm1's and the branch's output; 4I:
q, k, v and attention's result, 6I: also normed q and k; 2F: fc1's result before and after GELU;
E_max: positions, in float32 at the supernet's width (not where they are learned: parameters). With
relative positions, which are made for all pairs of tokens, and scores, attention is the larger of

    B N (4E + 3I) + 4 N^2 K     and     B N (4E + 4I + 3 h N) + 2 N^2 K

(qk_norm: I more for the second). These are the tensors that
`SubNetwork.forward` holds without gradients. What kernels use inside (some 100 KiB a thread on a
CPU, cuBLAS's workspace on a GPU) is left out, and so are the process and its libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vimnas_ds.cost import Layout


@dataclass(frozen=True)
class Inference:
    """What a forward pass is given: `frames` is None for an image, `position_dim` the supernet's
    largest embed_dim, `element` the bytes of a number."""

    layout: Layout
    frames: int | None
    size: int
    position_dim: int
    batch: int = 1
    element: int = 4

    @property
    def rows(self) -> int:
        """Tokens of the batch, B N."""
        return self.batch * self.layout.num_tokens(self.frames, self.size)

    def resident(self) -> int:
        """Bytes of the input and the positions, held throughout; weights come on top."""
        pixels = self.batch * 3 * (self.frames or 1) * self.size**2
        fixed = 0 if self.layout.learned_positions else self.rows // self.batch * self.position_dim
        return pixels * self.element + 4 * fixed

    def stem(self, embed_dim: int) -> int:
        """Peak bytes of making tokens."""
        tokens, is_image = self.layout.tokens, self.frames is None
        shape = (self.frames or tokens.image_frames, self.size, self.size)
        most = made = 0
        for index in tokens.active_tubes(is_image):
            tube = tokens.tubes[index]
            made += self.batch * math.prod(tube.grid(shape)) * embed_dim
            kept = [n - o for n, o in zip(shape, tube.offset, strict=True)]
            clip = 3 * self.batch * math.prod(kept) if any(tube.offset) else 0
            most = max(most, clip + 3 * math.prod(tube.kernel) * embed_dim + made)
        return most * self.element

    def attention(self, embed_dim: int, num_heads: int) -> int:
        """Peak bytes of an attention branch."""
        inner = num_heads * self.layout.head_dim
        if self.layout.relative_position_params:
            return self._relative_attention(embed_dim, num_heads) * self.element
        most = 5 * embed_dim + 4 * inner
        if self.layout.qk_norm:
            most = max(most, 4 * embed_dim + 6 * inner)
        return self.rows * most * self.element

    def _relative_attention(self, embed_dim: int, num_heads: int) -> int:
        """Peak numbers of one with relative positions."""
        n, k, normed = self.rows // self.batch, self.layout.head_dim, self.layout.qk_norm
        inner, pairs = num_heads * k, n * n * k
        tables = self.rows * (4 * embed_dim + 3 * inner) + 4 * pairs
        scores = 4 * embed_dim + (4 + normed) * inner + 3 * num_heads * n
        return max(tables, self.rows * scores + 2 * pairs)

    def mlp(self, embed_dim: int, hidden_dim: int) -> int:
        """Peak bytes of an MLP branch."""
        return self.rows * (6 * embed_dim + 2 * hidden_dim) * self.element

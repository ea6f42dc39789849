"""An architecture drawn layer by layer, beside the largest: heads as squares, the MLP as a bar.

One row a layer, the input above. Filled squares are the layer's heads, outlined ones those that the
largest sub-network has besides; the bar is the MLP's width (embed_dim * mlp_ratio), its outline the
largest's. Layers that the sub-network lacks are outlines alone.
"""

from __future__ import annotations

from vimnas_ds.page.markup import escape
from vimnas_ds.space import Arch

WIDTH, ROW = 400, 17
LEFT, HEADS, MLP, TEXT = 24, 28, 158, 294
TOP = 46


def draw_architecture(arch: Arch, largest: Arch) -> str:
    """`arch` within `largest`, of the same space."""
    height = TOP + ROW * largest.depth + 8
    most_heads, widest = max(largest.num_heads), max(map(largest.hidden_dim, range(largest.depth)))
    cell = min(12.0, (MLP - HEADS - 14) / most_heads)
    room = TEXT - MLP - 10
    width = 240 * arch.embed_dim / largest.embed_dim
    parts = [
        f'<rect class="ghost" x="{HEADS}" y="6" width="240" height="12" rx="2"/>',
        f'<rect class="block width" x="{HEADS}" y="6" width="{width:.1f}" height="12" rx="2"/>',
        _text(HEADS + 246, 16, f"width {arch.embed_dim} of {largest.embed_dim}"),
        _text(HEADS, TOP - 8, "heads"),
        _text(MLP, TOP - 8, "MLP"),
        _text(TEXT, TOP - 8, "heads, ratio, width"),
    ]
    for layer in range(largest.depth):
        y, there = TOP + ROW * layer, layer < arch.depth
        parts.append(_text(LEFT - 4, y + 10, str(layer), "end"))
        heads = arch.num_heads[layer] if there else 0
        for head in range(largest.num_heads[layer]):
            kind = "block heads" if head < heads else "ghost"
            parts.append(
                f'<rect class="{kind}" x="{HEADS + cell * head:.1f}" y="{y + 1}" '
                f'width="{cell - 2:.1f}" height="10" rx="1.5"/>'
            )
        full = room * largest.hidden_dim(layer) / widest
        parts.append(_bar("ghost", y, full))
        note = "no such layer"
        if there:
            hidden = arch.hidden_dim(layer)
            parts.append(_bar("block mlp", y, room * hidden / widest))
            note = f"{heads}h  ×{arch.mlp_ratio[layer]:g}  {hidden}"
        parts.append(_text(TEXT, y + 10, note))
    label = f"architecture {arch}"
    return (
        f'<svg class="chart arch" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _bar(kind: str, y: float, width: float) -> str:
    place = f'x="{MLP}" y="{y + 1}" width="{width:.1f}"'
    return f'<rect class="{kind}" {place} height="10" rx="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="tick" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'

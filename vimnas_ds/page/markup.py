"""HTML in pieces: everything that comes from files or from people goes through `escape`."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


def escape(text: object) -> str:
    """As text between tags or inside a quoted attribute."""
    return html.escape(str(text), quote=True).encode("utf-8", "backslashreplace").decode()


def percent(share: float | None) -> str:
    """A fraction as people read it."""
    return "-" if share is None else f"{share:.1%}"


def points(share: float | None, error: float | None) -> str:
    """A fraction with its standard error, in percent."""
    if share is None or error is None:
        return percent(share)
    return f"{100 * share:.1f} ± {100 * error:.1f}%"


def large(number: float | None) -> str:
    """A count with a suffix: 23.4M."""
    if number is None:
        return "-"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            scale = 1e3 if suffix == "k" else size
            return f"{number / scale:.3g}{suffix}"
    return f"{number:,.4g}"


@dataclass(frozen=True)
class Cell:
    """A table's cell that a reader of the page (a test) finds by its key."""

    text: str
    key: str = ""
    tone: str = ""  #: a CSS class


def section(title: str, body: str, lead: str = "") -> str:
    """A titled part of the page, linked from its top; `title` and `lead` are plain text."""
    name = anchor(title)
    head = f'<h2><a href="#{name}">{escape(title)}</a></h2>'
    note = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f'<section id="{name}">{head}{note}{body}</section>'


def anchor(title: str) -> str:
    """A title as an id."""
    return escape("-".join(title.lower().split()))


def table(head: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """Plain texts; the first column names its row. Wide ones scroll in their own box."""
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = []
    for row in rows:
        cells = [c if isinstance(c, Cell) else Cell(c) for c in row]
        texts = "".join(_cell("th" if i == 0 else "td", c) for i, c in enumerate(cells))
        lines.append(f"<tr>{texts}</tr>")
    inner = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table>{inner}</table></div>'


def _cell(tag: str, cell: Cell) -> str:
    key = f' data-cell="{escape(cell.key)}"' if cell.key else ""
    tone = f' class="{escape(cell.tone)}"' if cell.tone else ""
    return f"<{tag}{key}{tone}>{escape(cell.text)}</{tag}>"


def pairs(values: Sequence[tuple[str, str]]) -> str:
    """Names with their values, as a list that wraps."""
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in values)
    return f'<dl class="pairs">{items}</dl>'


def items(lines: Sequence[str], kind: str = "") -> str:
    """Plain lines as a list."""
    inner = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{escape(kind)}">{inner}</ul>'


def folded(title: str, body: str) -> str:
    """Closed until it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def figure(title: str, drawing: str, note: str = "") -> str:
    """A drawing under its title; `drawing` is markup."""
    below = f"<small>{escape(note)}</small>" if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}{below}</figure>"


def grid(*figures: str, kind: str = "") -> str:
    """Figures side by side where there is room; four stand better in two rows of two."""
    kind = kind or ("two" if len(figures) in (2, 4) else "")
    return f'<div class="grid {escape(kind)}">{"".join(figures)}</div>'

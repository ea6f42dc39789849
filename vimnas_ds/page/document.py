"""The whole page: one HTML file that needs no network.

Its content policy forbids every request and every script but its own, so nothing in a file name or
class name can do anything, even if it got past `escape`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from vimnas_ds.page import searches, training
from vimnas_ds.page.markup import escape
from vimnas_ds.page.record import Record

CSS, JS = (Path(__file__).with_name(name).read_text("utf-8") for name in ("page.css", "page.js"))


def build_page(record: Record, clips: str, now: datetime) -> str:
    """`clips`: the part with samples, made by `clips.contact_sheets` or `without_clips`."""
    first = [
        searches.architectures,
        training.test_scores,
        searches.controls,
        training.curves,
        training.alphas,
        searches.decisions,
        searches.picks,
        searches.front,
        searches.evaluation,
        searches.ranking,
    ]
    head = _part(training.headline, record) + _part(training.standing, record)
    parts = [_part(make, record) for make in first]
    last = [_part(make, record) for make in (training.faults, training.configuration)]
    # what the others could not use is told when all are made
    parts += [clips, last[0], training.left_out(record), last[1]]
    body = "".join(parts)
    titles = re.findall(r'<section id="([^"]*)"><h2><a href="[^"]*">([^<]*)</a>', body)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in titles)
    script_hash = base64.b64encode(hashlib.sha256(JS.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{script_hash}'"
    )
    made = f"Made {now:%Y-%m-%d %H:%M} from {record.files.root.resolve()}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(record.name)}</title><style>{CSS}</style></head><body><main>"
        f"{head}<nav>{links}</nav>{body}"
        f'<p class="about">{escape(made)}</p></main><div id="tip" role="status"></div>'
        f"<script>{JS}</script></body></html>\n"
    )


def _part(make: Callable[[Record], str], record: Record) -> str:
    """A part, or nothing and a note where its file has not the form that this version writes."""
    try:
        return make(record)
    except Exception as err:  # there is no end to what a file may hold: the other parts come
        record.notes.append(
            f"the part {make.__name__!r} is left out, its files have another form: {err!r}"
        )
        return ""

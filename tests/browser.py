"""A real browser without a display: opens a page, tells what it became, takes its picture."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def _chromium() -> str:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    return found


def _run(folder: Path, page: Path, *options: str) -> str:
    command = [_chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def frame(page: Path, folder: Path, width: int, height: int, script: str) -> Path:
    """A page with `page` in it, as wide as a phone (a window is never that narrow); when it has
    loaded, `script` sees its `view` and `doc` and returns a text."""
    outer = folder / f"frame{width}.html"
    outer.write_text(
        '<!doctype html><body style="margin:0"><iframe style="border:0;width:'
        f'{width}px;height:{height}px" srcdoc="{html.escape(page.read_text())}"></iframe><script>'
        "onload=()=>{const view=frames[0],doc=view.document;"
        f"document.title=(()=>{{{script}}})()}}</script>"
    )
    return outer


def ask(page: Path, folder: Path, width: int, height: int, script: str) -> str:
    """What `script` returns of the page at this size (see `frame`)."""
    outer = frame(page, folder, width, height, script)
    found = _run(folder, outer, "--dump-dom", "--virtual-time-budget=5000")
    match = re.search(r"<title>(.*?)</title>", found, re.DOTALL)
    assert match is not None, found[:2000]
    return html.unescape(match[1])


def dump(page: Path, folder: Path) -> str:
    """The page as the browser holds it after its script has run."""
    return _run(folder, page, "--dump-dom", "--virtual-time-budget=5000")


def photograph(page: Path, folder: Path, width: int, height: int) -> Path:
    """A PNG of the page at this size."""
    shot, outer = folder / f"{width}.png", frame(page, folder, width, height, "return ''")
    size = f"--window-size={max(width, 500)},{height}"
    _run(folder, outer, size, f"--screenshot={shot}")
    return shot

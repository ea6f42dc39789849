"""Seeds for everything random: a stable hash of what the randomness belongs to.

Python's own `hash` changes between processes; sha256 does not change at all.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: str | int) -> int:
    """63 bits that depend on all `parts` and on nothing else."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

"""The time that this process has been awake, as far as one of its threads can tell.

A process that is suspended (SIGSTOP, Ctrl-Z, a frozen control group, a paused machine) hears nobody
meanwhile, and is heard by nobody: what it judges by a clock, it must judge by the time in which it
could have heard. Whoever judges looks at this clock twice a second; between two looks never more
than LONGEST pass on it, however long it took.
"""

from __future__ import annotations

import threading
import time

#: Seconds that count at most between two looks: a loop that turns twice a second and takes longer
#: is late, one that takes much longer was asleep.
LONGEST = 2.0


class AwakeClock:
    """Seconds since an unknown moment, without those slept; for any thread."""

    def __init__(self) -> None:
        self._looked = self._awake = time.monotonic()
        self._lock = threading.Lock()

    def now(self) -> float:
        with self._lock:
            looked = time.monotonic()
            self._awake += min(looked - self._looked, LONGEST)
            self._looked = looked
            return self._awake

"""The process in which files are probed: `python -m vimnas_ds.data.probe_worker IN OUT ...`.

It reads requests from one pipe and answers on another, one message a file, so that its parent
always knows which file it is at. It is a process of its own because FFmpeg may crash or hang on a
damaged file, and started afresh (not forked, nor by multiprocessing, which would import the
parent's script) so that it starts in a fraction of a second and inherits no threads.

Messages are JSON, the timestamps base64; nothing is unpickled.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import signal
import sys
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vimnas_ds.data.probe import Verdict, probe_file
from vimnas_ds.data.timeline import Timeline

#: The first message of a process that has started.
READY = b"ready"


def encode_verdict(verdict: Verdict) -> bytes:
    """A verdict as a message."""
    values = asdict(verdict)
    if verdict.timeline is not None:
        *numbers, deltas = verdict.timeline
        values["timeline"] = [*numbers, base64.b64encode(deltas).decode()]
    return json.dumps(values).encode()


def decode_verdict(message: bytes) -> Verdict:
    """The verdict that `encode_verdict` wrote."""
    values: dict[str, Any] = json.loads(message)
    if values["timeline"] is not None:
        *numbers, deltas = values["timeline"]
        values["timeline"] = Timeline._make([*numbers, base64.b64decode(deltas)])
    return Verdict(**values)


def main(argv: list[str]) -> int:
    requests, answers = (Connection(int(number)) for number in argv[:2])
    is_image, thorough, memory = (int(value) for value in argv[2:5])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    answers.send_bytes(READY)
    while True:
        try:
            path = Path(os.fsdecode(requests.recv_bytes()))
            answers.send_bytes(encode_verdict(probe_file(path, bool(is_image), bool(thorough))))
        except (EOFError, BrokenPipeError):  # the parent is done, or gone
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

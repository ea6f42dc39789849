"""What every rank is doing, told to rank 0 once a second, and what follows from it.

Each rank holds one TCP connection to rank 0, apart from the process group: a collective that hangs
does not hang it, and the kernel closes it when the process dies, however that happens. Rank 0 (the
hub) judges; a verdict, as well as any rank's wish to stop, goes back to all over the connections.

Ranks do the same things in the same order, so of two ranks the one that has begun fewer of them
is behind and the other waits for it. Where none is behind, those that wait in a collective wait
for those that do not.

Silence is judged by an awake clock: a run that was suspended as a whole goes on when continued.
"""

from __future__ import annotations

import json
import math
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from vimnas_ds.train.awake import AwakeClock
from vimnas_ds.train.status import Exit

#: Seconds between two messages.
BEAT = 1.0
#: Bytes of a message, and seconds for its bytes to follow one another.
LONGEST, PATIENCE = 2**16, 5
#: Characters of a verdict's text, at most 12 bytes each as JSON: what else is said fits beside it.
LONGEST_TEXT = 4000
#: Times the limit that an activity may take: before the run has begun an index may be built, and
#: a checkpoint may go to slow storage.
ALLOWANCE = {"start": math.inf, "save": 3.0, "rewind": 3.0}


@dataclass(frozen=True)
class Beat:
    """One rank, now."""

    rank: int
    pid: int
    host: str
    begun: int = 0  #: activities begun so far
    activity: str = "start"
    step: int = 0  #: the step it belongs to, counted from 1
    held: float = 0.0  #: seconds in it without progress
    collective: bool = False  #: whether it waits in a collective
    where: str = ""  #: the main thread's innermost line
    stop: str | None = None  #: why it wants all to save and stop
    leaving: bool = False  #: it is done and needs nobody any more

    @property
    def place(self) -> str:
        return f"'{self.activity}'" + (f" at step {self.step}" if self.step else "")


@dataclass(frozen=True)
class Verdict:
    """Why the run ends on all ranks: the text is the first line everywhere."""

    text: str
    ranks: tuple[int, ...]  #: the culprits
    code: int = Exit.FAILED


def shortened(text: str) -> str:
    """As much of a verdict's text as a message can hold."""
    if len(text) <= LONGEST_TEXT:
        return text
    mark = f" ... (cut: {len(text):,} characters)"
    return text[: LONGEST_TEXT - len(mark)] + mark


def died(beat: Beat) -> Verdict:
    return Verdict(f"rank {beat.rank} died: {_last_of(beat)}", (beat.rank,))


def fell_silent(beat: Beat, seconds: float) -> Verdict:
    text = f"rank {beat.rank} has not been heard of for {seconds:.0f} s: {_last_of(beat)}"
    return Verdict(text, (beat.rank,))


def _last_of(beat: Beat) -> str:
    return f"process {beat.pid} on {beat.host}, last heard of in {beat.place}"


def verdict_of(message: Mapping[str, Any]) -> Verdict:
    return Verdict(message["text"], tuple(message["ranks"]), message["code"])


def find_stuck(beats: Sequence[Beat], limit: float) -> Verdict | None:
    """The ranks for which all others have waited too long: more than `limit` seconds, or what
    ALLOWANCE makes of it."""
    staying = [beat for beat in beats if not beat.leaving]
    behind = [b for b in staying if b.begun == min(one.begun for one in staying)]
    behind = [b for b in behind if not b.collective] or behind
    if not behind or any(b.held <= limit * ALLOWANCE.get(b.activity, 1.0) for b in behind):
        return None
    held = min(b.held for b in behind)
    where = "; ".join(f"rank {b.rank} is in {b.where}" for b in behind)
    ranks = tuple(b.rank for b in behind)
    if len(behind) == len(staying) > 1:
        where = f"which of them holds the others up is not known: {where}"
    who = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {[*ranks]} have"
    return Verdict(
        f"{who} been in {behind[0].place} for {held:.0f} s, longer than "
        f"vimnas.faults.stuck_minutes allows: {where}",
        ranks,
    )


class Line:
    """A framed connection that carries JSON objects; sending to a peer that is gone is no error
    (reading shows it)."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", PATIENCE, 0))
        self.connection: Connection[Any, Any] = Connection(sock.detach())
        self._sending = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        with self._sending:
            try:
                self.connection.send_bytes(json.dumps(message).encode())
            except OSError:
                return

    def knows(self, key: str) -> bool:
        """Whether the peer begins with the key; before that nothing of it is read as JSON."""
        try:
            return secrets.compare_digest(self.connection.recv_bytes(len(key)), key.encode())
        except (EOFError, OSError):
            return False

    def receive(self) -> dict[str, Any] | None:
        """The next message; None: the peer is gone, or talks nonsense."""
        try:
            message: dict[str, Any] = json.loads(self.connection.recv_bytes(LONGEST))
        except (EOFError, OSError, ValueError):
            return None
        return message


@dataclass
class _Member:
    line: Line
    beat: Beat
    heard: float  # by the hub's clock


def listen(address: str, backlog: int) -> socket.socket:
    """A server's socket: on this machine alone where the ranks meet on its own address, else on all
    of its addresses."""
    if address in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", 0), backlog=backlog)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=backlog)


@dataclass
class Hub:
    """Rank 0's thread that listens to all ranks, itself included.

    Args:
        world_size: ranks that will join.
        address: where the ranks meet.
        key: what a joining rank must know.
        stuck, silent: seconds; see `vimnas.faults`.
    """

    world_size: int
    address: str = "127.0.0.1"
    stuck: float = math.inf
    silent: float = 60.0
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    verdict: Verdict | None = None
    stop: str | None = None

    def __post_init__(self) -> None:
        self._server = listen(self.address, self.world_size)
        self.port: int = self._server.getsockname()[1]
        self._members: dict[int, _Member] = {}
        self._admitted: queue.SimpleQueue[_Member] = queue.SimpleQueue()
        self._told = threading.Event()
        self._telling = threading.Lock()  # a verdict found meanwhile has not been told
        self._clock = AwakeClock()
        threading.Thread(target=self._run, name="hub", daemon=True).start()

    def find(self, verdict: Verdict | None) -> None:
        """A verdict to tell all ranks; the first one counts, for it is the cause of the others."""
        with self._telling:
            if self.verdict is None and verdict is not None:
                self._told.clear()
                self.verdict = replace(verdict, text=shortened(verdict.text))

    def wait_until_told(self, seconds: float) -> None:
        """Until every rank has the verdict, or the wish to stop."""
        self._told.wait(seconds)

    def _run(self) -> None:
        told = 0.0
        while True:
            while not self._admitted.empty():
                member = self._admitted.get()
                self._members[member.beat.rank] = member
            lines = {m.line.connection: m for m in self._members.values()}
            for ready in wait([self._server, *lines], BEAT / 2):
                if ready is self._server:
                    self._accept()
                else:
                    self._listen(lines[ready])  # type: ignore[index]
            self._judge()
            news = (self.verdict or self.stop) and not self._told.is_set()
            if news or self._clock.now() - told >= BEAT:
                told = self._clock.now()
                self._tell()

    def _accept(self) -> None:
        try:
            sock = self._server.accept()[0]
        except OSError:  # it has hung up already
            return
        # apart: who says nothing, or little at a time, keeps nobody else waiting
        threading.Thread(target=self._admit, args=(Line(sock),), daemon=True).start()

    def _admit(self, line: Line) -> None:
        message = line.receive() if line.knows(self.key) else None
        if message is None:
            line.connection.close()
            return
        self._admitted.put(_Member(line, Beat(**message), self._clock.now()))

    def _listen(self, member: _Member) -> None:
        message = member.line.receive()
        if message is None:
            del self._members[member.beat.rank]
            if not member.beat.leaving:
                self.find(died(member.beat))
        elif "text" in message:
            self.find(verdict_of(message))
        else:
            member.beat, member.heard = Beat(**message), self._clock.now()
            self.stop = self.stop or member.beat.stop

    def _judge(self) -> None:
        now = self._clock.now()
        for member in self._members.values():
            if not member.beat.leaving and now - member.heard > self.silent:
                self.find(fell_silent(member.beat, self.silent))
        if len(self._members) == self.world_size:
            self.find(find_stuck([m.beat for m in self._members.values()], self.stuck))

    def _tell(self) -> None:
        zero, verdict = self._members.get(0), self.verdict
        message = {
            "zero": asdict(zero.beat) if zero else None,
            "stop": self.stop,
            "verdict": asdict(verdict) if verdict else None,
        }
        for member in self._members.values():
            member.line.send(message)
        with self._telling:
            if verdict is self.verdict and (verdict or message["stop"]):
                self._told.set()


def connect(host: str, port: int, key: str, beat: Beat) -> Line:
    """This rank's line to the hub. Raises OSError if it cannot be reached."""
    line = Line(socket.create_connection((host, port), 60))
    line.connection.send_bytes(key.encode())
    line.send(asdict(beat))
    return line

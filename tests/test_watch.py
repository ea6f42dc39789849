"""A run that something befalls ends on all ranks, says why, leaves nobody behind, and goes on."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, NoReturn

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT
from vimnas_ds.config import load_config
from vimnas_ds.data.joint import open_datasets
from vimnas_ds.train.launchers import Launchers, Program, to_watch
from vimnas_ds.train.pulse import PATIENCE, Beat, Hub, Line, Verdict, connect, find_stuck
from vimnas_ds.train.ranks import free_port
from vimnas_ds.train.status import Exit
from vimnas_ds.train.watch import Watch

RUNNER = Program("deepspeed", ("/bin/python", "/bin/deepspeed", "scripts/train.py"), 7)
LAUNCH = Program("python", ("/bin/python", "-u", "-m", "deepspeed.launcher.launch", "train.py"), 8)
NODE = LAUNCH._replace(command=(*LAUNCH.command[:4], "--node_rank=1", "train.py"))
TORCHRUN = Program("torchrun", ("/bin/python3", "/bin/torchrun", "scripts/train.py"), 8)
SHELL, SSH = Program("bash", ("bash",), 5), Program("sshd-session", (), 4)
INIT, USERS_INIT = Program("init", (), 1), Program("systemd", ("systemd", "--user"), 900)
BY_DEEPSPEED = {"LOCAL_RANK": "0", "CROSS_RANK": "0"}
BY_TORCHRUN = {"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
BY_HAND = {"LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("ancestors", "variables", "nohup", "watched"),
    [
        ([LAUNCH, RUNNER, SHELL, SSH, INIT], BY_DEEPSPEED, False, [0, 1]),
        ([LAUNCH, RUNNER._replace(pid=1)], BY_DEEPSPEED, False, [0, 1]),  # a container's program
        ([NODE, SHELL, SSH, INIT], BY_DEEPSPEED, False, [0, 2]),  # reached by a runner elsewhere
        ([NODE, SHELL, SSH, INIT], BY_DEEPSPEED, True, [0]),
        ([NODE, INIT], BY_DEEPSPEED, False, [0]),
        ([LAUNCH, SHELL, INIT], BY_DEEPSPEED, False, [0]),  # by hand, without a runner
        ([LAUNCH, INIT], BY_DEEPSPEED, True, None),  # the runner was killed
        ([INIT], BY_DEEPSPEED, False, None),  # the launcher was
        ([USERS_INIT, INIT], BY_DEEPSPEED, False, None),
        ([TORCHRUN, SHELL, SSH, INIT], BY_TORCHRUN, False, [0]),
        ([TORCHRUN._replace(pid=1)], BY_TORCHRUN, False, [0]),
        ([INIT], BY_TORCHRUN, False, None),
        ([INIT], BY_HAND, False, [0]),
        ([SHELL, SSH, INIT], {}, False, []),  # no launcher: the shell may close
        ([RUNNER, SHELL], {}, False, []),
    ],
)
def test_a_rank_looks_after_its_launchers_and_after_no_shell(ancestors, variables, nohup, watched):
    assert to_watch(ancestors, variables, nohup) == watched


def test_the_command_that_resumes_is_the_one_that_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    command = ["python", "train.py", "--resume", "a b", "--set", "x=a b", "--overwrite"]
    monkeypatch.setattr(sys, "orig_argv", command)
    assert Launchers().resuming() == "python train.py --set 'x=a b' --resume"


def beats(**differing: dict[str, object]) -> list[Beat]:
    """Four ranks that wait for one another in a step's collective since 100 s, except for some."""
    alike = Beat(0, 1, "host", 9, "step", 3, 100.0, collective=True, where="all_reduce")
    found = [replace(alike, rank=rank) for rank in range(4)]
    for name, values in differing.items():
        rank = int(name[1:])
        found[rank] = replace(found[rank], **values)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("differing", "ranks"),
    [
        ({"r2": {"begun": 8, "activity": "data"}}, (2,)),
        ({"r2": {"begun": 8, "activity": "data", "held": 59.0}}, None),
        ({"r1": {"collective": False}}, (1,)),
        ({"r1": {"collective": False, "held": 1.0}}, None),  # gets on: the others may wait
        ({}, (0, 1, 2, 3)),
        ({"r0": {"begun": 8, "activity": "start", "held": 1e6}}, None),  # builds an index
        ({"r0": {"begun": 8, "activity": "save"}}, None),  # slow storage
        ({"r0": {"begun": 8, "activity": "save", "held": 181.0}}, (0,)),
        ({"r3": {"begun": 2, "leaving": True}, "r1": {"collective": False}}, (1,)),
    ],
)
def test_the_rank_that_all_others_wait_for_is_the_stuck_one(differing, ranks):
    verdict = find_stuck(beats(**differing), 60)
    assert (verdict and verdict.ranks) == ranks
    if ranks == (0, 1, 2, 3):  # on a GPU a kernel that hangs looks like that: said as it is
        assert "which of them holds the others up is not known: rank 0 is in" in verdict.text
    assert find_stuck(beats(**differing), math.inf) is None


def member(hub: Hub, rank: int, key: str | None = None) -> Line:
    return connect("127.0.0.1", hub.port, key or hub.key, Beat(rank, 100 + rank, "host"))


def heard(line: Line, what: str) -> object:
    """What the hub says first of "stop" or "verdict"."""
    while (message := line.receive()) is not None:
        if message[what]:
            return message[what]
    return None


def test_a_line_that_breaks_is_a_death_unless_its_rank_was_leaving() -> None:
    hub = Hub(3)
    one, two, three = (member(hub, rank) for rank in range(3))
    three.send(asdict(Beat(2, 102, "host", leaving=True)))
    three.connection.close()
    two.send(asdict(Beat(1, 101, "host", 7, "data", 12, stop="SIGTERM")))
    assert heard(one, "stop") == "SIGTERM"
    two.connection.close()
    found = heard(one, "verdict")
    assert isinstance(found, dict)
    assert found["text"] == ("rank 1 died: process 101 on host, last heard of in 'data' at step 12")
    hub.wait_until_told(0)


def test_a_rank_that_falls_silent_is_named_though_its_line_holds() -> None:
    hub = Hub(2, silent=4)
    one, two = (member(hub, rank) for rank in range(2))
    found = None
    while found is None:
        one.send(asdict(Beat(0, 100, "host")))
        message = one.receive()
        assert message is not None
        found = message["verdict"]
    assert found["text"].startswith("rank 1 has not been heard of for 4 s: process 101 on host")
    assert heard(two, "verdict") == found


def test_the_hub_listens_to_nobody_without_the_key() -> None:
    hub = Hub(2)
    assert heard(member(hub, 1, "0" * 32), "verdict") is None  # the hub hangs up
    with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    assert hub.verdict is None
    assert not hub._members


def test_a_stranger_who_says_nothing_keeps_no_rank_waiting() -> None:
    hub = Hub(2, silent=30)
    with socket.create_connection(("127.0.0.1", hub.port)):
        one, two = (member(hub, rank) for rank in range(2))
        started = time.monotonic()
        two.connection.close()
        found = heard(one, "verdict")
        assert time.monotonic() - started < PATIENCE
    assert isinstance(found, dict)
    assert "rank 1 died" in found["text"]


def test_ranks_of_one_machine_meet_where_no_other_reaches() -> None:
    assert Hub(2, "127.0.0.1")._server.getsockname()[0] == "127.0.0.1"
    assert Hub(2, "node1")._server.getsockname()[0] in ("::", "0.0.0.0")


def test_a_long_error_is_cut_for_the_others_and_said_whole_by_its_own_rank(monkeypatch) -> None:
    def end(self: Watch, text: str, *rest: object) -> NoReturn:
        raise SystemExit(text + "\n" + self._details)

    monkeypatch.setattr(Watch, "_end", end)
    hub, watch = Hub(2), Watch()
    watch.rank, watch._line, other = 1, member(hub, 1), member(hub, 0)
    with pytest.raises(SystemExit) as ended:
        watch.fail(ValueError("first, " + 20_000 * "\N{GRINNING FACE}"), Exit.STOPPED)
    found = heard(other, "verdict")
    assert isinstance(found, dict)
    assert found["text"].startswith("rank 1 stopped: first, \N{GRINNING FACE}")
    assert found["text"].endswith(" ... (cut: 20,023 characters)")
    said = str(ended.value).splitlines()
    assert said == [found["text"], "rank 1 stopped: first, " + 20_000 * "\N{GRINNING FACE}"]
    many = Hub(1)
    one = member(many, 0)
    many.find(Verdict(f"ranks {[*range(20_000)]} have been in 'step'", (0,)))
    found = heard(one, "verdict")
    assert isinstance(found, dict)
    assert found["text"].startswith("ranks [0, 1, 2")


def test_the_last_beat_of_a_rank_that_leaves_says_so(monkeypatch) -> None:
    """One that the watch made just before is still on its way."""
    sent: list[bool] = []
    made, send = threading.Event(), threading.Event()

    def slow(beat: Beat) -> dict[str, object]:
        if not made.is_set():
            made.set()
            send.wait(10)
        return asdict(beat)

    monkeypatch.setattr("vimnas_ds.train.watch.asdict", slow)
    watch = Watch()
    watch._line = SimpleNamespace(send=lambda beat: sent.append(beat["leaving"]))
    threads = [threading.Thread(target=watch._send_beat)]
    threads.append(threading.Thread(target=watch.leave, args=(Exit.DONE,)))
    threads[0].start()
    made.wait(10)
    threads[1].start()
    threads[1].join(0.5)
    send.set()
    for thread in threads:
        thread.join(10)
    assert sent == [False, True]


SLEEPER = """
import os, signal, sys, time
from vimnas_ds.config import FaultsSection
from vimnas_ds.train import watch as module

module.MEETING = 1.0 if "alone" in sys.argv else 600.0
signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in sys.argv else signal.SIG_DFL)
watch = module.Watch()
watch.start()
if "alone" in sys.argv:  # the others never come, or there are none
    time.sleep(100 if os.environ["WORLD_SIZE"] == "2" else 3)
    sys.exit()
if "begun" in sys.argv:
    watch.begin(lambda text, code: print(code, text, flush=True))
watch.limits = FaultsSection(grace_seconds=1.0 if "late" in sys.argv else 60.0)
if "hangup" in sys.argv:
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(1.5)
os.kill(os.getpid(), signal.SIGTERM)
if "twice" in sys.argv:
    os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher: the same request
    time.sleep(6)
    os.kill(os.getpid(), signal.SIGINT)
time.sleep(100)
"""


def test_what_is_waited_for_in_vain_ends_in_time_and_says_so() -> None:
    expected = {
        "alone": "rank 0 has waited 1 s for the ranks to meet: one of 2 did not start, or cannot "
        "reach 127.0.0.1, port 1; see what each machine printed\n",
        "early": "rank 0 stops before the run has begun: rank 0 received SIGTERM\n",
        "hangup": "rank 0 stops before the run has begun: rank 0 received SIGHUP\n",
        "nohup hangup": "rank 0 stops before the run has begun: rank 0 received SIGTERM\n",
        "begun twice": "rank 0 received SIGTERM: saving and stopping\n"
        "rank 0 received SIGINT again: ends at once\n",
        "begun late": "rank 0 received SIGTERM: saving and stopping\n"
        "rank 0 is still in 'start', vimnas.faults.grace_seconds (1 s) after it was to stop "
        "(rank 0 received SIGTERM): ends without a checkpoint\n",
    }
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for case, said in expected.items():
        done = subprocess.run(
            [sys.executable, "-c", SLEEPER, *case.split()],
            env={**env, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=90,
        )
        code = 1 if case == "alone" else 75
        assert (done.returncode, done.stderr.rstrip("\n")) == (code, said.rstrip("\n"))
        last = said.splitlines()[-1]
        assert done.stdout == (f"75 {last}\n" if case.startswith("begun") else "")


RANKS = """
import os, sys, threading, time
import torch.distributed as dist
from vimnas_ds.config import FaultsSection
from vimnas_ds.train import watch as module
from vimnas_ds.train.ranks import Ranks

watch = module.Watch()
watch.start()
dist.init_process_group("gloo")
watch.join(Ranks(watch.rank, 2, "cpu"))
values = {**vars(FaultsSection()), "silent_seconds": 5.0, "stuck_minutes": 5 / 60}
watch.set_limits(FaultsSection.model_construct(**values))
watch.begin(print)
while True:
    watch.at("step", 1)
    print("step", flush=True)
    time.sleep(0.2)
"""


def test_a_suspended_run_goes_on_and_a_rank_that_alone_is_stopped_is_found() -> None:
    """All are stopped for longer than silence, and a step, may last."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", RANKS]
    zero = subprocess.Popen(command, env={**env, "RANK": "0"}, process_group=0, **pipe)
    group = zero.pid
    one = subprocess.Popen(command, env={**env, "RANK": "1"}, process_group=group, **pipe)
    try:
        for rank in (zero, one):
            assert rank.stdout.readline() == "step\n"
        for _ in range(2):
            os.killpg(group, signal.SIGSTOP)
            time.sleep(9)
            os.killpg(group, signal.SIGCONT)
            time.sleep(1.5)
        assert (zero.poll(), one.poll()) == (None, None)
        one.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        errors = zero.communicate(timeout=30)[1]
        assert 3 < time.monotonic() - stopped < 10
        assert zero.returncode == Exit.FAILED
        assert errors.startswith("rank 1 has not been heard of for 5 s: process ")
    finally:
        for rank in (zero, one):
            rank.kill()
            rank.communicate()


def test_one_process_waits_for_nobody_however_long_its_start_takes() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", SLEEPER, "alone"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def ready(folder: Path) -> Path:
    """The demo set with its indexes, of whose building no run says anything."""
    open_datasets(load_config(folder / "config.json").vimnas.data)
    return folder


class Ended(NamedTuple):
    code: int
    errors: list[str]
    status: dict[str, object]


def misbehaving(
    folder: Path, name: str, what: str, *args: str, within: float = 30, suspended: float = 0
) -> Ended:
    """A run of two ranks in folder/name in which `what` happens (see launched/misbehave.py), all of
    it continued after `suspended` seconds.

    Fails unless no process of it is left `within` seconds after that.
    """
    acted = folder / f"{name}.acted"
    acted.unlink(missing_ok=True)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    command += ["--master_port", str(free_port()), str(ROOT / "tests/launched/misbehave.py")]
    command += ["--deepspeed_config", str(folder / "config.json"), *args]
    values = [f"vimnas.output_dir={folder / name}", "bf16.enabled=false"]
    command += [word for value in values for word in ("--set", value)]
    errors = folder / f"{name}.err"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with errors.open("w") as err, (folder / f"{name}.out").open("w") as out:
        runner = subprocess.Popen(
            command,
            env={**env, "MISBEHAVE": what, "MISBEHAVED": str(acted)},
            stdout=out,
            stderr=err,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while runner.poll() is None and not acted.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        if suspended:
            time.sleep(suspended)
            os.killpg(runner.pid, signal.SIGCONT)
        deadline = time.monotonic() + within
        while (left := of_session(runner.pid)) and time.monotonic() < deadline:
            runner.poll()
            time.sleep(0.2)
        assert acted.exists(), errors.read_text()[-4000:]
        assert not left, f"{left} are left: {errors.read_text()[-4000:]}"
    finally:
        for process in of_session(runner.pid):
            process.kill()
        code = runner.wait()
    status = json.loads((folder / name / "status.json").read_text())
    return Ended(code, errors.read_text().splitlines(), status)


def of_session(session: int) -> list[psutil.Process]:
    """The processes of a session that have not ended."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getsid(process.pid) == session and process.info["status"] != "zombie":
                found.append(process)
        except ProcessLookupError:  # it has just ended
            continue
    return found


@pytest.mark.endurance
@pytest.mark.parametrize(
    ("what", "first_line", "code"),
    [
        ("kill-worker 1 data 5", r"rank 1 died: process \d+ on ", 1),
        ("exit 0 data 5", r"rank 0 died: process \d+ on ", 1),
        ("raise 1 step 5", "rank 1 failed in 'step' at step 5: OSError: boom", 1),
        ("sleep 1 data 5", "rank 1 has been in 'data' at step 5 for ", 1),
        ("full 0 data 5", r"rank 0 stopped: .*No space left on device.*good checkpoint: none", 3),
        ("draw 1 data 5", r"rank \d stopped: step 4, .*: ranks \[1\] differ from rank 0", 3),
        ("stop-worker 1 data 5", r"rank 1 has not been heard of for 10 s: process \d+ on ", 1),
        ("stop-worker 0 data 5", r"rank 0 has not been heard of for 10 s: process \d+ on ", 1),
    ],
)
def test_a_rank_that_fails_is_named_on_the_first_line(ready, what, first_line, code):
    limits = [
        "--set",
        "vimnas.faults.stuck_minutes=0.2",
        "--set",
        "vimnas.faults.silent_seconds=10",
    ]
    # a stopped rank minds no SIGTERM: its launcher kills it 30 s later
    within = 75 if "stop" in what else 45
    ended = misbehaving(ready, "failing", what, "--overwrite", *limits, within=within)
    assert re.match(first_line, ended.errors[0])
    assert ended.status["state"] == ("stopped" if code == Exit.STOPPED else "failed")
    assert ended.status["exit_code"] == code
    # DeepSpeed's launcher takes that of the rank that it first sees to have ended
    assert ended.code in {code, *{"kill-worker": (247,), "exit": (7,)}.get(what.split()[0], ())}
    assert re.match(first_line, str(ended.status["reason"]))
    errors = "\n".join(ended.errors)
    if "sleep" in what:
        assert "rank 1 is in misbehave (" in ended.errors[0]
        assert "in misbehave\n" in errors.partition("Current thread")[2]  # its own stack
    if "raise" in what:
        assert "Traceback" in ended.errors[1]


@pytest.mark.endurance
def test_a_run_whose_launchers_and_ranks_are_all_suspended_goes_on_when_continued(ready):
    limits = [
        "--set",
        "vimnas.faults.stuck_minutes=0.2",
        "--set",
        "vimnas.faults.silent_seconds=10",
    ]
    ended = misbehaving(
        ready, "suspended", "stop-group 1 data 5", "--overwrite", *limits, within=300, suspended=25
    )
    assert (ended.code, ended.status["state"], ended.status["step"]) == (0, "done", 36)


@pytest.mark.endurance
def test_whatever_is_asked_to_stop_saves_goes_on_and_ends_as_if_nothing_had_been(folder, trained):
    """Each stop at a step of its own, one while the select splits are scored; in the end the same
    weights and the same points in TensorBoard as a run without stops."""
    stops = [
        ("term-launcher 1 data 7", 6, {1, Exit.RESUMABLE}),
        ("term-runner 0 data 9", 8, {-signal.SIGTERM}),
        ("kill-launcher 0 data 11", 10, {0}),
        ("term-worker 1 evaluate 14", 14, {Exit.RESUMABLE}),
        ("kill-runner 1 data 16", 15, {-signal.SIGKILL}),
        ("term-group 1 data 18", 17, {-signal.SIGTERM}),
    ]
    resume: tuple[str, ...] = ()
    for what, done, codes in stops:
        ended = misbehaving(folder, "stopping", what, *resume)
        assert ended.status["state"] == "preempted", ended
        assert ended.status["exit_code"] == Exit.RESUMABLE
        assert ended.status["step"] == done
        assert str(ended.status["resume"]).endswith(" --resume")
        last_line = (folder / "stopping" / "train.log").read_text().splitlines()[-1]
        assert last_line.endswith(f"continue with: {ended.status['resume']}")
        assert ended.code in codes
        checkpoint = folder / "stopping" / "checkpoints" / f"step{done:08d}"
        assert (checkpoint / "supernet.safetensors").is_file()
        resume = ("--resume",)
    ended = misbehaving(folder, "stopping", "nothing 0 save 36", "--resume", within=300)
    assert (ended.code, ended.status["state"], ended.status["step"]) == (0, "done", 36)
    ours, theirs = (folder / "stopping", trained)
    name = (theirs / "checkpoints" / "latest").read_text()
    a, b = (
        load_file(run / "checkpoints" / name / "supernet.safetensors") for run in (ours, theirs)
    )
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    boards = [EventAccumulator(str(run / "tensorboard")).Reload() for run in (ours, theirs)]
    select = [tag for tag in boards[1].Tags()["scalars"] if tag.startswith("select/")]
    assert select
    for tag in select:
        a, b = ([(e.step, e.value) for e in board.Scalars(tag)] for board in boards)
        assert a == b, tag

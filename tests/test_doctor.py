"""The doctor finds what is missing, wrong or hung, says which command mends it, and never dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from scripts import doctor
from tests.conftest import ROOT
from vimnas_ds.doctor import fast_paths, host, media, software
from vimnas_ds.doctor.finding import Check, Finding, isolated
from vimnas_ds.model import attention as backends


def run(*options: str, blocked: tuple[str, ...] = (), **env: str) -> tuple[int, dict[str, dict]]:
    """Exit code and findings by name, in a process that cannot import the `blocked` modules."""
    program = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        f"from scripts import doctor\nsys.exit(doctor.main({['--json', *options]!r}))"
    )
    common = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **common, **env},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    report = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode, done.stderr
    return done.returncode, {f["name"]: f for f in report["findings"]}


def test_packages_that_are_missing_are_named_with_their_command():
    blocked = ("deepspeed", "nvidia.dali", "av", "torch", "flash_attn")
    only = ("--only", "packages", "deepspeed", "dali", "codecs", "extension", "attention")
    code, found = run(*only, blocked=blocked)
    assert code == 1
    for name in ("torch", "deepspeed", "nvidia-dali-cuda130", "av"):
        assert found[name]["state"] == "missing"
        assert found[name]["required"]
        assert found[name]["mend"].startswith(("pip install", "bash scripts/setup_venv.sh"))
    for name in ("dali", "codecs", "extension", "attention"):
        assert found[name]["state"] == "missing"
        assert "cannot be imported" in found[name]["detail"]
    assert found["numpy"]["state"] == "ok"
    assert found["flash-attn"]["state"] == "missing"
    assert not found["flash-attn"]["required"]


def test_without_the_extension_the_references_work_and_the_build_command_is_named():
    names = ("--only", "extension", "sliced linear", "gates", "adamw")
    code, found = run(*names, blocked=("vimnas_ds._C",))
    assert code == 1
    for name in ("extension", "adamw"):
        assert found[name]["state"] == "slow"
        assert found[name]["mend"] == "pip install --no-build-isolation -e ."
    assert found["sliced linear"]["state"] == found["gates"]["state"] == "ok"
    code, found = run("--only", "extension", VIMNAS_REFERENCE="1")
    assert (code, found["extension"]["mend"]) == (1, "unset VIMNAS_REFERENCE")


def test_what_is_optional_does_not_count():
    code, found = run("--only", "packages", "attention", "apex", blocked=("flash_attn", "apex"))
    assert code == 0
    assert found["flash-attn"]["state"] == "missing"
    code, found = run("--only", "attention", VIMNAS_ATTENTION="flash_atn")
    assert (code, found["attention"]["mend"]) == (1, "unset VIMNAS_ATTENTION")
    assert "choose one of" in found["attention"]["detail"]


@pytest.mark.slow
def test_everything_works_where_the_tests_run():
    code, found = run()
    bad = [f for f in found.values() if f["required"] and f["state"] not in ("ok", "skipped")]
    assert (code, bad) == (0, [])
    assert {"deepspeed", "gloo", "dali cpu", "codec h264", "codec vp9", "disk"} <= found.keys()


def hang() -> list[Finding]:
    time.sleep(60)
    return []


def crash() -> list[Finding]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def fail() -> list[Finding]:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("part", "seconds", "said"),
    [
        (hang, 0.5, "took longer than 0.5 s"),
        (crash, 25, "ended its process (exit code -9)"),
        (fail, 25, "RuntimeError: no kernel image"),
    ],
)
def test_a_check_that_dies_is_a_finding(part, seconds, said):
    started = time.perf_counter()
    (found,) = isolated(Check("it", part), seconds)
    assert time.perf_counter() - started < 30
    assert (found.name, found.state, found.counts) == ("it", "failed", True)
    assert said in found.detail
    assert found.mend


def test_what_a_hung_check_has_started_ends_with_it(tmp_path):
    note = tmp_path / "pid"

    def hang_with_a_rank() -> list[Finding]:
        rank = multiprocessing.get_context("fork").Process(target=hang)
        rank.start()
        (tmp_path / "new").write_text(str(rank.pid))
        (tmp_path / "new").rename(note)
        return hang()

    (found,) = isolated(Check("it", hang_with_a_rank), 5)
    assert "took longer than" in found.detail
    pid, deadline = int(note.read_text()), time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def test_a_doctor_that_is_ended_leaves_no_check_behind():
    script = str(ROOT / "scripts" / "doctor.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    doctors = subprocess.Popen([sys.executable, script, "--only", "deepspeed"], env=env, cwd=ROOT)
    try:
        children = Path(f"/proc/{doctors.pid}/task/{doctors.pid}/children")
        checks: list[int] = []
        while not checks and doctors.poll() is None:
            checks = [p for p in map(int, children.read_text().split()) if _leads(p)]
        doctors.terminate()
        assert doctors.wait(30) == 128 + signal.SIGTERM
    finally:
        doctors.kill()
        doctors.wait()
    assert checks
    assert not any(map(_runs, checks))


ENDED_EARLY = """
import os, signal, sys, time
from vimnas_ds.doctor.finding import Check, isolated

def note():
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()))

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
os.register_at_fork(
    after_in_parent=lambda: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGTERM)),
    after_in_child=note,
)
isolated(Check("it", lambda: time.sleep(20) or []), 60)
"""


def test_a_doctor_that_is_ended_while_it_begins_a_check_leaves_none_behind(tmp_path):
    """Where the signal arrives, nothing that Python raises is heard."""
    command = [sys.executable, "-c", ENDED_EARLY, str(tmp_path / "pid")]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - began < 15
    assert not _runs(int((tmp_path / "pid").read_text()))


def _leads(pid: int) -> bool:
    """Whether it has a process group of its own."""
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def _runs(pid: int) -> bool:
    """Not so of one that is dead and not yet waited for."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_an_operator_that_computes_something_else_is_found():
    x = [torch.randn(3, 4)]
    right = fast_paths._same("it", torch.sin, torch.sin, x)
    value = fast_paths._same("it", lambda t: torch.sin(t) + 0.01, torch.sin, x)
    gradient = fast_paths._same("it", lambda t: t.sin().detach() + t - t.detach(), torch.sin, x)
    nowhere = fast_paths._same("it", lambda t: t.sin() + 0 * (t - t).sqrt(), torch.sin, x)
    of_one = fast_paths._same("it", lambda s, t: s.sin() + t.detach(), torch.add, x * 2)
    bad = (value, gradient, nowhere, of_one)
    assert [f.state for f in (right, *bad)] == ["ok"] + 4 * ["failed"]
    assert "by nan in float32" in nowhere.detail
    assert "pip install" in value.mend


def test_operators_are_tried_in_the_dtype_that_trains():
    def good_in_float32(t: torch.Tensor) -> torch.Tensor:
        seen.append(t.dtype)
        return t.sin() if t.dtype == torch.float32 else t.sin() * 1.1

    seen: list[torch.dtype] = []
    found = fast_paths._same("it", good_in_float32, torch.sin, [torch.randn(3, 4)])
    assert seen == [torch.float32, torch.bfloat16]
    assert found.state == "failed"
    assert re.search(r"by 0\.0e\+00 in float32, 2\..e-01 in bfloat16", found.detail)


@pytest.fixture
def flash(monkeypatch):
    """Makes a function the kernel that attention takes, as if flash-attn had been imported."""

    def resolve(kernel) -> None:
        def automatic() -> tuple[backends._Backend, str]:
            return backends._Backend("flash_attn", kernel), "flash-attn is installed"

        monkeypatch.setattr(backends, "_automatic", automatic)
        backends._resolved.cache_clear()

    monkeypatch.delenv("VIMNAS_ATTENTION", raising=False)
    yield resolve
    backends._resolved.cache_clear()


def test_the_attention_kernel_that_is_named_is_the_one_that_was_run(flash, capsys):
    def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.dtype == torch.float32:  # as every flash kernel's wrapper
            return F.scaled_dot_product_attention(q, k, v)
        raise RuntimeError("no kernel image is available")

    flash(broken)
    assert doctor.main(["--json", "--only", "attention"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert (found["state"], found["required"]) == ("failed", True)
    assert "attention: flash_attn (flash-attn is installed); cannot run" in found["detail"]
    assert "in bfloat16: RuntimeError: no kernel image is available" in found["detail"]
    assert "flash-attn, or export VIMNAS_ATTENTION=sdpa" in found["mend"]
    flash(F.scaled_dot_product_attention)
    assert doctor.main(["--json", "--only", "attention"]) == 0


def pretend_apex(monkeypatch, kernel, adam) -> None:
    """As on a GPU with a compiled NVIDIA apex, but for the place of the tensors."""
    from vimnas_ds.ops import apex

    parts = {"fused_layer_norm_cuda": "", "amp_C": ""}
    monkeypatch.setattr(fast_paths, "has_gpu", lambda: True)
    monkeypatch.setattr(fast_paths, "_device", lambda: "cpu")
    monkeypatch.setattr(apex, "nvidia_apex", lambda: parts)
    monkeypatch.setattr(apex, "fused_layer_norm", lambda: kernel)
    module = types.ModuleType("apex.optimizers")
    module.FusedAdam = adam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)


def test_apex_is_run_before_it_is_said_to_work(monkeypatch, capsys):
    seen: list[torch.dtype] = []

    def good(x, weight, bias, eps):
        seen.append(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def wrong(x, weight, bias, eps):
        return good(x, weight, bias, eps) + (x.dtype == torch.bfloat16)

    def broken(x, weight, bias, eps):
        raise RuntimeError("invalid device function")

    class Coupled(torch.optim.Adam):
        """Adam whose weight decay is L2's: other updates than AdamW's."""

    pretend_apex(monkeypatch, good, torch.optim.AdamW)
    found = fast_paths.apex()
    assert seen == [torch.float32, torch.bfloat16]
    assert [(f.name, f.state) for f in found] == [("apex", "ok"), ("apex FusedAdam", "ok")]

    for kernel, said in ((wrong, "in bfloat16"), (broken, "invalid device function")):
        pretend_apex(monkeypatch, kernel, Coupled)
        assert doctor.main(["--json", "--only", "apex"]) == 1
        norm, adam = json.loads(capsys.readouterr().out)["findings"]
        assert (norm["state"], norm["required"], adam["state"]) == ("failed", True, "failed")
        assert said in norm["detail"]
        assert "apex --force-reinstall" in norm["mend"]
        assert not adam["required"]  # training does without it
    pretend_apex(monkeypatch, good, broken)
    adam = fast_paths.apex()[1]
    assert (adam.state, adam.counts) == ("failed", False)
    assert "cannot run" in adam.detail


def test_a_codec_without_decoder_or_with_wrong_frames_is_found(monkeypatch):
    missing = media._codec("no_such_codec", (), "mp4", "Kinetics")
    assert (missing.state, missing.counts) == ("missing", True)
    assert "Kinetics" in missing.detail
    assert not media._codec("no_such_codec", (), "mp4", "").counts
    assert media._codec("mpeg4", ("mpeg4",), "mp4", "").state == "ok"
    encode, level = media._encode, media._level

    def darker(path: Path, encoder: str) -> None:
        monkeypatch.setattr(media, "_level", lambda number: level(number) - 30)
        encode(path, encoder)
        monkeypatch.setattr(media, "_level", level)

    monkeypatch.setattr(media, "_encode", darker)
    assert media._codec("mpeg4", ("mpeg4",), "mp4", "Kinetics").counts


def test_versions_that_were_not_tested_are_named(monkeypatch):
    monkeypatch.setattr(software, "_wanted", lambda: {"numpy": "<1"})
    found = {f.name: f for f in software.packages()}
    assert found["numpy"].counts
    assert found["numpy"].mend == "pip install 'numpy<1'"
    assert found["torch"].state == "ok"


def test_the_machine_is_looked_at(monkeypatch, tmp_path):
    monkeypatch.setattr(host.resource, "getrlimit", lambda which: (256, 4096))
    files = host._files()
    assert (files.state, files.mend, files.counts) == ("slow", "ulimit -n 4096", False)
    speed, clock = host.disk(tmp_path / "not" / "yet")
    assert str(tmp_path) in speed.detail
    assert clock.state == "ok"
    assert not (tmp_path / "not").exists()
    assert host._clock(90.0, 1.0).state == host._clock(-9.0, 1.0).state == "failed"
    assert host._clock(8.0, 9.0).state == "ok"  # written late, not of another time
    (nowhere,) = host.disk(Path("/proc/self"))
    assert nowhere.counts


def test_the_table_ends_with_what_to_do(capsys, monkeypatch):
    good, slow = Finding("a", "ok", "fine"), Finding("b", "slow", "why", "mend it")
    extra = Finding("c", "missing", "not there", "get it", required=False)
    told = doctor.describe([good, slow, extra])
    assert told.splitlines()[-3:] == ["b: mend it", "c (optional): get it", "to be mended: b"]
    assert doctor.describe([good, extra]).endswith("all that can work here works")

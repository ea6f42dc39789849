"""Starts scripts: under the real launcher, as a user does, or in this process."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from typing import Any

from tests.conftest import ROOT
from vimnas_ds.train.ranks import free_port


def launch(script: str, *args: str, ranks: int = 2, timeout: float = 400) -> str:
    """Output of `deepspeed --num_gpus RANKS SCRIPT ARGS`; fails the test on a bad exit code."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["--master_port", str(free_port()), str(ROOT / script), *args]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def run_main(script: str, arguments: list[str]) -> tuple[Any, str]:
    """(exit code, stderr) of a script's main in this process."""
    spec = importlib.util.spec_from_file_location(f"script_{script}", ROOT / f"scripts/{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            code = module.main(arguments)
        except SystemExit as ended:
            code = ended.code
    return code, errors.getvalue()

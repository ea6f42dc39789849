#!/usr/bin/env bash
# Makes the virtual environment that the Makefile uses: PYTHON and VENV say from what and where.
# torch comes first and by itself (its CUDA 13 build; about two minutes), DeepSpeed without
# building any operator, and this package last, editable, in the environment it will run in.
set -euo pipefail

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

"$PYTHON" - <<'PY'
import sys
if sys.version_info[:2] != (3, 11):
    sys.exit(f"Python 3.11 is needed, this is {sys.version.split()[0]}; set PYTHON=...")
PY

apt_install() {
    echo "$1 is missing: installing it with apt-get"
    local sudo=""
    [ "$(id -u)" = 0 ] || sudo="sudo"
    $sudo apt-get update -q
    $sudo apt-get install -q -y "$1"
}

if [ ! -x "$VENV/bin/python" ]; then
    if ! "$PYTHON" -m venv "$VENV" 2>/dev/null; then
        rm -rf "$VENV"
        apt_install python3-venv
        "$PYTHON" -m venv "$VENV"
    fi
fi

# the C++ extension needs a compiler and Python's headers
command -v g++ >/dev/null || apt_install g++
HEADER=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
[ -f "$HEADER" ] || apt_install python3-dev

# a browser, for the test of the report's page: without one it is skipped
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
    if [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; then
        apt_install chromium || echo "no Chromium: the report's page is not tested in a browser"
    else
        echo "no Chromium: the report's page is not tested in a browser (apt-get install chromium)"
    fi
fi

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

pip install -q 'setuptools>=70' wheel ninja
pip install -q 'torch==2.14.1' 'torchvision==0.29.1'
DS_BUILD_OPS=0 pip install -q 'deepspeed>=0.19.8,<0.20'
pip install -q --no-build-isolation -e '.[dev]'
"$VENV/bin/python" -c 'import torch, vimnas_ds; from vimnas_ds import _C; print("vimnas_ds", vimnas_ds.__version__, "torch", torch.__version__, "operators:", "CUDA + CPU" if _C.with_cuda else "CPU")'

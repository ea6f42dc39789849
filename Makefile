# Two commands for a fresh machine (Debian, Python 3.11): `make demo` and `make test`.
# Each does its own set-up in .venv; nothing is installed outside it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RANKS ?= 2

export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-endurance test-fast lint format clean

setup: $(READY)

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

$(READY): setup.py csrc_build.py pyproject.toml scripts/setup_venv.sh $(SOURCES)
	PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup_venv.sh
	touch $(READY)

demo: $(READY)
	$(BIN)/python scripts/demo.py --ranks $(RANKS)

test: $(READY)
	$(BIN)/python -m pytest -m "not endurance"

test-endurance: $(READY)
	$(BIN)/python -m pytest -m endurance

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow and not endurance"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache

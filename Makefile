# Everything runs in .venv, made from pyproject.toml alone; a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: env sweep test test-slow test-browser test-cluster lint clean

env: .venv/.installed

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "medtune needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make env PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (PyTorch and its CUDA libraries: about 5 GB, some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# A real small study: real data where they are found or can be downloaded, generated images else.
sweep: env
	@$(BIN)/python sweeps/medmamba.py --preset laptop --fallback $(ARGS)

# Two processes, each file of tests in one of them; ARGS="-n 0" has one process, with a debugger's terminal.
test: env
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu and not cluster and not browser' $(ARGS)

test-slow: env
	@$(BIN)/python -m pytest -m slow $(ARGS)

# Pages in a real browser: needs Chromium on the path.
test-browser: env
	@$(BIN)/python -m pytest -m browser $(ARGS)

# Hosts in namespaces on this machine: needs root, openssh-server, rsync and iproute2.
test-cluster: env
	@$(BIN)/python -m pytest -m cluster --timeout 900 $(ARGS)

lint: env
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info

# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test test-all check clean

demo: .venv/.ready
	$(BIN)/secondcast demo

test: .venv/.ready-dev
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: .venv/.ready-dev
	$(BIN)/python -m pytest -n 2

check: .venv/.ready-dev .mypy/secondcast
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@echo "installing PyTorch, diffusers, transformers and the rest into .venv (some minutes) ..."
	$(INSTALL) .
	@touch $@

.venv/.ready-dev: .venv/.ready .mypy/secondcast
	$(INSTALL) ".[dev]"
	@touch $@

# mypy and editors find the package by this link: it is the root of the repository.
.mypy/secondcast:
	mkdir -p .mypy
	ln -sfn .. $@

clean:
	rm -rf .venv .mypy demo

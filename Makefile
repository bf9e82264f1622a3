# make setup   creates .venv with everything (the other targets do it by themselves)
# make demo    fits a real model to 1 bit, serves it, asks it two questions, stops; with FIT=shipped
#              it takes a longer fit that is in this repository, with FIT=long it trains one for an
#              hour or more, with FIT=none it looks at the weights only
# make serve   the same, and leaves the server running
# make test    the default test suite; make test-slow: the long tests
# make test-oldest   what a vLLM can break, with the oldest one that is supported
# make features    runs what docs/FEATURES.md says (long), and writes it
# make check   linter and type checker; make sanitize: the C++ under its sanitizers
# make bench   the quick benchmark of the linear layer
#
# Variables: PYTHON=python3.12  BACKEND=cuda  TORCH_INDEX=...  FIT=...

PYTHON ?= python3
# What .venv was set up for, unless it is given.
BACKEND ?= $(patsubst $(VENV)/.setup-%,%,$(firstword $(wildcard $(VENV)/.setup-*) $(VENV)/.setup-cpu))
FIT ?= quick
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.setup-$(BACKEND)
VLLM :=
OLDEST := .venv-oldest
OLDEST_VLLM = $(shell sed -n 's/^MIN_VLLM = "\(.*\)"/\1/p' vllm_bmos/plugin/versions.py)
NATIVE := $(wildcard setup.py csrc/*)

.PHONY: setup demo serve test test-slow test-oldest features sanitize check bench clean
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): pyproject.toml $(wildcard requirements/*.txt) packaging/vllm/pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; set PYTHON=") if sys.version_info < (3, 11) else 0'
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@scripts/setup-$(BACKEND).sh $(BIN)/python $(TORCH_INDEX) $(VLLM)
	@rm -f $(VENV)/.setup-*
	@touch $@

demo: setup
	@$(BIN)/python -m examples.demo --fit $(FIT)

serve: setup
	@$(BIN)/python -m examples.demo --fit $(FIT) --keep-serving

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

test-oldest:
	@$(MAKE) --no-print-directory setup BACKEND=cpu VENV=$(OLDEST) VLLM=$(OLDEST_VLLM)
	$(OLDEST)/bin/python -m pytest tests/plugin tests/engine tests/integrations tests/server

features: setup
	-$(BIN)/python -m pytest -m feature --features
	$(BIN)/python -m tests.features

sanitize: setup
	csrc/sanitize.sh $(BIN)/python

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/linear.py --quick --json benchmarks/results/quick.json

clean:
	rm -rf $(VENV) $(OLDEST) build .demo *.egg-info

# Two commands matter: `make poc` and `make test`. Each sets up what is missing, once, in .venv.

# Variables to set on the command line:
#   PYTHON       the interpreter to make .venv with; by default the first of python3.11 to python3 that is new enough
#   TORCH_INDEX  a package index to take torch (and nothing else) from, such as PyTorch's own CPU index
#   OUT          where `make poc` writes its report
#   POC_ARGS     more arguments for `maclin poc`
#   PYTEST_ARGS  more arguments for pytest
PYTHON ?=
TORCH_INDEX ?=
OUT ?= poc-report
POC_ARGS ?=
PYTEST_ARGS ?=

# files go to workers whole, so that what a file builds once is built once
WORKERS := --numprocesses auto --maxprocesses 8 --dist loadfile
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := hf,demo,arena,dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup poc test test-all lint format bench clean

# The stamp holds the directory it was made in: a tree that has moved is installed anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1  /p' Makefile | awk '{printf "  make %-9s", $$2; $$1 = $$2 = ""; print $$0}'

setup: $(STAMP)  ## make .venv with everything that the other targets need

# The stamp goes first and comes back last, so that whatever was interrupted is made from scratch.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if [ "$$(cat $(STAMP) 2>/dev/null)" != "$(CURDIR)" ] || ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	    found=; seen=; \
	    for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	        version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	        seen="$$seen $$python is $$version;"; \
	        if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "maclin needs Python 3.11 or later; found:$${seen:- no Python that runs.}" >&2; \
	        echo "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$found ($$version)"; \
	    rm -rf $(VENV); \
	    if ! "$$found" -m venv $(VENV); then \
	        rm -rf $(VENV); \
	        echo "$$found cannot make virtual environments; install its venv module (on Debian: python3-venv)" >&2; \
	        echo "or name another interpreter: make setup PYTHON=/path/to/python3.11" >&2; \
	        exit 1; \
	    fi; \
	fi
	@rm -f $(STAMP)
	@echo "Installing maclin[$(EXTRAS)] into $(VENV); this takes a few minutes the first time"
	@$(if $(TORCH_INDEX),$(PIP) --index-url "$(TORCH_INDEX)" --no-deps torch)
	@$(PIP) --editable ".[$(EXTRAS)]"
	@printf '%s\n' "$(CURDIR)" > $(STAMP)

poc: $(STAMP)  ## run the proof of concept and write its report into OUT
	$(BIN)/maclin poc --out "$(OUT)" --force $(POC_ARGS)

test: $(STAMP)  ## run the tests, without the slow ones and those that need a GPU or the network
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not gpu and not network" $(PYTEST_ARGS)

test-all: $(STAMP)  ## run every test that this machine can run
	$(BIN)/python -m pytest -m "not network" $(PYTEST_ARGS)

lint: $(STAMP)  ## check style, format and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright
	$(BIN)/python -m pyright --project pyright-core.json

format: $(STAMP)  ## apply the style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(STAMP)  ## measure the targets for speed and memory on this machine
	@status=0; for targets in poc speed; do \
	    $(BIN)/python benchmarks/$${targets}_targets.py --out benchmarks/results || status=1; \
	done; exit $$status

clean:  ## remove everything that the other targets made
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis "$(OUT)"
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

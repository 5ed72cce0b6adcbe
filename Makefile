# `make demo` and `make test` need nothing but Python 3.10 or newer, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

SECONDS ?= 600

.PHONY: help install demo test explore check bench clean

help:           ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,check,demo,bench]'
	touch $(READY)

install: $(READY)   ## a virtual environment with everything in it

demo: $(READY)  ## the main job: train on two ranks, kill one, resume on three
	$(BIN)/python demo/demo.py

test: $(READY)  ## the whole test suite, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

explore: $(READY) ## look for what the tests have not met yet, for SECONDS=600
	$(BIN)/python tests/explore.py $(SECONDS)

check: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## the figures, with the peers measured beside us
	$(BIN)/python benchmarks/run.py

clean:          ## remove the virtual environment and what runs have left
	rm -rf $(VENV) demo-output bench-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

# `make demo` and `make test` need nothing but Python 3.10 or newer, pip and make.

unexport PYTHONDONTWRITEBYTECODE # or each of hundreds of processes would compile all that it imports

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

FLOORS := .venv-floors
FLOORS_READY := $(FLOORS)/.ready
DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready
SERVERS := .venv-servers
SERVERS_READY := $(SERVERS)/.ready
QUICK := $(addprefix tests/,format storage sharding transfer directory threads readers house \
	coordinator/test_machine.py coordinator/test_machine_saves.py coordinator/test_machine_keeping.py \
	coordinator/test_machine_stops.py coordinator/test_machine_stateful.py coordinator/test_retention.py \
	golden training/test_integrations.py training/test_quantization.py)

SECONDS ?= 600
STORE ?= local

.PHONY: help install demo test test-wide test-floors test-pythons explore soak check docs bench clean

help:           ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,check,demo,bench]'
	touch $(READY)

$(SERVERS_READY): $(READY) tests/support/servers.txt
	DISTCKPT_TEST_SERVERS= $(BIN)/python -m tests.support.servers
	touch $(SERVERS_READY)

install: $(READY) $(SERVERS_READY) ## a virtual environment with everything in it

demo: $(READY) $(if $(filter-out local,$(STORE)),$(SERVERS_READY)) ## the main job: train on two ranks, kill one, resume on three; STORE=gs or s3
	PYTHONPATH=. $(BIN)/python demo/demo.py --store $(STORE)

test: $(READY) $(SERVERS_READY) ## the test suite, three files at a time
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

$(FLOORS_READY): $(READY) pyproject.toml constraints.txt # uv says which versions these are: pip does not come to an end in minutes
	oldest=$$($(BIN)/python tests/pythons.py --oldest) && $$oldest -m venv --clear $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
	$(FLOORS)/bin/uv pip compile --quiet --resolution lowest-direct --python $(FLOORS)/bin/python --extra test \
		-c constraints.txt pyproject.toml -o $(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(FLOORS)/floors.txt -e .
	touch $(FLOORS_READY)

test-wide: $(READY) $(SERVERS_READY) ## the whole test suite, with every case and the long proofs
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --wide

test-floors: $(FLOORS_READY) $(SERVERS_READY) ## the quick tests with the lowest versions that pyproject.toml allows, on the oldest Python from 3.10 on
	$(FLOORS)/bin/python --version
	$(FLOORS)/bin/python -m pytest -p no:cacheprovider -m "not ray" $(QUICK)

test-pythons: $(READY) $(SERVERS_READY) ## the quick tests with the newest versions, on each Python from 3.10 to 3.13 that is found
	$(BIN)/python tests/pythons.py -m "not ray" $(QUICK)

explore: $(READY) ## look for what the tests have not met yet, for SECONDS=600
	$(BIN)/python tests/explore.py $(SECONDS)

soak: $(READY) $(SERVERS_READY) ## kill, fail, flip and cut the power for SECONDS=600; totals at the end
	$(BIN)/python -m tests.soak $(SECONDS)

check: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(DOCS_READY): docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $(DOCS_READY)

docs: $(DOCS_READY) ## the documentation as a site, in docs-output/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

bench: $(READY) $(SERVERS_READY) ## the figures, with the peers measured beside us
	$(BIN)/python benchmarks/run.py

clean:          ## remove the virtual environment and what runs have left
	rm -rf $(VENV) $(FLOORS) .venv-pythons $(SERVERS) $(DOCS) docs-output demo-output bench-output .pytest_cache .mypy_cache .ruff_cache .hypothesis

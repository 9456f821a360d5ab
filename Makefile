# Every target makes .venv itself; it needs Python 3.11 or newer and a package index, nothing else.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python

TORCH = $(shell grep -m 1 '^torch==' requirements.txt)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# What is linted and what is typed, as far as it exists.
CODE := $(wildcard safegene_vllm server examples benchmarks deploy docs requirements tests)
TYPED := $(wildcard safegene_vllm server/safegene_server examples benchmarks deploy docs requirements)

# Extra arguments for the program of a target: make test ARGS="-k gain"
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\# .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(READY)  ## make .venv from the pinned requirements

# --no-deps: the lock is complete, and leaves out packages that break a CPU torch (requirements/overrides.txt).
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
	  echo "Install Python 3.11, or name it: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@echo "making $(VENV) from requirements.txt (about two minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install -qq --no-deps '$(TORCH)' 2>$(VENV)/torch.log || { \
	  echo "  $(TORCH) is not where pip looks; trying $(TORCH_INDEX) ..."; \
	  $(RUN) -m pip install -qq --no-deps --index-url '$(TORCH_INDEX)' '$(TORCH)' || { cat $(VENV)/torch.log >&2; exit 1; }; }
	@$(RUN) -m pip install -qq --no-deps -r requirements.txt
	@$(RUN) -m pip install -qq --no-deps --no-build-isolation --no-index -e .
	@touch $@
	@echo "$(VENV) is ready"

demo: $(READY)  ## serve several protected fine-tunes of one small model and show the effect
	@$(RUN) -m examples.smollm2.demo $(ARGS)

serve-demo: $(READY)  ## the same, then leave the server running and print curl lines
	@$(RUN) -m examples.smollm2.demo --keep $(ARGS)

# Third-party prompts are read from these folders, never copied: AdvBench's harmful_behaviors.csv,
# self-instruct's seed_tasks.jsonl and user_oriented_instructions.jsonl, XSTest's xstest_prompts.csv.
ADVBENCH ?= data/advbench
SELF_INSTRUCT ?= data/self_instruct
XSTEST ?= data/xstest

family: $(READY)  ## remake the example's parent, vector, tenants and profiles (an hour on two cores)
	@$(RUN) -m examples.smollm2.make_family --advbench '$(ADVBENCH)' --self-instruct '$(SELF_INSTRUCT)' $(ARGS)

# A file's tests share their engines, so a file stays with one process; an engine takes memory.
PYTEST := $(RUN) -m pytest -n logical --maxprocesses 4 --dist loadfile
test: $(READY)  ## run all tests but the slow ones, a process per core
	@$(PYTEST) -m 'not slow' $(ARGS)

test-slow: $(READY)  ## run the tests that take a minute or more each: larger models, crowds, benchmarks
	@$(PYTEST) -m slow $(ARGS)

# Training, and compiling kernels, take longer than all other unit tests together.
SLOW_UNIT := cli_recipe evaluation_model_judges ops_compiled recipe_attached recipe_calibration \
  recipe_difference recipe_distillation recipe_finetune recipe_training
test-unit: $(READY)  ## run the unit tests that train nothing and start no engine (about a minute)
	@$(PYTEST) tests/unit \
	  $(foreach name,$(SLOW_UNIT),--ignore tests/unit/test_$(name).py) $(ARGS)

test-matrix: $(READY)  ## run the plugin's tests on the oldest and newest supported vLLM (slow)
	@$(RUN) tests/matrix.py $(ARGS)

# The CPU's torch and Triton from the package index; no GPU, no driver, no compiler.
KERNELS := build/kernels
$(KERNELS)/.ready: requirements.txt requirements/kernels.txt
	@$(PYTHON) -m venv $(KERNELS)
	@$(KERNELS)/bin/python -m pip install -qq --no-deps '$(TORCH)' 2>$(KERNELS)/torch.log || \
	  $(KERNELS)/bin/python -m pip install -qq --no-deps --index-url '$(TORCH_INDEX)' '$(TORCH)'
	@$(KERNELS)/bin/python -m pip install -qq -c requirements.txt -r requirements/kernels.txt
	@touch $@

test-kernels: $(KERNELS)/.ready  ## the GPU kernels without a GPU: interpreted against the reference, and compiled (minutes)
	@TRITON_INTERPRET=1 $(KERNELS)/bin/python -m pytest -q tests/unit/test_ops_*.py $(ARGS)

check: lint types layering docs deploy-check test test-slow  ## everything CI runs: format, lint, types, layering, docs, deploy/, tests

docs: $(READY)  ## check the reference pages and build the documentation site, strictly, in build/site
	@PYTHONPATH=.:server $(RUN) docs/generate.py --check
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

docs-reference: $(READY)  ## rewrite docs/reference from the code: settings, commands, routes, errors
	@PYTHONPATH=.:server $(RUN) docs/generate.py

deploy-check: $(READY)  ## check everything in deploy/ that needs neither a cluster nor a container
	@PYTHONPATH=.:server $(RUN) -m deploy.check $(ARGS)

lint: $(READY)  ## check format, lint rules and spelling
	@$(RUN) -m ruff format --check $(CODE)
	@$(RUN) -m ruff check $(CODE)
	@$(VENV)/bin/codespell $(CODE) README.md

format: $(READY)  ## format the code and fix lint findings
	@$(RUN) -m ruff format $(CODE)
	@$(RUN) -m ruff check --fix $(CODE)

types: $(READY)  ## check types (strict)
	@$(RUN) -m mypy $(TYPED)

layering: $(READY)  ## check that imports run one way
	@PYTHONPATH=.:server $(VENV)/bin/lint-imports --no-logo

# SHORT=1: a tiny model and few arms, under three minutes.
bench-serving: $(READY)  ## cost of safety in a real server against every other way (hours; SHORT=1: minutes)
	@$(RUN) -m benchmarks.serving.bench_serving $(if $(SHORT),--short) $(ARGS)

bench-changes: $(READY)  ## onboarding and profile changes under load; ends in one JSON line
	@$(RUN) -m benchmarks.profile_changes $(ARGS)

bench-live: $(READY)  ## coefficients found on the running engine against those found with gradients
	@$(RUN) -m benchmarks.live_calibration --advbench '$(ADVBENCH)' --self-instruct '$(SELF_INSTRUCT)' --xstest '$(XSTEST)' $(ARGS)

bench-scaling: $(READY)  ## cost of tenants and replicas for registry and worker; ends in one JSON line
	@$(RUN) -m benchmarks.scaling.bench_scaling $(ARGS)

bench-kernels: $(READY)  ## time the GPU kernels; on a GPU run python -m benchmarks.kernels in an environment with vLLM for CUDA
	@$(RUN) -m benchmarks.kernels $(ARGS)

report: $(READY)  ## measure the example's parent and tenants before and after; build/evaluation/report.html
	@$(RUN) -m examples.smollm2.measure --advbench '$(ADVBENCH)' --self-instruct '$(SELF_INSTRUCT)' --xstest '$(XSTEST)' $(ARGS)

bench-safety: $(READY)  ## safety against utility: ours, SafeLoRA, SafeMERGE, RESTA, SaLoRA and no repair
	@$(RUN) -m benchmarks.safety_utility.bench_safety --advbench '$(ADVBENCH)' --self-instruct '$(SELF_INSTRUCT)' --xstest '$(XSTEST)' $(ARGS)

bench-ablations: $(READY)  ## effect of each choice of the recipe; ARGS names tables
	@$(RUN) -m benchmarks.ablations --advbench '$(ADVBENCH)' --self-instruct '$(SELF_INSTRUCT)' --xstest '$(XSTEST)' $(ARGS)

LOCK_FLAGS = --no-sources --no-annotate --custom-compile-command 'make lock' --quiet \
  $(if $(PIP_FIND_LINKS),--find-links '$(PIP_FIND_LINKS)',--torch-backend cpu)
# Pins that still fit stay; all of them move with: make lock ARGS=--upgrade
lock: requirements/overrides.txt pyproject.toml  ## remake requirements.txt, requirements/cpu.txt and uv.lock from pyproject.toml (Python 3.11, Linux)
	@$(PYTHON) -m venv build/lock
	@build/lock/bin/python -m pip install -qq uv
	@build/lock/bin/uv pip compile pyproject.toml --extra cpu --extra server --extra recipe --extra deploy --extra dev \
	  --override requirements/overrides.txt --python-version 3.11 \
	  $(LOCK_FLAGS) $(ARGS) --output-file requirements.txt
	@build/lock/bin/uv pip compile pyproject.toml --extra cpu --extra server --extra s3 --extra recipe \
	  --override requirements/overrides.txt --constraint requirements.txt --python-version 3.11 \
	  $(LOCK_FLAGS) $(ARGS) --output-file requirements/cpu.txt
	@build/lock/bin/python requirements/lock_uv.py build/lock/bin/uv $(ARGS)
	@echo "requirements.txt: $$(grep -c '==' requirements.txt) packages"

dist: $(READY)  ## build the wheel and the source distribution in dist/ and check them
	@rm -rf dist
	@$(RUN) -m build --no-isolation --outdir dist
	@$(RUN) -m twine check --strict dist/*
	@$(RUN) -m check_wheel_contents dist/*.whl

clean:  ## remove .venv, build and caches
	@rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Every command a contributor or CI needs. Environments are made when first wanted and reused until their
# file in constraints/ changes; `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

# The four folders are imported as slimtrain.*, without installing: build/dev holds links to them.
links := $(addprefix build/dev/slimtrain/,core proto callbacks hooks)
export PYTHONPATH := $(CURDIR)/build/dev

WORKERS ?= 2
DIST ?= dist

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9 -]+:.*## / {printf "  %-34s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- environments -----------------------------------------------------------------------------------------

.PHONY: env-torch env-tf1 env-tf2 env-dist
env-torch env-tf1 env-tf2 env-dist: env-%: .venv/%/made $(links) ## Make one environment

.venv/torch/made .venv/tf2/made .venv/dist/made: version := 3.11
.venv/tf1/made: version := 3.7

# "made" is a copy of the constraints, written last: without it the environment is half made, and where it differs
# the environment is outdated. Comparing text spares the environment when git only gave the file a new date.
.venv/%/made: constraints/%.txt
	@if cmp -s $< $@; then touch $@; exit; fi; \
	python=$$(.ci/find-python $(version)); \
	echo "Making .venv/$* with $$python, once; this can take minutes."; \
	"$$python" -m venv --clear .venv/$*; \
	.venv/$*/bin/python -m pip install --requirement $< || { rm -rf .venv/$*; exit 1; }; \
	cp $< $@

build/dev/slimtrain/%:
	@mkdir -p $(@D)
	@ln -sfn ../../../$* $@

# --- tests ------------------------------------------------------------------------------------------------

MARK ?= not slow

# $(call pytest,environment,folders of tests/): says which Python runs, then runs them. Only where slow tests are
# asked for may there be none (pytest's exit code 5).
define pytest
@printf '\n== %s in .venv/%s: ' '$(2)' '$(1)'; .venv/$(1)/bin/python --version
@.venv/$(1)/bin/pytest $(addprefix tests/,$(2)) -n $(WORKERS) -m '$(MARK)' || [ "$$?,$(MARK)" = 5,slow ]
endef

# More than one thread in each worker of pytest would only wait for the others.
test%: export OMP_NUM_THREADS := 1

.PHONY: test test-torch test-tf1 test-tf2 test-tf2-resource test-tf2-reference test-slow
test: test-torch test-tf1 test-tf2 ## Run every test in every environment, except the slow ones

test-torch test-tf1 test-tf2: ## Run the tests of one environment
test-torch: env-torch
	$(call pytest,torch,core proto callbacks house)

test-tf1: env-tf1
	$(call pytest,tf1,core proto hooks)

# TensorFlow 2.x under compat.v1 has two kinds of variables and of control flow; users meet both.
test-tf2: test-tf2-resource test-tf2-reference
test-tf2-resource: export SLIMTRAIN_TF_MODE := resource
test-tf2-resource: env-tf2
	$(call pytest,tf2,core proto hooks)

test-tf2-reference: export SLIMTRAIN_TF_MODE := reference
test-tf2-reference: env-tf2
	$(call pytest,tf2,hooks)

test-slow: ## Run the tests marked slow in every environment
	@$(MAKE) test MARK=slow

# --- lint -------------------------------------------------------------------------------------------------

.PHONY: lint lint-style lint-types lint-syntax
lint: lint-style lint-types lint-syntax ## Check style, types and the syntax of Python 3.7

lint-style: env-torch
	.venv/torch/bin/ruff check

lint-types: env-torch
	.venv/torch/bin/mypy

lint-syntax: env-torch
	.venv/torch/bin/pytest --quiet tests/house/test_house_syntax.py

# --- what it is for ---------------------------------------------------------------------------------------

.PHONY: demo demo-tf bench
demo: env-torch ## Train, quantize and deploy the digits with Lightning; the report goes to out/demo
	.venv/torch/bin/python examples/digits_lightning.py

demo-tf: env-tf1 ## The same with TensorFlow 1.15; the report goes to out/demo-tf
	.venv/tf1/bin/python examples/digits_monitored_session.py

hooks_benches := $(wildcard tests/bench/bench_hooks*.py)
torch_benches := $(filter-out $(hooks_benches),$(wildcard tests/bench/bench_*.py))

bench: env-torch env-tf1 env-tf2 ## Run every benchmark of tests/bench in its environment
	@for bench in $(torch_benches); do .venv/torch/bin/python $$bench; done
	@for bench in $(hooks_benches); do .venv/tf1/bin/python $$bench; .venv/tf2/bin/python $$bench; done

.PHONY: docs
docs: env-torch ## Build the pages of docs/ and the API reference into build/site
	.venv/torch/bin/mkdocs build --strict

# --- distribution -----------------------------------------------------------------------------------------

# The wheel is built from the sdist, so nothing that an earlier build left here can slip into it.
.PHONY: dist
dist: env-dist ## Build the sdist and the wheel into dist/
	rm -rf slimtrain.egg-info
	.venv/dist/bin/pyproject-build --no-isolation --outdir $(DIST) .
	rm -rf slimtrain.egg-info

# Pinned by nothing but the wheel's own requirements, as a user gets it: minutes of installing, so no part of `test`.
.PHONY: demo-wheel
demo-wheel: env-dist ## Run the demos from the wheel alone, in a new environment of each Python
	rm -rf build/wheel
	$(MAKE) dist DIST=build/wheel
	.ci/demo-wheel build/wheel/*.whl 3.7 tf,mnn digits_monitored_session.py
	.ci/demo-wheel build/wheel/*.whl 3.11 torch,mnn,report digits_lightning.py \
		"cli_digits.py --compress prune:simd_oc,sparsity=0.5;quantize:lsq"

.PHONY: clean clean-env
clean: ## Delete what was built and cached, but not the environments
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks lightning_logs
	find $(wildcard core proto callbacks hooks tests examples) -name __pycache__ -prune -exec rm -rf {} +

clean-env: ## Delete the environments
	rm -rf .venv

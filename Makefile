# What a person can do here: `make help`. Needs make, git and Python 3.11 or newer, nothing else.

.DEFAULT_GOAL := help
.PHONY: help setup setup-bench repro preset seeds sweep surrogates apply-best pull-results test test-slow test-all bench docs lint format \
	lock ui screenshots clean
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
PORT ?= 5000
N ?= 3
# Of the private copy; a uv on PATH is taken as it is.
UV_VERSION := 0.13.9
export UV_PYTHON_DOWNLOADS := never
# Container images set it; then every process compiles torch, Ray and MLflow anew, for 5 to 10 s.
unexport PYTHONDONTWRITEBYTECODE

FOUND_UV := $(shell uv --version >/dev/null 2>&1 && command -v uv)
UV := $(or $(FOUND_UV),.uv/bin/uv)
READY := .venv/.ready
READY_BENCH := .venv/.ready-bench
PAGE := .dvc/plots/page.html
IN_ENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "ARGS goes to dvc and pytest: make repro ARGS=finetune_stdb, make test ARGS='-k leak -x'"

setup: $(READY) $(PAGE) ## Make the environment, .venv; nothing to do where it is current
	@echo ".venv is ready."

setup-bench: $(READY_BENCH) $(PAGE) ## The same, and the peers that tests and benchmarks compare with
	@echo ".venv is ready, peers included."

repro: $(READY) $(PAGE) ## Reproduce the pipeline: dvc repro ARGS
	@$(IN_ENV) python -m pipeline.repro $(ARGS)

preset: $(READY) ## Write a preset into params.yaml (NAME=..., DATA=folder or archive; without: list)
	@$(IN_ENV) python -m pipeline.preset "$(NAME)" $(if $(filter command,$(firstword $(origin DATA))),--data "$(DATA)")

seeds: $(READY) ## The pipeline over N seeds, as DVC experiments, and the mean (N=3)
	@$(IN_ENV) python -m pipeline.seeds $(N)

sweep: $(READY) ## Search T, thresholds, α, β by sweep/params.yaml: dvc repro sweep/dvc.yaml
	@$(IN_ENV) dvc repro $(ARGS) sweep/dvc.yaml

surrogates: $(READY) ## Compare surrogates by T (hours): dvc repro sweep/surrogates/dvc.yaml
	@$(IN_ENV) dvc repro $(ARGS) sweep/surrogates/dvc.yaml

apply-best: $(READY) ## Write the sweep's winner into params.yaml and show what changed
	@$(IN_ENV) python -m pipeline.apply_best $(ARGS)

pull-results: $(READY) ## Fetch what stages made from the team's DVC remote, without running anything
	@$(IN_ENV) dvc remote default >/dev/null 2>&1 || \
		{ echo "There is no DVC remote to pull from. A team adds one: dvc remote add --default NAME URL (see .dvc/config)." >&2; exit 1; }
	@$(IN_ENV) dvc pull $(ARGS)

test: $(READY) ## Run the fast tests, about a quarter of an hour on two cores: pytest ARGS
	@echo "The fast tests take about a quarter of an hour on two idle cores; ARGS='tests/stdb -x' runs some."
	@$(IN_ENV) pytest --quiet -m 'not slow' $(ARGS)

test-slow: $(READY) ## Run the slow tests, about an hour
	@$(IN_ENV) pytest --quiet -m slow $(ARGS)

test-all: $(READY_BENCH) ## Run every test: fast, slow, and those against peers
	@$(IN_ENV) pytest --quiet $(ARGS)

bench: $(READY_BENCH) ## Compare the engine with its peers: benchmarks/README.md (hours; ARGS=--quick)
	@$(IN_ENV) python -m benchmarks.run $(ARGS)

docs: $(READY) ## Build the documentation as a site: site/index.html
	@$(IN_ENV) python -m sphinx --quiet --fail-on-warning --keep-going --jobs auto -c docs . site
	@cp docs/site-index.html site/index.html
	@echo "site/index.html is written; a browser opens it as it is."

lint: $(READY) ## Check style, formatting and types: ruff and mypy
	@$(IN_ENV) ruff check .
	@$(IN_ENV) ruff format --check .
	@$(IN_ENV) mypy

format: $(READY) ## Format, and repair what ruff can
	@$(IN_ENV) ruff check --fix-only .
	@$(IN_ENV) ruff format .

lock: | $(if $(FOUND_UV),,.uv/.ready) ## Pin anew in requirements.lock (ARGS=--upgrade: newest)
	@"$(UV)" pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate -o requirements.lock --quiet $(ARGS)
	@echo "requirements.lock is current."

ui: $(READY) ## Show all runs in MLflow's pages on this machine (PORT=5000)
	@$(IN_ENV) python -m pipeline.ui $(PORT)

screenshots: $(READY) ## Take docs/compare.md's pictures of MLflow's pages anew; needs chromium and two runs
	@$(IN_ENV) python -m tests.screenshots

clean: ## Remove caches of Python and of the checkers, nothing that took long to make
	@find . \( -name .git -o -name .venv -o -name .uv -o -name .dvc \) -prune \
		-o -type d -name __pycache__ -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@echo "Left: .venv, .uv, DVC's cache and outputs, unfinished jobs, MLflow's runs."

# The environment. uv takes a package that an interrupted installation left half done for whole, so
# .unfinished marks an installation under way, and one that finds the mark begins with an empty
# .venv. --require-hashes refuses a file whose hash differs and a package that isn't in the lock.
# The project itself isn't installed: stages are `python -m pipeline.x`, so that a copy of the tree
# (dvc exp run --temp) runs its own code.

IS_RECENT := -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
CHECK_PYTHON = "$(PYTHON)" $(IS_RECENT) || { \
	echo "Python 3.11 or newer is needed; $(PYTHON) is '$$("$(PYTHON)" --version 2>&1)'." >&2; \
	echo "Name another: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1; }
BASE = "$$("$(PYTHON)" -c 'import sys; print(sys._base_executable)')"
VENV = "$(UV)" venv --quiet --no-project --python $(BASE)

# $(call install,EXTRAS)
define install
@$(CHECK_PYTHON)
@echo "Setting up .venv: $(1) (about half a minute on a fast line; 6 GB) ..."
@if [ -e .venv/.unfinished ]; then $(VENV) --clear .venv; \
	elif ! .venv/bin/python $(IS_RECENT); then $(VENV) --allow-existing .venv; fi
@touch .venv/.unfinished
@"$(UV)" pip install --quiet --python .venv/bin/python --constraint requirements.lock \
	--require-hashes -r pyproject.toml $(1:%=--extra %) || { \
	echo "If pyproject.toml names a package that requirements.lock lacks: make lock" >&2; exit 1; }
@rm .venv/.unfinished && touch $@
endef

$(READY): pyproject.toml requirements.lock | $(if $(FOUND_UV),,.uv/.ready)
	$(call install,pipeline dev)

$(READY_BENCH): $(READY)
	$(call install,pipeline dev bench)

# What DVC shows plots on, and the setting that names it; git tracks neither.
$(PAGE): $(READY) pipeline/write_plots_page.py
	@$(IN_ENV) python -m pipeline.write_plots_page

.uv/.ready:
	@$(CHECK_PYTHON)
	@echo "uv isn't on PATH: installing it into .uv ..."
	@"$(PYTHON)" -m venv --clear .uv
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

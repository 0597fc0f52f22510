# Everything starts here: `make train` and `make test` work on a machine with Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test test-slow test-cluster test-jobs test-install test-gpu gpu-check chaos lint format types pretrained gallery docs bench clean help

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# torch comes first and alone: its CPU build has its own version, which the rest must not replace.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	touch $@

train: $(STAMP) ## train configs/digits.yaml on a local Ray, with a live view, and export it
	$(BIN)/ebm-dist train configs/digits.yaml

# One thread a process: the tests share the cores out among themselves, and sums are then
# taken in one order everywhere. Those on Ray wait for processes half of their time; the tests of
# a file may share a run.
test: $(STAMP) lint types ## lint, types and every test that needs no GPU and no long wait
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m 'not slow and not gpu and not ray'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'ray and not slow'

test-slow: $(STAMP) ## the tests that take minutes each, those of test-cluster apart
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow --ignore-glob='*/test_cluster_*'

test-cluster: $(STAMP) ## three machines in network namespaces: cut cables, lost nodes (root)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -s tests/distributed/test_cluster_*.py

# ray[default] has the dashboard that takes jobs, and Ray Client. It is kept apart: what trains
# without it must be seen to train without it.
JOBS := .venv-jobs
$(JOBS)/.installed: pyproject.toml constraints.txt docker/constraints.txt docker/install.sh
	PYTHON=$(PYTHON) docker/install.sh $(JOBS)
	$(JOBS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt pytest pytest-timeout
	touch $@

test-jobs: $(JOBS)/.installed ## runs submitted to a Ray with its dashboard, in an environment of its own (root)
	PYTHONPATH=. OMP_NUM_THREADS=1 $(JOBS)/bin/python -m pytest -q -rs tests/distributed/test_cluster_jobs.py

test-install: $(STAMP) ## what the CPU image's Dockerfile installs, in a clean environment without Docker
	$(BIN)/python -m pytest -q -rs -s tests/unit/launch/test_image_install.py

# A machine that is lent for a quarter of an hour brings its own Python and torch, and no network.
gpu-check: ## the first quarter of an hour with a GPU: GPU tests, runs, figures; in .venv if there is one
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

chaos: $(STAMP) ## ten minutes of training while a random part is killed every few seconds
	OMP_NUM_THREADS=1 $(BIN)/python tests/distributed/chaos.py --seconds 600

# Each model is the export of one shipped config; its card says what was measured.
# Those of fashion-mnist need data/fashion-mnist (docs/recipes.md).
PRETRAINED := digits digits-joint digits-rbm fashion-mnist fashion-mnist-classes
pretrained: $(STAMP) ## train the models in ebm_dist/pretrained again
	for name in $(PRETRAINED); do \
	  config=$$(echo $$name | tr - _) && \
	  $(BIN)/ebm-dist train configs/$$config.yaml --run-dir build/pretrained/$$name tracking.wandb=off && \
	  $(BIN)/ebm-dist export build/pretrained/$$name build/exported/$$name --license apache-2.0 && \
	  sed -i 's#$(CURDIR)/##g' build/exported/$$name/config.json build/exported/$$name/README.md || exit 1; \
	done
	cp -r build/exported/. ebm_dist/pretrained/

lint: $(STAMP) ## style and format
	$(BIN)/ruff check ebm_dist tests benchmarks docs
	$(BIN)/ruff format --check ebm_dist tests benchmarks docs

format: $(STAMP) ## rewrite to the format
	$(BIN)/ruff check --fix ebm_dist tests benchmarks docs
	$(BIN)/ruff format ebm_dist tests benchmarks docs

types: $(STAMP) ## static types
	$(BIN)/basedpyright ebm_dist

gallery: $(STAMP) ## the pictures of the documentation (those of reports need Chromium)
	$(BIN)/python docs/gallery/draw/gallery.py docs/gallery
	$(BIN)/python docs/gallery/draw/sick_runs.py docs/pictures

# The site gets an environment of its own: no test needs it.
DOCS := .venv-docs
$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(DOCS)/.installed ## the documentation site, to be read offline: site/index.html
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict

# The peers get an environment of their own: what they pin is not ours to carry.
PEERS := .venv-peers
$(PEERS)/.installed: benchmarks/peers.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt
	touch $@

bench: $(STAMP) $(PEERS)/.installed ## ours against the peers and the limits; writes benchmarks/results/DATE
	$(BIN)/python benchmarks/report.py benchmarks/results/$(shell date +%F) \
		--peer-python $(PEERS)/bin/python

clean: ## the environment and what tools left behind
	rm -rf $(VENV) $(PEERS) $(JOBS) $(DOCS) site .pytest_cache .ruff_cache build dist *.egg-info

# `make` alone lists what there is. Every target makes the virtual environment first if it is missing or out of date.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
READY := $(VENV)/.ready
OUT ?= demo-out
DEMO ?=
MINUTES ?= 30
MODEL ?=
STUDY_OUT ?= study-out
SIZE ?= small
TEXTS ?=

.PHONY: help demo real-model study test test-all docker-test soak clients zen check fix docs dist sbom lock setup clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: $(READY) ## make the virtual environment from the lock

$(READY): requirements/cpu.lock pyproject.toml requirements/setup.sh
	requirements/setup.sh $(PYTHON) $(VENV)
	@touch $@

demo: $(READY) ## prune a real chat model, serve it, talk to it, measure: ten minutes, into demo-out/; DEMO=tiny fetches nothing
	$(BIN)/pat-demo --out $(OUT) $(if $(filter tiny,$(DEMO)),--tiny)

real-model: $(READY) ## fetch the pretrained chat model that the demo works on (98 MB), into .real-model/
	$(BIN)/python -m pat_serve.demo.real.model .real-model

study: $(READY) ## quality against speed at four ratios, with seeds: hours, goes on where it stopped; TEXTS=folder SIZE=tiny
	$(BIN)/python -m benchmarks.study --out $(STUDY_OUT) --size $(SIZE) $(if $(TEXTS),--data $(TEXTS)) --sweep hio --sweep identity --sweep masks

test: $(READY) ## the tests, real vLLM included
	$(BIN)/pytest -n 2 --dist loadfile -m 'not slow and not docker'

test-all: $(READY) ## the tests that take long too
	$(BIN)/pytest -n 2 --dist loadfile -m 'not docker'

docker-test: $(READY) ## build the image, run it, ask it, stop it; needs a Docker engine
	$(BIN)/pytest -s -m docker tests/docker

soak: $(READY) ## half an hour of mixed load; MINUTES=5 for less
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

clients: $(READY) $(CLIENTS)/.ready ## other people's clients against a chat model, each check on a line; MODEL=folder; needs curl and wrk
	@[[ -n "$(MODEL)" ]] || { echo "clients: expected MODEL=folder of a chat model, such as pat-export writes" >&2; exit 2; }
	$(BIN)/python -m benchmarks.clients --model $(MODEL) --python $(CLIENTS)/bin/python

$(CLIENTS)/.ready: requirements/clients.lock requirements/setup.sh
	requirements/setup.sh $(PYTHON) $(CLIENTS) requirements/clients.lock
	@touch $@

zen: $(READY) ## add AMD's kernels, which vLLM takes by itself: four bits are slow without them on such CPUs
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements/zen.lock

check: $(READY) ## ruff, mypy strict, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_import_rules.py

fix: $(READY) ## let ruff mend and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## build the documentation into site/, and fail on any warning
	$(BIN)/mkdocs build --strict --site-dir site

dist: $(READY) ## build the release, source and wheel (the wheel from the source's files), into dist/
	$(BIN)/python -m build --no-isolation --outdir dist

sbom: $(READY) ## list what the images are made of, as CycloneDX, into dist/; some seconds a lock
	$(BIN)/python requirements/sbom.py --out dist

lock: $(READY) ## resolve the dependencies anew into requirements/cpu.lock
	requirements/lock.sh $(PYTHON)

clean: ## delete the virtual environment and caches, never demo-out/
	rm -rf $(VENV) $(CLIENTS) .mypy_cache .ruff_cache .pytest_cache build dist site *.egg-info

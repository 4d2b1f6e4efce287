# Debian 12, root. Every target does all the set-up it needs and says what it installs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/.complete
PYTEST_ARGS ?=
# Each of pytest's workers has a lab of its own. More of them than cores makes tests that wait for guests time out.
WORKERS ?= 2

.PHONY: help setup demo test test-nfs bench lint proto image clean lab-down

help: ## Show this help.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: lab-packages $(STAMP) ## Install Debian packages, make .venv with frostgate and pytest, build the lab's guest.

.PHONY: lab-packages
lab-packages:
	@tests/lab/install.sh

$(STAMP): requirements.lock pyproject.toml hatch_build.py $(shell find protos -name '*.proto')
	@echo "setup: .venv from /usr/bin/python3 with the locked packages, and frostgate in it"
	@[[ -x $(BIN)/python ]] || /usr/bin/python3 -m venv --system-site-packages .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## Snapshot a real running VM, let it damage a file, revert, and see the file whole.
	@$(BIN)/python -m tests.lab.demo

test: setup ## Run every test, with real libvirt, real guests, real file systems and a real one-node Ceph.
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) $(PYTEST_ARGS)

test-nfs: setup ## Run the tests of the nfs provider on real NFS 4.2, in a guest whose kernel serves and mounts it.
	@tests/lab/mirror/build.sh
	@$(BIN)/python -m pytest tests/nfs $(PYTEST_ARGS)

bench: setup ## Measure: freeze windows, reverts, mounts, the gateway's own cost ...; each beside its peer. Takes an hour.
	@failed=""; for script in bench/[a-z]*.py; do \
		name=$$(basename $$script .py); echo; echo "== $$name: $$(head -1 $$script | tr -d '\"')"; \
		$(BIN)/python -m tests.lab down; $(BIN)/python -m bench.$$name || failed+=" $$name"; \
	done; $(BIN)/python -m tests.lab down; \
	[[ -z $$failed ]] || { echo "bench: failed:$$failed" >&2; exit 1; }

lint: setup ## ruff, mypy --strict, buf lint, import-linter.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/buf lint
	@$(BIN)/lint-imports

proto: setup ## Generate the gRPC stubs below build/stubs (installing does it as well).
	@$(BIN)/python hatch_build.py

image: setup ## Build the container image with buildah, start it and ask for its health.
	@packaging/image.sh

lab-down: ## Remove whatever a killed test or demo left: VMs, Ceph daemons, mounts, loop devices.
	@[[ ! -x $(BIN)/python ]] || $(BIN)/python -m tests.lab down

clean: lab-down ## lab-down, then remove .venv, build and the lab's cache.
	@rm -rf .venv .lab build dist

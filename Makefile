# Needs make and Python 3.11 or newer, nothing else. Every target makes the environment it needs under $(VENV) and leaves a stamp
# there, so that a second call installs nothing until pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV ?= .venv
TRITON_VENV ?= $(VENV)-triton
# arguments of the targets
CONFIG ?=
RECIPE ?= eurosat
DATA ?=
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help serve demo train test lint format stubs

help: ## say what there is
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s%s\n", $$1, $$2 }'

serve: $(VENV)/.stamp-serve ## serve the shipped bundle (CONFIG=FILE for another configuration, ARGS=... for phalanx serve)
	@exec $(BIN)/phalanx serve $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

demo: $(VENV)/.stamp-serve ## serve, classify clean and adversarial tiles, show both side by side, stop
	@$(BIN)/python -m service.demo $(ARGS)

train: $(VENV)/.stamp-train ## from data to runs/RECIPE/bundle (RECIPE=eurosat DATA=FOLDER_OR_HUB_ID JOBS=2; ARGS=... for phalanx-train build)
	@exec $(BIN)/phalanx-train build $(RECIPE) --jobs $(JOBS) $(if $(DATA),--data $(DATA)) $(ARGS)

test: lint $(TRITON_VENV)/.stamp $(VENV)/.stamp-prometheus ## the one gate: lint, types, tests (ARGS=... for pytest)
	TRITON_PYTHON=$(abspath $(TRITON_VENV))/bin/python PROMETHEUS=$(abspath $(VENV))/prometheus/usr/bin $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.stamp-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp-dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: $(VENV)/.stamp-dev ## regenerate the server's and the client's stubs from protos
	$(BIN)/python protos/generate
	$(BIN)/python clients/python/generate

# A stamp is touched last, so what was interrupted is done again.
$(VENV)/.stamp-python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Phalanx needs Python 3.11 or newer, and $(PYTHON) is " \
		+ sys.version.split()[0] + ": name another one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-serve: $(PINS) | $(VENV)/.stamp-python
	$(BIN)/python $(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.stamp-train: $(PINS) | $(VENV)/.stamp-python
	$(BIN)/python $(PIP_INSTALL) --editable '.[train]'
	@touch $@ $(VENV)/.stamp-serve

$(VENV)/.stamp-dev: $(PINS) | $(VENV)/.stamp-python
	$(BIN)/python $(PIP_INSTALL) --editable '.[train,dev,signing,native,tracing]'
	@touch $@ $(VENV)/.stamp-train $(VENV)/.stamp-serve

# A client of others, for the tests: it wants an environment of its own. It imports protobuf without declaring it, and its
# perf_analyzer loads CUDA's runtime, which is small, even where there is no GPU.
$(TRITON_VENV)/.stamp: constraints.txt
	$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python $(PIP_INSTALL) 'tritonclient[grpc]' protobuf nvidia-cuda-runtime-cu12
	@touch $@

# Prometheus and promtool, for the tests of deploy/: unpacked, not installed. Without Debian's packages those tests are skipped.
$(VENV)/.stamp-prometheus: | $(VENV)/.stamp-python
	@if ! command -v promtool >/dev/null && command -v apt-get >/dev/null; then \
		mkdir -p $(VENV)/prometheus && cd $(VENV)/prometheus && \
		{ apt-get download -qq prometheus 2>/dev/null || { apt-get update -qq && apt-get download -qq prometheus; }; } && \
		dpkg -x prometheus_*.deb . && rm prometheus_*.deb; \
	fi || echo "Prometheus cannot be had: its tests will be skipped"
	@touch $@

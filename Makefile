# make demo   train a small Vim on Fashion-MNIST here and look at it (first run installs everything)
# make test   lint, types, tests, Triton kernels in the interpreter, timm's own model tests, the documentation
# make fast   the quick part of the tests
# make docs   the documentation's site, into build/docs
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check
# caches of compiled modules: dozens of tests start a Python of their own
unexport PYTHONDONTWRITEBYTECODE
SOURCES := setup.cfg setup.py constraints.txt $(wildcard kernels/csrc/*)

.PHONY: demo test fast lint types unit interp conformance docs clean

demo: $(VENV)/.demo-ready
	$(BIN)/python tools/train.py configs/classification/vim-pico_fashion-mnist.py --work-dir work_dirs/demo

test: $(VENV)/.test-ready
	$(MAKE) -j $(JOBS) lint types docs
	$(MAKE) unit interp conformance

fast: $(VENV)/.test-ready
	$(BIN)/python -m pytest -n $(JOBS) -m 'not slow and not gpu'

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .

types: $(VENV)/.test-ready
	$(BIN)/mypy

unit: $(VENV)/.test-ready
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 10

interp: $(VENV)/.test-ready
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) -m interp tests/kernels

conformance: $(VENV)/.test-ready
	$(BIN)/python tests/timm_conformance/run.py -n $(JOBS)

docs: $(VENV)/.test-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip

$(VENV)/.demo-ready: $(VENV)/bin/python $(SOURCES)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[mm]'
	touch $@

$(VENV)/.test-ready: $(VENV)/bin/python $(SOURCES)
	# beside it the browser for the test of the page, which is skipped without one
	{ command -v chromium || { apt-get update && apt-get install --yes --no-install-recommends chromium; }; } > /dev/null 2>&1 & \
	$(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[mm,det,seg,restoration,diffusion,export,demo,docs,dev]' && wait
	# a package that needs mamba_ssm, for the test that it runs here without; its exact pins would replace ours
	$(PIP) install --quiet --no-deps mambavision==1.2.0 einops==0.8.2
	# pip compiles on one core, this on all, but for tests of others; some packages ship templates that are no Python
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true
	touch $@ $(VENV)/.demo-ready

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache work_dirs/demo

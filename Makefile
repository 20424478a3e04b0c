# GNU make 3.81 and later, Linux and macOS. Each target makes the environment it needs in .venv; nothing else is touched.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-cluster triton lint style types imports docs notebooks bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Workers of the test run. Two OpenMP processes on two cores stall each other, hence one thread each.
WORKERS ?= 2
# The image that cluster tests run, under the name it has in the cluster.
IMAGE ?= sfumato:0.1.0
# A further package index, for example PyTorch's own index of CPU builds (on Linux the usual build of torch carries CUDA,
# several gigabytes).
TORCH_INDEX ?=
INSTALL = $(BIN)/python -m pip install $(if $(CI),--quiet) --disable-pip-version-check --no-input \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=python3.12  another interpreter (3.11 or later)"
	@echo "  TORCH_INDEX=URL    a further index for torch: PyTorch's index of CPU builds saves gigabytes on Linux"

demo: $(VENV)/.installed ## faces found in photographs whose tensors were obfuscated; writes demo/
	$(BIN)/sfumato demo --out demo

test: $(VENV)/.installed-dev ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: style types imports ## style, types, import rules

style: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/.installed-dev ## links, commands and code in the documents
	$(BIN)/python .ci/check_docs.py

test-cluster: $(VENV)/.installed-dev ## what needs a Kubernetes cluster: KUBECONFIG, IMAGE (deploy/Containerfile)
	@# kr8s has no way to close its connections: they go with the process
	OMP_NUM_THREADS=1 SFUMATO_IMAGE="$(IMAGE)" $(BIN)/python -m pytest -m cluster tests/cluster \
		-W ignore::ResourceWarning -W ignore::pytest.PytestUnraisableExceptionWarning

triton: $(VENV)/.installed ## the real tritonserver, into .venv (Linux on x86_64); its tests skip without it
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[triton]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps nvidia-pytriton==0.7.0

notebooks: $(VENV)/.installed-dev ## every notebook run and rendered, in build/notebooks
	mkdir -p build/notebooks && cp notebooks/*.ipynb build/notebooks
	cd build/notebooks && ../../$(BIN)/jupyter nbconvert --execute --to html --ExecutePreprocessor.timeout=600 *.ipynb

bench: $(VENV)/.installed-dev ## every benchmarks/bench_*.py
	@set -e; shopt -s nullglob; scripts=(benchmarks/bench_*.py); \
	[ $${#scripts[@]} -gt 0 ] || { echo "no benchmarks/bench_*.py here"; exit 1; }; \
	for script in "$${scripts[@]}"; do echo "== $$script"; $(BIN)/python "$$script"; done

clean: ## removes .venv and everything built
	rm -rf $(VENV) build dist demo out src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found. Wanted: Python 3.11 or later. Do: install it, or make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$$($(PYTHON) --version) found. Wanted: 3.11 or later. Do: make PYTHON=/path/to/a/newer/python"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "This Python cannot make environments. Do (Debian, Ubuntu): apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing sfumato into $(VENV) (several minutes the first time)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing sfumato and its tools into $(VENV) (several minutes the first time)"
	@$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed

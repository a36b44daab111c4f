# `make` lists the targets. Variables to override, e.g. `make setup PYTHON=python3.12`:
#   PYTHON       the interpreter for .venv (3.11 to 3.13)
#   TORCH        the torch to install, e.g. TORCH=torch==2.10.0
#   TORCH_INDEX  an extra package index for torch. By default PyTorch's CPU index on Linux without an NVIDIA driver
#                (PyPI's Linux wheels pull gigabytes of CUDA libraries), else none. pip skips an index that it can't
#                reach. TORCH_INDEX= turns it off.
#   JOBS         test processes, each with one thread
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(if $(filter Linux,$(shell uname -s)),$(if $(shell command -v nvidia-smi),,$(CPU_INDEX)))
JOBS ?= 2

CPU_INDEX := https://download.pytorch.org/whl/cpu
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo gallery test test-slow test-gpu check fmt

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.setup ## create .venv and install the project into it, with CPU torch on machines without a GPU

demo: setup ## train, distil, stream and score a small avatar on the CPU: outputs/demo/
	$(PY) -m avatar demo

gallery: setup ## draw an overview image of the puppet world: outputs/gallery.png
	$(PY) -m avatar gallery

test: check ## ruff, pyright and the fast tests
	$(PYTEST)

test-slow: setup ## the tests marked slow
	$(PYTEST) -m "slow and not gpu"

test-gpu: setup ## the tests marked gpu; needs a CUDA device
	$(PY) -m pytest -q -m gpu

check: setup ## ruff and pyright only
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright

fmt: setup ## format, and apply ruff's automatic fixes
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
		echo "got $(PYTHON), which is $$($(PYTHON) -c 'import sys; print(sys.version[:6])' 2>/dev/null || echo not installed);" \
			"expected Python 3.11 to 3.13: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch is installed first and then pinned by a constraint, so that no dependency replaces it by a CUDA build.
$(VENV)/.setup: pyproject.toml | $(PY)
	$(PIP) install --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --retries 1) "$(TORCH)"
	$(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(VENV)/constraints.txt
	$(PIP) install --constraint $(VENV)/constraints.txt --editable ".[speech,dev]"
	@touch $@

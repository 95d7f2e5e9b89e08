# Two commands do everything: `make demo` and `make test`. Both set up .venv and build first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test lint bench setup clean adapters-golden peft-suite bnb-suite versions gpu-check

demo: setup
	$(BIN)/peftkern finetune --compare --output runs/demo

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu')

bench: setup
	$(BIN)/python -m benchmarks.run

# On a machine with a GPU and a torch of its own: builds, tests and measures; nothing is downloaded. See docs/gpu-status.md.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --output $(or $(OUT),runs/gpu-check)

# PEFT's own tests of its LoRA and (IA)^3 layers, every one of them accelerated.
peft-suite: setup
	$(BIN)/python tests/peft_suite.py

# bitsandbytes' own tests of its 4-bit layers, stock and on our kernels: make bnb-suite BNB_SRC=its source tree.
bnb-suite: setup
	$(BIN)/python tests/bnb_suite.py "$(BNB_SRC)"

# The tests of the integrations with the oldest and the newest supported releases, an environment in build/versions each.
versions: setup
	$(BIN)/python tests/versions.py

setup: $(VENV)/built

# torch is pinned: an unpinned torch is a CUDA build of several GB.
$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet "setuptools>=77" "cmake>=3.25" ninja pybind11 wheel
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e ".[hf,bench,examples,dev]"
	touch $@

# AdapterHub's library needs an older transformers than the tests: an environment of its own makes the files they read.
GOLDEN := build/adapters-golden
adapters-golden:
	$(PYTHON) -m venv $(GOLDEN)
	$(GOLDEN)/bin/pip install --quiet torch==2.13.0
	$(GOLDEN)/bin/pip install --quiet adapters==1.3.0 safetensors
	$(GOLDEN)/bin/python tests/golden/make_adapterhub.py

clean:
	rm -rf build runs peftkern/*.so $(VENV)

# Two commands do everything: `make demo` and `make test`. Both set up .venv and build first. `make test-all` adds the
# slow tests and compiles the CUDA kernels.
SHELL := bash
.SHELLFLAGS := -eo pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test test-all cuda lint bench setup clean adapters-golden peft-suite bnb-suite versions gpu-check

# The demo needs no other levels than this machine's; after `make test` they are there anyway.
demo: $(VENV)/built$(if $(wildcard $(VENV)/built),,-native)
	@echo "peftkern: 40 steps of QLoRA, then the same by HF PEFT + bitsandbytes, less than a minute each"
	$(BIN)/peftkern finetune --compare --steps 40 --output runs/demo

# A worker has one thread of torch's: two of each would wait for one another on two cores.
JOBS ?= 2
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

# The slow ones start compilers and groups of processes, so one after another.
test-all: test cuda
	$(BIN)/python -m pytest -m slow

# The CUDA kernels, for the tests that read their machine code: where no GPU is visible, nothing else builds them.
NVCC := $(or $(CUDACXX),$(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
cuda: setup
ifeq ($(NVCC),)
	@echo "peftkern: no nvcc: the CUDA kernels are not compiled, and tests of their machine code are skipped"
else
	@echo "peftkern: compiling the CUDA kernels for every architecture (four minutes on two cores; then only what changed)"
	$(BUILD) CMAKE_ARGS="$$CMAKE_ARGS -DPEFTKERN_LEVELS=all -DPEFTKERN_CUDA=ON" $(BIN)/python setup.py --quiet build_ext --inplace
endif

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

PIP := $(BIN)/pip install --disable-pip-version-check --progress-bar off
BUILD := PATH="$(CURDIR)/$(BIN):$$PATH"
# Of pip's lines, the downloads of a megabyte and more, and what was installed.
BRIEF := sed -un -e '/Downloading.*MB/p' -e '/^Successfully/p'

# torch is pinned: an unpinned torch is a CUDA build of several GB.
$(VENV)/installed: pyproject.toml Makefile
	@echo "peftkern: 1 of 3, an environment in $(VENV), and what the build needs (torch is 190 MB)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 | $(BRIEF)
	$(PIP) "setuptools>=77" "cmake>=3.25" ninja pybind11 wheel | $(BRIEF)
	touch $@

$(VENV)/built: LEVELS := all
$(VENV)/built-native: LEVELS := native
$(VENV)/built $(VENV)/built-native: $(VENV)/installed $(SOURCES)
	@echo "peftkern: 2 of 3, compiling the kernels (levels: $(LEVELS))"
	$(BUILD) CMAKE_ARGS="-DPEFTKERN_LEVELS=$(LEVELS) -DPEFTKERN_CUDA=AUTO $$CMAKE_ARGS" $(BIN)/python setup.py --quiet build_ext --inplace
	@echo "peftkern: 3 of 3, the package and what its demo and tests import"
	$(BUILD) CMAKE_ARGS="$$CMAKE_ARGS" $(PIP) --no-build-isolation -e ".[hf,bench,examples,dev]" | $(BRIEF)
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

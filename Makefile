# make quickstart | build | test | lint | bench | clean      (PYTHON=python3.11 to choose an interpreter)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := .stamps

# The CUDA kernels as C++ for the CPU, so that tests run them without a GPU.
export GRACE_EMULATION ?= ON

SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find cmake csrc -type f 2>/dev/null)
PIP     := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: quickstart build test lint format bench clean help compile-cuda
help:
	@sed -n 1p Makefile

quickstart: build
	$(BIN)/grace quickstart

build: $(STAMPS)/build

test: build $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope tests

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Compiles every kernel for both instruction families and loads the library; needs nvcc, no GPU.
compile-cuda: $(STAMPS)/venv
	PATH=$(CURDIR)/$(BIN):$$PATH GRACE_CUDA_ARCHS="80;90a" GRACE_EMULATION=OFF cmake -S . -B build/cuda -G Ninja \
	  -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	PATH=$(CURDIR)/$(BIN):$$PATH cmake --build build/cuda
	$(BIN)/python -c 'import torch; torch.ops.load_library("build/cuda/_C.so"); print("loads")'

bench: build
	$(BIN)/python -m benchmarks

clean:
	rm -rf build dist $(STAMPS) *.egg-info grace/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMPS)/venv: constraints.txt
	@mkdir -p $(STAMPS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip
	$(PIP) install -q -c constraints.txt torch setuptools scikit-build-core pybind11 ninja cmake
	@touch $@

# An editable install: Python files are live, the compiled library is rebuilt when a source changes.
$(STAMPS)/build: $(STAMPS)/venv $(SOURCES)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e .
	$(BIN)/grace info
	@touch $@

$(STAMPS)/test: $(STAMPS)/build
	$(PIP) install -q -c constraints.txt --group test
	@touch $@

$(STAMPS)/dev: $(STAMPS)/test
	$(PIP) install -q -c constraints.txt --group dev
	@touch $@

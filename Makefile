# Everything runs in a virtual environment that the first target makes: `make test`, `make demo`, `make bench`, ...
# Each target passes ARGS= on: `make demo ARGS=--quick`, `make test ARGS="-k dropout"`.
PYTHON ?= python3
VENV ?= .venv
# The newest torch that the tests have run on; the package itself takes any from 2.6 on. Override: TORCH="torch==2.6.*"
TORCH ?= torch>=2.6,<2.14
ARGS ?=

BIN := $(VENV)/bin
RUN := $(BIN)/python
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
PYTHON_CODE := afa_kernels python_tests bench examples setup.py

.PHONY: help test lint format demo sanitize triton-report cuda-report mutation gpu-check bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /: /' | sort

$(VENV)/.dependencies: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet "$(TORCH)"
	touch $@

# Editable, so that Python changes need no build; C++ changes run this rule again.
$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(RUN) -m pip install --quiet --editable ".[dev,demo,bench]"
	touch $@

test: lint $(VENV)/.built  ## lint and every test that needs no GPU
	$(RUN) -m pytest -m "not slow" $(ARGS)

lint: $(VENV)/.built  ## ruff and clang-format, check only
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.built  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

demo: $(VENV)/.built  ## fine-tune a real model, anneal, merge, load in stock PEFT (ARGS=--quick: under a minute)
	$(RUN) examples/demo.py $(ARGS)

bench: $(VENV)/.built  ## time every provider of this machine (ARGS=--quick: within two minutes)
	$(RUN) -m bench $(ARGS)

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist outputs *.egg-info afa_kernels/*.so .pytest_cache .ruff_cache

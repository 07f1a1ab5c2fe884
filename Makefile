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
PYTHON_CODE := afa_kernels python_tests bench tools examples experiments setup.py

.PHONY: help test lint format demo bench sanitize triton-report cuda-report mutation ptx-check gpu-check wheel-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /: /' | sort

$(VENV)/.dependencies: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet "$(TORCH)"
	touch $@

# Editable, so that Python changes need no build; C++ changes run this rule again. The emulator that runs the CUDA kernels
# on the CPU is built too, and of the CUDA architectures only one: the tests run without a GPU, and the reports compile
# every architecture themselves. `pip wheel .` builds all of them.
$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	AFA_BUILD_EMULATOR=1 AFA_CUDA_ARCHITECTURES=$${AFA_CUDA_ARCHITECTURES:-90-real} \
		$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@

test: lint  ## lint, the tests, sanitizers and machine-code reports: all that needs no GPU
	$(RUN) csrc/emulator/tests/sanitize.py --quick
	$(MAKE) --no-print-directory sanitize-cpu
	$(if $(shell command -v nvcc),$(RUN) -m tools.cuda_report --quick,@echo "no nvcc: the CUDA machine code is not checked")
	env -u TRITON_INTERPRET $(RUN) -m tools.triton_report --quick
	AFA_KERNELS_REQUIRE=$${AFA_KERNELS_REQUIRE:-cpu,cuda_emulated} $(RUN) -m pytest -m "not slow" $(ARGS)

lint: $(VENV)/.built  ## ruff and clang-format, check only
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.built  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

demo: $(VENV)/.built  ## fine-tune a real model, anneal, merge, load in stock PEFT (ARGS=--quick: under a minute)
	$(RUN) -m examples.demo $(ARGS)

bench: $(VENV)/.built  ## time every provider of this machine (ARGS=--quick: within two minutes)
	$(RUN) -m bench $(ARGS)

sanitize-cpu: $(VENV)/.built
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DAFA_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

sanitize: sanitize-cpu  ## CPU and CUDA kernels under ASan, UBSan and ThreadSanitizer, random shapes and schedules
	$(RUN) csrc/emulator/tests/sanitize.py $(ARGS)

mutation: $(VENV)/.built  ## plants faults in the CUDA kernels and shows that each one is caught
	$(RUN) csrc/emulator/tests/mutation.py $(ARGS)

ptx-check: $(VENV)/.built  ## the compiled kernels on the PTX machine: random problems, schedules, faults planted in the PTX
	$(RUN) -m pytest python_tests/test_ptx_*.py python_tests/test_numerics.py -k "ptx"
	AFA_TEST_PTX_PROBLEMS=$${AFA_TEST_PTX_PROBLEMS:-150} $(RUN) -m pytest python_tests/test_ptx_triton.py
	$(RUN) csrc/ptx/tests/mutation.py $(ARGS)

cuda-report: $(VENV)/.built  ## registers, spills, shared memory and instructions of every CUDA kernel
	$(RUN) -m tools.cuda_report $(ARGS)

triton-report: $(VENV)/.built  ## the same for every row of the Triton tile table
	env -u TRITON_INTERPRET $(RUN) -m tools.triton_report $(ARGS)

gpu-check: $(VENV)/.built  ## on a machine with a GPU: everything that the tests cannot run without one
	$(RUN) -m tools.gpu_check $(ARGS)

wheel-check: $(VENV)/.built  ## builds the wheel and trains with it in a fresh environment that has another torch
	$(RUN) -m pytest -m slow python_tests/test_wheel.py $(ARGS)

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist outputs *.egg-info afa_kernels/*.so .pytest_cache .ruff_cache

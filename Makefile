# imgpull: what can be made here. Two commands need nothing but a Debian 12 machine and root or sudo:
#   make demo    the main job on real input, end to end
#   make test    every check there is
# Rule: a command does all the set-up that it needs, and the second time does it at once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

export HOME ?= $(shell getent passwd "$$(id -u)" | cut -d: -f6)
export LC_ALL := C.UTF-8

PYTHON := .venv/bin/python
# Tests and demo act as several users and as root. What sudo runs writes nothing into the source tree.
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=CI,PYTEST_ADDOPTS,XDG_CACHE_HOME PYTHONDONTWRITEBYTECODE=1)
PYTEST_ARGS ?=
BENCH_ARGS ?=
SOURCES := broker unpriv privhelper tests
HELPER := dist/imgpull-helper.pyz
DESTDIR ?=

.PHONY: help setup demo test lint format manual helper deb install-helper vm vm-full fuzz faults soak bench lock clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand --tabs=24

setup:  ## install what is missing: Debian packages, .venv
	@tests/setup/apt.sh tests/setup/packages.txt
	@tests/setup/venv.sh

demo: setup  ## pull real images from a real S3 server, as an ordinary user
	@$(AS_ROOT) $(PYTHON) -m tests.demo

test: setup lint  ## lint, types, all tests; PYTEST_ARGS="-k name" for a part
	$(AS_ROOT) tests/run.sh $(PYTHON) $(PYTEST_ARGS)

lint: setup  ## ruff and mypy --strict
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m mypy

format: setup  ## write the house style
	$(PYTHON) -m ruff format $(SOURCES)
	$(PYTHON) -m ruff check --fix $(SOURCES)

manual: setup  ## write man pages, the schema of --json and the dashboard from the code
	$(PYTHON) -m tests.setup.manual

helper: $(HELPER)  ## build the root helper, one file, the same bytes each time

# Always asked, never trusted to be current: it takes less than a second, and it is what root will run.
.PHONY: $(HELPER)
$(HELPER):
	@mkdir -p $(@D)
	/usr/bin/python3 -m privhelper.build $@

deb: setup  ## build the Debian package into dist/; LINTIAN=1 asks lintian too
	tests/setup/deb.sh $(PYTHON)

install-helper: helper  ## install the root helper and its units as policy/systemd has them
	$(AS_ROOT) tests/setup/install-helper.sh $(HELPER) "$(DESTDIR)"

vm: setup  ## the tests that need a kernel with device-mapper, in a virtual machine
	$(AS_ROOT) $(PYTHON) -m pytest $(if $(AS_ROOT),-p no:cacheprovider) tests/vm $(PYTEST_ARGS)

vm-full: setup  ## the same at full size, every point and 1,000 power cuts: hours where the processor is emulated
	$(AS_ROOT) env IMGPULL_VM_SCALE=1 IMGPULL_VM_POINTS=0 IMGPULL_VM_CUTS=1000 \
	    $(PYTHON) -m pytest $(if $(AS_ROOT),-p no:cacheprovider) tests/vm -s $(PYTEST_ARGS)

fuzz: setup  ## fuzz the parsers; FUZZ_SECONDS a harness
	$(PYTHON) -m tests.fuzz

faults: setup  ## fail and kill the root helper at every system call of a commit; a quarter of an hour
	$(AS_ROOT) env IMGPULL_FAULTS=all $(PYTHON) -m pytest -p no:cacheprovider -s tests/privhelper/test_faults.py

# Goes on where it was stopped: each finished round is noted in build/soak. SOAK_STEPS=20000 for a short one.
SOAK_STEPS ?= 2000000
soak: setup  ## two million random operations, deaths and reboots against a model, without root; SOAK_STEPS
	IMGPULL_SOAK_STEPS=$(SOAK_STEPS) IMGPULL_SOAK_LOG=build/soak $(PYTHON) -m pytest -p no:cacheprovider -q -s tests/broker/test_simulation.py

bench: setup  ## measure beside aws, curl, tar, umoci and the floors; BENCH_ARGS="--sizes small --only check"
	@tests/setup/apt.sh tests/bench/packages.txt
	$(AS_ROOT) $(PYTHON) -m tests.bench $(BENCH_ARGS)

lock: ## choose the newest versions that pyproject.toml allows: constraints.txt
	tests/setup/apt.sh python3 python3-venv ca-certificates
	tests/setup/lock.sh

clean:  ## remove what was made here; caches below /var/tmp and ~/.cache stay
	$(AS_ROOT) rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec $(AS_ROOT) rm -rf {} +

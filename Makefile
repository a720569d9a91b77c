# make venv    .venv with everything pinned         make demo   prepare data, train the tiny preset on 4 CPU ranks
# make check   ruff and mypy, seconds               make test   every test that needs no GPU
# make bench   the CPU rows of BENCHMARKS.md        make clean  remove what runs and builds leave behind
# make slurm-packages   what the tests on a real Slurm need; part of make test
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: venv demo check test bench clean slurm-packages

# The environment is installed again only when one of these files changes: the key is in the stamp's name.
PINNED_BY := .ci/constraints.txt pyproject.toml setup.py
STAMP := .venv/.installed-$(shell cat $(PINNED_BY) | sha256sum | cut -c1-16)
PYTHON := .venv/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check install -qq --constraint .ci/constraints.txt
SLURM_PACKAGES := slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge iproute2
BENCHES := $(wildcard tests/bench/*.py)
# Ranks are processes: one thread each, or they fight for the cores.
export OMP_NUM_THREADS ?= 1
# A rank that finds no compiled sources compiles all of ours, at every start of a life.
unexport PYTHONDONTWRITEBYTECODE

venv: $(STAMP)

$(STAMP): $(PINNED_BY)
	@command -v python3.11 >/dev/null || { echo "python3.11 is not on PATH: install it (on Debian 12: apt-get install python3.11 python3.11-venv) and run make again"; exit 1; }
	@if ! $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	  echo "creating .venv"; \
	  python3.11 -m venv --clear .venv || { echo "python3.11 cannot create environments: on Debian 12, apt-get install python3.11-venv"; exit 1; }; \
	fi
	@echo "installing the pinned packages into .venv"
	@$(PIP) setuptools wheel
	@$(PIP) --no-build-isolation --editable '.[dev]' || { echo "the install failed; if pip found no torch==2.13.0+cpu, point it at PyTorch's CPU wheel index (see PyTorch's install page)"; exit 1; }
	@rm -f .venv/.installed-*
	@touch $@

demo: venv
	.venv/bin/m1 data demo
	.venv/bin/m1 train tiny

check: venv
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# Two workers, because the smallest machine we test on has two cores; a file's tests stay on one worker. In the order of
# their names: by number of tests, files of one long test would come last, and one worker would wait for the other.
test: venv slurm-packages
	$(PYTHON) -m pytest -m "not gpu and not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations 12

# Debian's own packages; where they cannot be had the tests say so and are skipped, in CI they fail.
slurm-packages:
	@export PATH=$$PATH:/usr/sbin; \
	if type munged slurmctld slurmd srun ip >/dev/null 2>&1; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then echo "no Slurm here, and no root or apt-get to install it"; exit 0; fi; \
	echo "installing Slurm for its tests"; \
	{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $(SLURM_PACKAGES); } \
	  >/dev/null 2>&1 || echo "Slurm could not be installed"

bench: venv
	@for row in $(BENCHES); do echo "== $$row"; $(PYTHON) "$$row"; done

clean:
	rm -rf build dist *.egg-info runs data .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

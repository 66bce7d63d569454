# One command each. `make train` and `make test` set up .venv on first use.
#   VENV=DIR     use (or make) the virtual environment DIR instead of .venv
#   PYTHON=PATH  use that interpreter's environment as it is; nothing is installed
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
VENV ?= .venv

ifdef PYTHON
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

PARTS ?= ops heads step sweeps ladder

.PHONY: train test soak tune bench bench-gpu profile plots gpu-test lint format venv clean

train: $(READY)
	$(PY) -m ibft.cli train $(ARGS)

# More processes than cores starve the judges: their time limits are real.
test: $(READY)
	$(PY) -m pytest -n 2 $(ARGS)

soak: $(READY)
	$(PY) -m pytest -m "not gpu" --hypothesis-profile=soak --durations=10 -v $(ARGS) 2>&1 | $(PY) tests/soak_log.py

tune: $(READY)
	$(PY) -m ibft_kernels.tune --write $(ARGS)

gpu-test: $(READY)
	$(PY) -m pytest -m gpu $(ARGS)

bench: $(READY)
	$(PY) -m pytest benchmarks $(ARGS)

# Each part takes under 8 minutes; what has rows of this commit is left out, so run it again where a part was not done.
#   make bench-gpu PARTS=ladder ARGS="--shape llama3-8b"
bench-gpu: $(READY)
	@status=0; for part in $(PARTS); do \
	  $(PY) -m pytest benchmarks -m gpu --part $$part --resume --budget 420 $(ARGS) || status=$$?; \
	done; exit $$status

profile: $(READY)
	$(PY) -m benchmarks.steps.profile_step $(ARGS)

# From the committed rows: benchmarks/results/<device>/plots/*.svg and the tables of README.md and docs/benchmarks.md.
plots: $(READY)
	$(PY) -m benchmarks.report.plots
	$(PY) -m benchmarks.report.tables

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

venv: $(READY)

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v git >/dev/null || { echo "error: git is missing" >&2; exit 1; }
	@python=; for candidate in python3 python3.13 python3.12 python3.11; do \
	  if $$candidate -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
	  then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "error: no Python 3.11 to 3.13 with venv found (Debian: apt-get install python3 python3-venv)" >&2; exit 1; fi; \
	test -x $(VENV)/bin/python || $$python -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

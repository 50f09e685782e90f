# make train   creates the environment, prepares the data, trains a Mixer and prints test accuracy
# make test    creates the environment and runs the fast tests
SHELL := /bin/bash
CONFIG ?= configs/digits.py
# The first of these commands that is Python 3.11 to 3.13; PYTHON=... overrides it.
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
# What uv finds or downloads where none of them is.
UV_PYTHON := 3.13

.PHONY: train test test-all lint lock clean
train: .venv/installed
	.venv/bin/python train.py --config=$(CONFIG)

# Two processes, because most tests compile small programs, which uses one core. tests/conftest.py
# orders the files; pytest-xdist's own order would start those with the fewest tests last.
test: .venv/installed
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: .venv/installed
	.venv/bin/python -m pytest -n 2 --dist worksteal -m "not tpu_backend and not cuda_backend and not gpu"

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-logo --no-cache

# The stamp is written last, so that make resumes an interrupted installation.
.venv/installed: .venv/bin/pip requirements.txt pyproject.toml
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.venv/bin/pip:
ifneq ($(PYTHON),)
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no ensurepip (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv
else
	@echo "make: no Python 3.11 to 3.13 on PATH; uv makes the environment with Python $(UV_PYTHON)"
	@PATH="$$PATH:$(CURDIR)/.uv/bin"; \
	command -v uv >/dev/null || python3 -m pip install --quiet --disable-pip-version-check --target .uv uv; \
	{ uv venv --quiet --clear --python $(UV_PYTHON) .venv && .venv/bin/python -m ensurepip --default-pip >/dev/null; } || \
	{ rm -rf .venv; echo "make: uv found no Python $(UV_PYTHON) and could not download it; install Python 3.11, 3.12" \
	"or 3.13, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 1; }
endif

# Needs uv. The fixed date makes the lock reproducible. Where a newer release has dropped Python 3.11
# (JAX 0.11, NumPy 2.5), the lock has one version for 3.11 and the newest for 3.12 and 3.13.
lock:
	{ echo '# Exact versions of everything, for Python 3.11 to 3.13. Made from pyproject.toml by `make lock`.'; \
	uv pip compile --universal --fork-strategy requires-python --python-version 3.11 --exclude-newer 2026-11-29 \
		--extra dev --no-header --no-annotate --quiet pyproject.toml; } > requirements.txt.new
	mv requirements.txt.new requirements.txt

clean:
	rm -rf .venv .uv build *.egg-info

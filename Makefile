# `make` lists the targets. Each creates its environment in .venv the first time.
#   make PYTHON=/path/to/python3.12 test    with another Python
#   make DEVICE=cpu demo                    without the NVIDIA libraries (DEVICE=cuda: with them)

BIN = .venv/bin
PYTHONS = python3.13 python3.12 python3.11 python3
DEVICE = $(shell [ `uname -s` = Linux ] && { nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu; })
LEFT_OUT = Not run: the demo, install, interop, e2e, tutorials, docs, and long tests (known optima, large files, panel faults). `make check` runs them.
CHROMIUM = $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

PYTEST = $(BIN)/python -m pytest -q -rs
PARALLEL = -n 2 --dist worksteal
UNITS = tests $(foreach part,install interop demo long e2e site chaos,--ignore=tests/$(part))

.DEFAULT_GOAL = help
.NOTPARALLEL:
.PHONY: help demo test e2e interop install docs site lab check chaos chaos-short nightly clean units demo-result long browser check-rest

help:
	@echo "make demo      pretrain a small Llama, fine-tune it, train a reward model and run PPO (8 minutes on 2 cores)"
	@echo "make lab       open the notebooks in JupyterLab"
	@echo "make test      run the notebooks, the tests and the linters"
	@echo "make e2e       test the panels in a real JupyterLab with a real browser"
	@echo "make interop   compare with mlx-lm, transformers and torch (a large download)"
	@echo "make install   build the package, and test it in new environments (a large download)"
	@echo "make docs      run the tutorials, build the site in _docs/ and README.md"
	@echo "make site      the same, and test its pages in a real browser"
	@echo "make check     run everything above except lab"
	@echo "make chaos     kill, stop and damage training runs at random moments (SEED=17 repeats them)"
	@echo "make nightly   run everything, including tests with many seeds"
	@echo "make clean     remove build results, but not runs, data and .venv"

demo: .venv/.stamp-data
	$(BIN)/python tools/demo.py

lab: .venv/.stamp-dev .venv/.stamp-data
	$(BIN)/jupyter lab nbs/index.ipynb

test: units
	@echo '$(LEFT_OUT)'

# interop, demo, e2e and dev share one environment: each adds packages.
interop: .venv/.stamp-dev .venv/.stamp-interop
	$(PYTEST) $(PARALLEL) tests/interop

docs: .venv/.stamp-dev .venv/.stamp-data
	$(BIN)/python tools/docs.py

check: units check-rest

check-rest: demo-result long install e2e interop site chaos-short

nightly: check chaos
	$(PYTEST) -m nightly tests/long

e2e: .venv/.stamp-dev .venv/.stamp-data browser
	$(PYTEST) tests/e2e

site: docs browser
	$(PYTEST) tests/site

# Debian's browser where it can be installed, else playwright's.
browser: .venv/.stamp-e2e
	@test -n "$(CHROMIUM)" || { test `id -u` = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || $(BIN)/playwright install chromium

# Builds and installs the package as a user would; needs PyPI.
install: .venv/.stamp-dev
	$(PYTEST) tests/install

long: .venv/.stamp-dev
	$(PYTEST) $(PARALLEL) -m "not nightly" --ignore tests/long/test_forecast.py tests/long
	$(PYTEST) -m "not nightly" tests/long/test_forecast.py
	$(PYTEST) $(PARALLEL) -m long $(UNITS)

# Each fault prints the command that repeats it. The short part takes two minutes, all of it six.
CHAOS = $(PYTEST) tests/chaos $(SEED:%=--seed %)

chaos: .venv/.stamp-dev
	$(CHAOS) --rounds 2

chaos-short: .venv/.stamp-dev
	$(CHAOS) -k "kill or signal or mutated or flipped or training"

units: .venv/.stamp-dev .venv/.stamp-data
	$(BIN)/ruff check --quiet
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/notebooks.py execute
	$(BIN)/python tools/notebooks.py sync
	$(PYTEST) $(PARALLEL) -m "not long" $(UNITS)

demo-result: demo .venv/.stamp-dev
	$(PYTEST) tests/demo

clean:
	rm -rf _exec _pages _proc _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find mlx_pretrain nbs tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +

# One stamp per extra. The extra for this machine (cpu, cuda, none on a Mac) is added to each.
.venv/.stamp-%: settings.ini setup.py .venv/bin/python
	@device='$(strip $(DEVICE))'; extras="$${device:+$$device,}$*"; \
	echo "Installing mlx-pretrain[$$extras] into .venv; the first time this takes a few minutes."; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$$extras]"
	@touch $@

# The Python must run, be new enough, and be able to create environments.
.venv/bin/python:
	@for python in $(if $(PYTHON),"$(PYTHON)",$(PYTHONS)); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "Creating .venv with $$("$$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')."; \
	    "$$python" -m venv --clear .venv; exit $$?; \
	  fi; \
	done; \
	echo "mlx-pretrain needs Python 3.11 or newer with venv: install one (macOS: brew install python@3.13; Debian, Ubuntu:" \
	  "apt install python3-venv; others: https://www.python.org/downloads) or name yours with make PYTHON=/path/to/python." >&2; \
	exit 1

# `make` lists what there is. Every target makes its own environment in .venv the first time.
#   make PYTHON=/path/to/python3.12 test    with a Python of your choice
#   make DEVICE=cpu demo                    without the NVIDIA libraries (DEVICE=cuda: with them)

BIN = .venv/bin
PYTHONS = python3.13 python3.12 python3.11 python3
DEVICE = $(shell [ `uname -s` = Linux ] && { nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu; })
LEFT_OUT = `make test` left out the demo, install, interop, e2e, tutorials and docs, and tests that take long (known optima, large files, the panel under attack): run `make check` for all of it.
CHROMIUM = $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

UNITS = tests $(foreach part,install interop demo long e2e site chaos,--ignore=tests/$(part))

.DEFAULT_GOAL = help
.NOTPARALLEL:
.PHONY: help demo test e2e interop install docs site lab check chaos chaos-short nightly clean units demo-result long browser check-rest

help:
	@echo "make demo      train a small Llama on two centuries of speeches, teach it to answer, and align it with a learned reward"
	@echo "make lab       open the notebooks in JupyterLab"
	@echo "make test      run the notebooks, the tests and the checks"
	@echo "make e2e       press the buttons of the panels in a real JupyterLab, with a real browser"
	@echo "make interop   compare with mlx-lm, transformers and torch (a large download)"
	@echo "make install   build the package, and use it from new environments (a large download)"
	@echo "make docs      run the tutorials, and build the site in _docs/ and README.md"
	@echo "make site      the same, and open its pages in a real browser"
	@echo "make check     everything above but lab"
	@echo "make chaos     kill, stop, starve and damage trainings at random moments (SEED=17: the same moments again)"
	@echo "make nightly   everything that takes long and seldom fails"
	@echo "make clean     remove what was built; your runs, data and .venv stay"

demo: .venv/.stamp-data
	$(BIN)/python tools/demo.py

lab: .venv/.stamp-dev .venv/.stamp-data
	$(BIN)/jupyter lab nbs/index.ipynb

test: units
	@echo '$(LEFT_OUT)'

# The environments of interop, demo, e2e and dev are one: each adds to it, none takes away.
interop: .venv/.stamp-dev .venv/.stamp-interop
	$(BIN)/python -m pytest -q -rs tests/interop

docs: .venv/.stamp-dev .venv/.stamp-data
	$(BIN)/python tools/docs.py

check: units check-rest

check-rest: demo-result long install e2e interop site chaos-short

nightly: check chaos
	$(BIN)/python -m pytest -q -rs -m nightly tests/long

e2e: .venv/.stamp-dev .venv/.stamp-data browser
	$(BIN)/python -m pytest -q -rs tests/e2e

site: docs browser
	$(BIN)/python -m pytest -q -rs tests/site

# The browser is Debian's where that can be installed, else the one that playwright fetches.
browser: .venv/.stamp-e2e
	@test -n "$(CHROMIUM)" || { test `id -u` = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || $(BIN)/playwright install chromium

# The package is built and installed as a user would do it; that needs PyPI.
install: .venv/.stamp-dev
	$(BIN)/python -m pytest -q -rs tests/install

long: .venv/.stamp-dev
	$(BIN)/python -m pytest -q -rs -m "not nightly" tests/long
	$(BIN)/python -m pytest -q -rs -m long $(UNITS)

# Each fault prints the command that repeats it alone. The short part takes two minutes, the whole six.
CHAOS = $(BIN)/python -m pytest -q -rs tests/chaos $(SEED:%=--seed %)

chaos: .venv/.stamp-dev
	$(CHAOS) --rounds 2

chaos-short: .venv/.stamp-dev
	$(CHAOS) -k "kill or signal or mutated or flipped or training"

units: .venv/.stamp-dev .venv/.stamp-data
	$(BIN)/ruff check --quiet
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/notebooks.py execute
	$(BIN)/python tools/notebooks.py sync
	$(BIN)/python -m pytest -q -rs -m "not long" $(UNITS)

demo-result: demo .venv/.stamp-dev
	$(BIN)/python -m pytest -q -rs tests/demo

clean:
	rm -rf _exec _pages _proc _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find mlx_pretrain nbs tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +

# One stamp for each extra. The extra for this machine (cpu, cuda, none on a Mac) comes along with every one.
.venv/.stamp-%: settings.ini setup.py .venv/bin/python
	@device='$(strip $(DEVICE))'; extras="$${device:+$$device,}$*"; \
	echo "Installing mlx-pretrain[$$extras] into .venv; the first time this takes a few minutes."; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$$extras]"
	@touch $@

# A name on the PATH proves little: the Python must run, be new enough, and be able to make environments.
.venv/bin/python:
	@for python in $(if $(PYTHON),"$(PYTHON)",$(PYTHONS)); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "Making .venv with $$("$$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')."; \
	    "$$python" -m venv --clear .venv; exit $$?; \
	  fi; \
	done; \
	echo "mlx-pretrain needs Python 3.11 or newer with venv: install one (macOS: brew install python@3.13; Debian, Ubuntu:" \
	  "apt install python3-venv; others: https://www.python.org/downloads) or name yours with make PYTHON=/path/to/python." >&2; \
	exit 1

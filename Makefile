# Everything a reader or a developer runs. Each target may be run again at any time and does only what is left to do.
.DEFAULT_GOAL := help
.PHONY: help setup book test serve notebooks lint lock clean

PYTHON ?= python3
PORT ?= 8000
# On GitHub and Binder: REQUIREMENTS=.binder/requirements.txt, the same lock with the CPU build of torch.
REQUIREMENTS ?= requirements.txt

ROOT := $(shell pwd -P)
VENV := .venv
BIN := $(VENV)/bin
# The stamp is named after what it vouches for, and written last: an interrupted or outdated setup is done again.
KEY := $(shell (echo '$(ROOT)'; cat requirements.txt $(REQUIREMENTS) pyproject.toml) | cksum | tr -d ' ')
READY := $(VENV)/.ready-$(KEY)

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf 'make %-10s %s\n' "$$name" "$$text"; done

setup: $(READY)  ## make .venv with the locked requirements and the package

book: setup  ## run every chapter and build the pages
	@$(BIN)/python tools/build_book.py

test: setup  ## run every test
	@$(BIN)/python -m pytest $(ARGS)

serve: book  ## build the pages and show them on http://localhost:8000 (PORT=...)
	@echo 'The book is on http://localhost:$(PORT)   (stop with Ctrl-C)'
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

notebooks: setup  ## convert the chapters to notebooks for Colab, in _build/notebooks
	@$(BIN)/python tools/make_notebooks.py

lint: setup  ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/mypy

lock: setup  ## resolve requirements.in anew and write requirements.txt
	@$(BIN)/python tools/lock.py $(PYTHON)

clean:  ## delete what was built; the environment and the fetched assets stay
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY):
	@command -v $(PYTHON) >/dev/null || { echo 'There is no command "$(PYTHON)". Install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "The book needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1). Name a newer one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo '$(PYTHON) cannot make virtual environments. On Debian or Ubuntu install them first: apt install python3-venv'; exit 1; }
	@{ grep -qF '$(ROOT)/$(VENV)' $(BIN)/activate && $(BIN)/python -m pip --version; } >/dev/null 2>&1 || { echo 'Making the environment $(VENV) ...'; $(PYTHON) -m venv --clear '$(ROOT)/$(VENV)'; }
	@echo 'Installing the locked requirements: some minutes the first time ...'
	@$(BIN)/python -m pip install --disable-pip-version-check -r $(REQUIREMENTS)
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps -e .
	@rm -f $(VENV)/.ready-*
	@touch $@

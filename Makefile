# `make demo` and `make test` do all the set-up: a virtual environment in .venv, then the command.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test notebooks notebooks-in-place lint types check wheel clean

help:
	@echo "make demo                compare all methods on the embedded characters (a few minutes on 2 cores)"
	@echo "make test                run the test suite"
	@echo "make notebooks           execute the notebooks; the files stay as they are (some minutes on 2 cores)"
	@echo "make notebooks-in-place  execute the notebooks and keep the new outputs"
	@echo "make check               linters, types, import contract"
	@echo "make wheel               build the package into dist/"
	@echo "make clean               remove the virtual environment and what was built"

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/fmlora compare --out runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -q

notebooks: $(VENV)/.installed
	$(BIN)/python notebooks/run.py

notebooks-in-place: $(VENV)/.installed
	$(BIN)/python notebooks/run.py --in-place

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy

check: lint types

wheel: $(VENV)/.installed
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache

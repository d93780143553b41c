# Sets up a virtual environment of its own; needs Python 3.11 or newer and PyPI.
PYTHON ?= python3
VENV = .venv

.PHONY: demo test lint docs notebooks
.DEFAULT_GOAL := test

demo: $(VENV)/ready
	$(VENV)/bin/jaxmerge demo

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n 2 --dist loadgroup

# All of them, one after the other; the tests run the shortest.
notebooks: $(VENV)/ready
	for notebook in notebooks/*.py; do \
		echo $$notebook; \
		MPLBACKEND=agg $(VENV)/bin/python $$notebook > /dev/null || exit 1; \
	done

lint: $(VENV)/ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# Runs the cells of pages that have changed; errors and warnings are failures.
docs: $(VENV)/docs
	$(VENV)/bin/sphinx-build --quiet --fail-on-warning --keep-going $(SPHINXOPTS) docs build/docs
	@echo 'Open build/docs/index.html'

$(VENV)/docs: $(VENV)/ready
	$(VENV)/bin/pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; choose one with: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

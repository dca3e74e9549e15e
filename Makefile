# make quickstart: set everything up, train the SFT recipe on the bundled model
# make test:       set everything up, then run exactly what CI runs, JOBS test files at a time
# make audit:      known vulnerabilities of the pinned versions (asks the package index)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: quickstart test audit clean

quickstart: $(VENV)/installed
	$(BIN)/python -m recipes.sft

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	touch $@

audit: $(VENV)/bin/python
	$(BIN)/pip install -q pip-audit
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info

# make quickstart: set everything up, train the SFT recipe on the bundled model
# make test:       set everything up, then run exactly what CI runs, JOBS test files at a time
# make audit:      known vulnerabilities of the pinned versions (asks the package index)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
# tests/simulated: if-possible skips it where there is no C++ compiler, required fails
export SIMULATED ?= if-possible
# the oldest versions that pyproject.toml allows, for Python up to 3.12; see
# tests/test_dependencies.py
OLDEST := $(VENV)/oldest
# bitsandbytes and torchao, for tests/quantized alone: where they are installed, peft imports them in
# every process, which takes seconds
QUANTIZED := $(VENV)/quantized
# the oldest and the newest tinker SDK the remote backend supports; see tests/remote/test_sdks.py
SDKS := 0.25.0 0.38.0
# an older one whose programs `cookbook serve` serves; see tests/serve/test_sdks.py
SERVED_SDK := 0.16.1
# its own requirements do not resolve together; these are what the tests import of them
COOKBOOK := tinker-cookbook==0.6.1 blobfile==3.3.0 chz==0.4.0 cloudpickle==3.1.2 lxml==6.1.3 \
	termcolor==3.3.0 urllib3==2.8.0 antlr4-python3-runtime==4.13.2 latex2sympy2-extended==1.11.0 \
	math-verify==0.9.0 pylatexenc==2.11

# bytecode is written as modules are imported, not of all 25,000 files; and it is written whatever the
# environment says: a process that finds none compiles 2,500 modules, which takes ten seconds
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/pip install -q --no-compile

.PHONY: quickstart test audit clean

quickstart: $(VENV)/installed
	$(BIN)/python -m recipes.sft

# What needs processes of its own runs beside the other tests, which leave cores idle where they wait;
# its output follows at the end. Files run in their order: xdist's leaves long ones to the end.
test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	{ $(BIN)/basedpyright && $(BIN)/python -m pytest tests/simulated && \
	  QUANTIZED=required PYTHONPATH=$(QUANTIZED) $(BIN)/python -m pytest tests/quantized; } \
	  >$(VENV)/beside.log 2>&1 & beside=$$!; trap 'trap - INT TERM; kill 0' INT TERM; \
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  --ignore tests/simulated --ignore tests/quantized; main=$$?; \
	wait $$beside; beside=$$?; cat $(VENV)/beside.log; [ $$main$$beside = 00 ]

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python scripts/install_torch.py constraints.txt
	$(INSTALL) -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed constraints-oldest.txt constraints-lm-eval.txt
	$(INSTALL) -c constraints.txt -e ".[test]"
	$(INSTALL) --no-deps --upgrade --target $(QUANTIZED) -c constraints.txt \
	  bitsandbytes torchao
	rm -rf $(OLDEST)
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then \
	  grep -v '^torch==' constraints-oldest.txt >$(VENV)/oldest.txt && \
	  $(INSTALL) --no-deps --target $(OLDEST) -r $(VENV)/oldest.txt && \
	  $(BIN)/python scripts/install_torch.py --cpu --target $(OLDEST) \
	    constraints-oldest.txt constraints.txt; \
	fi
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  for v in $(SERVED_SDK) $(SDKS); do \
	    $(INSTALL) --no-deps --upgrade --target $(VENV)/sdk/$$v tinker==$$v || exit 1; \
	  done; \
	  $(INSTALL) --no-deps --upgrade --target $(VENV)/sdk/$(lastword $(SDKS)) $(COOKBOOK) && \
	  $(INSTALL) --no-deps --upgrade --target $(VENV)/lm_eval -r constraints-lm-eval.txt; \
	fi
	touch $@

audit: $(VENV)/bin/python
	$(INSTALL) pip-audit
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info

# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Needs Python 3.11 or newer, git and a C compiler.

# The first interpreter that runs and is new enough (a name on the PATH may be an empty shim).
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PY := $(VENV)/bin/python
export PYTHONDONTWRITEBYTECODE ?= 1

.PHONY: demo test lint types unit interpreter docs slow gpu clean help

help:
	@echo "make demo   install, compare exact and approximate attention on a book, write an HTML report"
	@echo "make test   install, run lint, types and the whole CPU test suite"
	@echo "make slow   tests of minutes and tests with pretrained weights"
	@echo "make gpu    tests that need a CUDA device"
	@echo "make docs   build the documentation into site/"
	@echo "make clean  remove the environment and caches"

demo: $(VENV)/demo.done
	$(VENV)/bin/longspan compare $(DEMO_ARGS)

test: $(VENV)/test.done
	@$(MAKE) --no-print-directory lint types unit interpreter docs

lint: $(VENV)/test.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/test.done
	$(VENV)/bin/mypy

unit: $(VENV)/test.done
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not models" tests

interpreter: $(VENV)/test.done
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --dist worksteal tests/interpreter

slow: $(VENV)/test.done
	$(PY) -m pytest -m "slow or models" tests

gpu: $(VENV)/test.done
	$(PY) -m pytest -m gpu tests

docs: $(VENV)/test.done
	DISABLE_MKDOCS_2_WARNING=true $(VENV)/bin/mkdocs build --strict --quiet

# A CPU machine gets the CPU build of torch; a torch that is already there is kept. Where the
# system Python has a torch (an existing GPU machine), the environment sees it.
$(VENV)/created: tools/make_venv.sh
	PYTHON="$(PYTHON)" tools/make_venv.sh "$(VENV)"
	@touch $@

$(VENV)/demo.done: $(VENV)/created pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[hf,cli,report]"
	@touch $@

$(VENV)/test.done: $(VENV)/demo.done pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(PY) -m pip install --quiet --disable-pip-version-check --group test --group dev --group docs
	@touch $@

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis

# make train       trains palm_tiny (about five minutes on two cores)
# make test        the fast tests; make test-slow: the others
# make lint        what CI checks of the style
# make constraints pins the versions that .venv holds now
#
# .venv is made when it is missing, and again when setup.cfg or constraints.txt change.

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
SLOW ?= slow
MODEL_DIR ?= runs/palm_tiny

.PHONY: train test test-slow lint constraints bench clean
.DELETE_ON_ERROR:

train: $(STAMP)
	$(BIN)/t5x train --gin_file=palm_tiny.gin --gin.MODEL_DIR=$(MODEL_DIR)

test: $(STAMP)
	$(BIN)/python -m pytest -q -m 'not slow' $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "$(SLOW)" $(PYTEST_ARGS) || test $$? -eq 5

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

constraints: $(STAMP)
	$(BIN)/python -m pip freeze --exclude palm_t5x --exclude-editable > constraints.txt

bench: $(STAMP)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMP): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
	       "Name another one: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade -c constraints.txt -e '.[dev]'
	@touch $@

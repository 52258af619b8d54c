# Everything starts from a bare clone: Python 3.11 or newer and a C compiler are all that must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest
WORKERS ?= 2

.PHONY: env demo test test-slow parity lint clean

env: $(READY)

# torch first and pinned: any other order lets pip pick a build of its own taste, several gigabytes larger.
$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rankalign needs Python 3.11 or newer; name one: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/rankalign run --config eval/configs/demo.yaml $(DEMO_FLAGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

parity: $(READY)
	$(BIN)/python -m tests.numerics.parity

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rankalign

clean:
	rm -rf $(VENV) build *.egg-info

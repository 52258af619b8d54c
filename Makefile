# Everything starts from a bare clone: Python 3.11 or newer and a C compiler are all that must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.dev
VLLM := .venv-vllm
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/python -m pytest
WORKERS ?= 2

.PHONY: env dev wheel demo test test-gpu test-slow test-vllm parity support docs lint clean

env: $(READY)
dev: $(DEV)

# torch first and pinned: any other order lets pip pick a build of its own taste, several gigabytes larger.
$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rankalign needs Python 3.11 or newer; name one: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[demo]'
	touch $(READY)

$(DEV): $(READY)
	$(PIP) -e '.[dev]'
	touch $(DEV)

# From nothing but the files: an older build folder would put modules that are gone into the wheel.
wheel:
	rm -rf build/lib build/bdist*
	$(PYTHON) -m pip wheel -q --disable-pip-version-check --no-deps -w dist .

demo: $(READY)
	$(BIN)/rankalign run --config eval/configs/demo.yaml $(DEMO_FLAGS)

test: $(DEV)
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) -m "not slow" --ignore tests/gpu
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) tests/gpu

# On the machine's own card, or a pretended one where there is none; `test` contains it.
test-gpu: $(DEV)
	OMP_NUM_THREADS=1 $(PYTEST) tests/gpu

test-slow: $(DEV)
	$(PYTEST) -m slow

# vLLM pins another transformers than ours, so it gets an environment of its own (3 GB, a few minutes).
test-vllm: $(VLLM)/.ready
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/unit/test_contracts.py -k "engine and vllm"

$(VLLM)/.ready: tests/vllm/environment.sh setup.cfg constraints.txt
	PYTHON=$(PYTHON) tests/vllm/environment.sh $(VLLM)
	touch $@

parity: $(DEV)
	$(BIN)/python -m tests.numerics.parity

support: $(DEV)
	$(BIN)/python -m tests.e2e.support

docs: $(DEV)
	$(BIN)/python -m docs.reference
	$(BIN)/python -m docs.loss_defaults
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rankalign benchmarks

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info

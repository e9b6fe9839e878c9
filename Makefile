# Every target works as the only command on a fresh machine with Python ≥ 3.10 and pip: it makes .venv,
# installs what is needed (again only when pyproject.toml or constraints.txt changed) and runs.
#
#   make demo       the main job on real data; pictures in demo/
#   make test       the tests that need no GPU
#   make check      formatter, linter, strict types, tests
#   make test-gpu   the GPU tests, with the packages of the current interpreter
#   make fuzz       100,000 senseless inputs to a live store (a nightly job's; minutes)
#   make bench      measurements as ratios to plain copies
#   make fmt        format the code
#   make clean      remove what the other targets made
#
# Variables: PYTHON=python3.11  VENV=.venv  TORCH_INDEX=<URL>  ARGS='arguments for pytest, demo or bench'

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Nothing here ever needs a model hub; a missing file must fail at once instead of asking the network.
export HF_HUB_OFFLINE = 1

.PHONY: demo test check lint test-gpu fuzz bench fmt clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt tools/make_venv.sh
	PYTHON="$(PYTHON)" tools/make_venv.sh $(VENV) dev
	touch $@

demo: $(STAMP)
	$(BIN)/python -m weightstore demo --out demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

check: lint test

test-gpu:
	$(PYTHON) -m pytest -m gpu $(ARGS)

fuzz: $(STAMP)
	WEIGHTSTORE_FUZZ_INPUTS=$(or $(INPUTS),100000) $(BIN)/python -m pytest -s tests/test_protocol_fuzz.py $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m bench $(or $(ARGS),host)

fmt: $(STAMP)
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target sets up what it needs by itself: Python >= 3.11 and the package index are enough. `make help` lists them.
VENV ?= .venv
PYTEST_ARGS ?=
RUFF := --config .ci/ruff.toml
PY := $(VENV)/bin/python
# One benchmark a file: those that can be run. The demo has its own target; load_sides is a part of load.
BENCHMARKS := $(basename $(notdir $(shell grep -l '^if __name__ == "__main__"' benchmarks/*.py 2>/dev/null)))
BENCHMARKS := $(filter-out vcc_demo load_sides,$(BENCHMARKS))

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-cuda-compile lint format bench clean setup-demo setup-test

help:
	@echo "make demo    train VCC and its dense twin on long real text; ends with a table and runs/demo/report.html"
	@echo "make test    lint, then the tests (PYTEST_ARGS='-m \"not slow and not long\"' for the fast ones)"
	@echo "make test-long  before a release: trainings to the end, kills by the dozen, every further size"
	@echo "make test-cuda-compile  compile the kernels for an H200, without one (sets up .venv-cuda, 5 GB)"
	@echo "make lint    ruff, the import floors, the size and cycle bars"
	@echo "make format  let ruff rewrite the layout of the code"
	@echo "make bench   every benchmark in benchmarks/, one after the other"
	@echo "make clean   remove environments, caches and build/; runs/ stays"
	@echo
	@echo "Set-up is done by itself, in $(VENV). PYTHON=/path/to/python3.12 chooses the interpreter, VENV=dir the place."
	@echo "The tests compare with PyTorch. If the index has no CPU build of it, this keeps CUDA packages away:"
	@echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test"

setup-demo:
	@.ci/setup_venv $(VENV) data,docs

setup-test:
	@.ci/setup_venv $(VENV) data,docs,test

demo: setup-demo
	@$(PY) -m benchmarks.vcc_demo

# The compiler for NVIDIA GPUs comes with jax's CUDA packages, which nothing else here needs; it needs no GPU.
test-cuda-compile:
	@.ci/setup_venv .venv-cuda cuda,test
	@.venv-cuda/bin/python -m pytest -k h200 tests/kernels_pallas

# Tests run even when lint fails, so that one run shows everything; either makes the target fail.
test: setup-test
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	$(PY) -m pytest -m "not long" $(PYTEST_ARGS) || status=1; \
	exit $$status

# Programs that run for minutes are worth optimising, which tests else leave out.
test-long: setup-test
	@XLA_FLAGS= $(PY) -m pytest -m long $(PYTEST_ARGS)

lint: setup-test
	@status=0; \
	$(PY) -m ruff check $(RUFF) . || status=1; \
	$(PY) -m ruff format --check $(RUFF) . || status=1; \
	$(PY) -c 'from importlinter.cli import lint_imports_command as run; run(["--no-logo"])' || status=1; \
	$(PY) .ci/size_bars.py || status=1; \
	if [ $$status = 0 ]; then echo "lint: passed"; else echo "lint: FAILED"; fi; \
	exit $$status

format: setup-test
	@$(PY) -m ruff check --fix $(RUFF) . ; $(PY) -m ruff format $(RUFF) .

bench: setup-demo
	@set -e; for name in $(BENCHMARKS); do echo "--- benchmarks.$$name"; $(PY) -m benchmarks.$$name; done

clean:
	rm -rf .venv .venv-3.* .venv-cuda .venv*.lock build .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

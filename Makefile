# On a new machine `make demo` and `make test` are enough: both set up .venv first.
# GPU=cuda|rocm|vulkan|metal builds llama.cpp for that backend; PYTHON=python3.12 picks the interpreter.

BIN := .venv/bin

.PHONY: help setup test demo lint check bench bench-sessions soak clean

help:
	@echo "make setup [GPU=cuda|rocm|vulkan|metal]   .venv with everything in it"
	@echo "make demo                                 see a context survive a crash, in a throw-away home"
	@echo "make test                                 the test suite"
	@echo "make check                                format, lint, types, import contracts, size, tests"
	@echo "make bench                                the measurements of docs/BENCHMARKS.md"
	@echo "make bench-sessions                       many users with and without the tiers: docs/SESSIONS.md"
	@echo "make soak                                 an hour of mixed load, hang-ups and engine kills; MINUTES=5 for less"
	@echo "make clean                                remove .venv and every cache"

setup:
	@PYTHON="$(PYTHON)" scripts/setup.sh $(GPU)

test: setup
	@$(BIN)/python -m pytest tests --ignore=tests/bench

demo: setup
	@$(BIN)/kvctl demo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/size_report.py

check: lint test

bench: setup
	@$(BIN)/python -m tests.bench

bench-sessions: setup
	@$(BIN)/python -m tests.bench.sessions

soak: setup
	@$(BIN)/python -m tests.bench.soak --minutes $(or $(MINUTES),60)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

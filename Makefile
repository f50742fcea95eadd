# Every target sets itself up (recipes/setup_cpu.sh skips what is there).
VENV ?= $(CURDIR)/.venv
export VENV

.PHONY: setup test fast e2e lint bench
setup:
	bash recipes/setup_cpu.sh

test: setup lint  ## everything: unit tests, then the end-to-end runs one at a time
	$(VENV)/bin/python -m pytest

fast: setup  ## without the end-to-end runs
	$(VENV)/bin/python -m pytest -m "not slow"

e2e: setup
	$(VENV)/bin/python -m pytest -m e2e -s

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: setup
	$(VENV)/bin/python benchmarks/bench_advantage.py

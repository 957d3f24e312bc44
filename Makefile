# Each target makes .venv and installs what it needs when it is missing; a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo study test test-eval lint format clean

demo: $(INSTALLED)  ## a small GLA and a small Mamba2, pre-trained, expanded, post-trained, measured; writes runs/demo
	$(BIN)/statex run recipes/demo.toml

study: $(INSTALLED)  ## the same with five seeds; writes runs/cpu-study
	$(BIN)/statex run recipes/cpu-study.toml

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

test-eval: $(INSTALLED)  ## the tests that run lm-eval, with the extra [eval]; `make test` skips them without it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,eval]'
	$(BIN)/python -m pytest -q tests/evaluation/test_harness.py tests/models/test_lm_eval.py tests/test_cli.py

lint: $(INSTALLED)  ## style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

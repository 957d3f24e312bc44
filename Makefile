# Each target makes .venv and installs what it needs when it is missing; a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo study test lint format clean

demo: $(INSTALLED)  ## a small GLA and a small Mamba2, pre-trained, expanded, post-trained, measured; writes runs/demo
	$(BIN)/statex run recipes/demo.toml

study: $(INSTALLED)  ## the same with three seeds; writes runs/cpu-study
	$(BIN)/statex run recipes/cpu-study.toml

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

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

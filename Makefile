# Each target makes .venv and installs what it needs when it is missing; a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What the tests need beside the package; the lock and the environments at both ends of the ranges have the same
EXTRAS := dev,eval
PYTEST := python -m pytest -n 2 --dist worksteal -q
# The tests of `test-newest` and `test-oldest`, and versions that they must take: make test-newest PIN='torch==2.14.1'
TESTS ?= tests
PIN ?=

.PHONY: demo study test test-newest test-oldest lint format lock clean

demo: $(INSTALLED)  ## a small GLA and a small Mamba2, pre-trained, expanded, post-trained, measured; writes runs/demo
	$(BIN)/statex run recipes/demo.toml

study: $(INSTALLED)  ## the same with five seeds; writes runs/cpu-study
	$(BIN)/statex run recipes/cpu-study.toml

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/$(PYTEST)

test-newest: .venv-newest/.installed  ## the suite on the newest release of everything, whatever the caps of pyproject.toml
	.venv-newest/bin/$(PYTEST) $(TESTS)

test-oldest: .venv-oldest/.installed  ## the suite on the lower bounds of pyproject.toml
	.venv-oldest/bin/$(PYTEST) $(TESTS)

lint: $(INSTALLED)  ## style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(INSTALLED)  ## make constraints.txt anew: the newest of everything within the ranges of pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.11 \
		--extra dev --extra eval --extra triton --constraint constraints.in --output-file constraints.txt

# setuptools comes from the lock too, which an isolated build would not look at. The CPU build of PyTorch suffices
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	touch $@

.venv-newest/.installed: SETTINGS = --resolution highest
.venv-oldest/.installed: SETTINGS = --resolution lowest-direct
# Without upper bounds for the newest; the oldest are the lower bounds themselves
.venv-newest/pyproject.toml: pyproject.toml
	mkdir -p $(@D)
	sed -E 's/,<[0-9.]+"/"/' pyproject.toml > $@
.venv-oldest/pyproject.toml: pyproject.toml
	mkdir -p $(@D)
	cp pyproject.toml $@

.venv-%/.installed: .venv-%/pyproject.toml $(INSTALLED)
	printf '%s\n' $(PIN) > $(@D)/pin.txt
	$(BIN)/uv pip compile $< --quiet --extra dev --extra eval --python-version 3.11 $(SETTINGS) \
		--constraint $(@D)/pin.txt --output-file $(@D)/constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt torch setuptools
	$(@D)/bin/python -m pip install --quiet --requirement $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:  ## remove the virtual environments and caches; runs/ stays
	rm -rf .venv .venv-newest .venv-oldest .pytest_cache .ruff_cache .mypy_cache

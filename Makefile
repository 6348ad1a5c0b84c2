# Everything runs in its own environment, .venv. For a GPU build of torch:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
PYTHON ?= python3
VENV   ?= .venv
# torch is installed first, so that the version is yours to choose and nothing else picks it
TORCH  ?= torch==2.13.0
# processes that share the tests, a file each; 0 for none but pytest's own
WORKERS ?= 2

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
BASE  := $(VENV)/.installed-base

.PHONY: demo test clients lint check docs install wheel clean

install: $(STAMP)

# what a user installs, without the tools of development
$(BASE): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(STAMP): $(BASE)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(BASE)
	$(BIN)/sparsessm demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# runtimes of others that read what is saved, in an environment of their own
CLIENTS := .venv-clients
$(CLIENTS)/.installed:
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet "mlx[cpu]" mlx-lm==0.32.2
	touch $@

clients: $(STAMP) $(CLIENTS)/.installed
	$(BIN)/python -m pytest -q -rs tests/clients

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test docs

# the site, in build/site; a broken link or a public object without a docstring is an error
$(VENV)/.installed-docs: $(BASE)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs --quiet build --strict

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(CLIENTS) build dist .pytest_cache .mypy_cache .ruff_cache

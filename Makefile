# gemma-mtp. Every target sets up what it needs, and no more.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check install --quiet
# What is installed: to convert and generate; on top of that to test, to check, and to make wheels.
READY  := $(VENV)/.ready
TESTS  := $(VENV)/.ready-test
TOOLS  := $(VENV)/.ready-check
WHEEL  := $(VENV)/.ready-wheel

.DEFAULT_GOAL := help
.PHONY: help setup native ui wheel demo test check fix bench bench-long bench-many bench-slots bench-convert check-patches check-kernels check-arm check-formats check-stock \
        check-ollama check-clients check-same-text check-same-calls check-schema-answers check-many-lines check-distribution check-coupling check-invariance fuzz clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed; set PYTHON=")'
	@$(PYTHON) -m venv $(VENV)

# The patched llama-cpp-python goes in first, so that pip never builds the stock one for an extra that asks for it.
$(READY): pyproject.toml | native
	@echo "installing the Python packages"
	@$(PIP) "setuptools>=77"
	@$(PIP) --no-build-isolation -e '.[convert]'
	@touch $@

$(TESTS): tests/install.py $(READY)
	@$(BIN)/python tests/install.py
	@touch $@

$(TOOLS): $(READY)
	@echo "installing mypy and ruff"
	@$(PIP) --no-build-isolation -e '.[check]'
	@touch $@

$(WHEEL): $(READY)
	@echo "installing auditwheel"
	@$(PIP) --no-build-isolation -e '.[wheel]'
	@touch $@

setup: $(READY) ## virtual environment, patched llama-cpp-python, this package

native: $(BIN)/python ## build (or take from the cache) and install the patched llama-cpp-python
	@$(BIN)/python patches/build.py install

ui: $(BIN)/python ## build the web page of llama-server, with Node 20 or later
	@$(BIN)/python patches/build.py ui

wheel: $(WHEEL) ## our wheel, and llama-cpp-python's with kernels for every CPU of this architecture, into dist/
	@rm -rf build/lib build/bdist.*
	@$(BIN)/pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . && ls dist/gemma_mtp-*.whl
	@$(BIN)/python patches/build.py wheel --portable dist

demo: $(READY) ## convert the bundled pair, generate with and without MTP, show the proof
	@$(BIN)/python tests/demo.py

test: $(TESTS) ## all tests
	@$(BIN)/python -m pytest

check: $(TOOLS) build/types/gemma_mtp ## ruff and mypy, over the tests too
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@MYPYPATH=build/types $(BIN)/mypy -p gemma_mtp.convert -p gemma_mtp.runtime -p gemma_mtp.patches
	@MYPYPATH=build/types:tests $(BIN)/mypy tests

# mypy finds a namespace package by its folder, which only exists as a mapping in pyproject.toml.
build/types/gemma_mtp:
	@mkdir -p $@ && for half in convert runtime patches; do ln -sfn ../../../$$half $@/$$half; done

fix: $(TOOLS) ## let ruff format and mend
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

bench: $(READY) ## speed of the bundled pair with and without MTP
	@$(BIN)/python tests/demo.py --bench

check-patches: $(BIN)/python ## apply, re-export and compile every prefix of the patch series
	@$(BIN)/python patches/build.py check

check-kernels: $(TESTS) ## build libggml for other instruction sets and compare its kernels with llama.cpp's
	@$(BIN)/python patches/build.py kernels
	@$(BIN)/python -m pytest tests/patches/test_kernels.py

check-stock: $(TESTS) ## build the unpatched llama.cpp and drive it with a converted pair
	@$(BIN)/python patches/build.py stock
	@$(BIN)/python -m pytest -m stock

check-ollama: $(TESTS) ## models with drafters in a real Ollama, OLLAMA=/path/to/ollama
	@test -x "$(OLLAMA)" || { echo "error: this needs an Ollama of 0.30.10 or later: make check-ollama OLLAMA=/path/to/ollama"; exit 1; }
	@OLLAMA="$(abspath $(OLLAMA))" $(BIN)/python -m pytest -m ollama tests/convert/ollama

check-clients: $(READY) ## the smallest program of each client library against `gemma-mtp serve`
	@$(BIN)/python tests/clients/check.py

check-same-text: $(TESTS) ## answers of `gemma-mtp serve` with drafts and without, alone and four at once
	@$(BIN)/python tests/same_text.py

check-same-calls: $(TESTS) ## answers of `Llama` whatever was asked before, with caches, in batches, drafting any number
	@$(BIN)/python tests/same_calls.py

check-schema-answers: $(TESTS) ## 900 answers of `Llama` under schemas and with tools, at temperature 1
	@$(BIN)/python tests/schema_answers.py

check-many-lines: $(TESTS) ## 10,000 lines of `gemma-mtp run --jsonl`, killed twice: each is answered once, memory stays
	@$(BIN)/python tests/many_lines.py

check-arm: $(BIN)/python ## build libggml for ARM and test what the series touches there, under emulation
	@$(BIN)/python patches/build.py arm

check-formats: $(TESTS) ## every format of every size, with and without importance matrix, against llama-quantize
	@$(BIN)/python -m pytest -q -s -m formats tests/convert/test_formats.py

bench-convert: $(TESTS) ## time, memory and bytes of a conversion beside upstream's two steps
	@$(BIN)/python tests/bench_convert.py

bench-many: $(TESTS) ## tokens per second of many prompts at once, at 1 to 8 sequences, with MTP and without
	@$(BIN)/python tests/bench_many.py --acceptance 0.6

bench-slots: $(TESTS) ## tokens per second of llama-server with 1, 2 and 4 slots, drafts of fixed lengths and "auto"
	@$(BIN)/python tests/bench_slots.py

bench-long: $(TESTS) ## what a token of a long answer costs by each way of asking, beside `generate`
	@$(BIN)/python tests/bench_long.py

check-distribution: $(TESTS) ## draw 600,000 times with MTP and compare with the target's distribution
	@$(BIN)/python -m pytest -s -m distribution

check-coupling: $(READY) ## acceptance of coupled and greedy drafts at a temperature, beside the bound
	@$(BIN)/python tests/coupling.py

check-invariance: $(TESTS) ## 300 tokens alone and in batches of up to 512: the same logits, at the shape of E2B too
	@$(BIN)/python -m pytest -m invariance tests/patches/test_kernels.py

.PHONY: gpu-kit check-gpu-kit
gpu-kit: $(READY) ## one archive that checks and measures CUDA on a machine without network (docs/gpu.md)
	@$(BIN)/python tests/gpu_kit.py

check-gpu-kit: $(TESTS) ## run the packed GPU kit here, from its archive, without network
	@$(BIN)/python -m pytest -s -m kit tests/patches/test_gpu_kit.py

fuzz: $(TESTS) ## mutated GGUF and safetensors files against the readers, FUZZ_SECONDS long (60)
	@nice -n 19 $(BIN)/python tests/fuzz_headers.py --seconds $(or $(FUZZ_SECONDS),60) --seed $(or $(FUZZ_SEED),0)

.PHONY: fuzz-server soak
fuzz-server: $(TESTS) ## odd requests against `gemma-mtp serve`, FUZZ_REQUESTS of them (5000)
	@nice -n 19 $(BIN)/python tests/fuzz_server.py --count $(or $(FUZZ_REQUESTS),5000) --first $(or $(FUZZ_FIRST),0)

soak: $(TESTS) ## eight clients at `gemma-mtp serve` for SOAK_MINUTES (10), then SIGTERM in the midst of them
	@$(BIN)/python tests/soak_server.py --minutes $(or $(SOAK_MINUTES),10)

clean: ## remove the environment and build outputs of this checkout
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

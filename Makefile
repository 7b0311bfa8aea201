# `make demo` and `make test` set up .venv by themselves; nothing else has to be installed by hand.
SHELL := /bin/bash
PYTHON := .venv/bin/python
# Quick ones first. A part of them: make test TESTS=tests/unit/data PYTEST_ARGS='-x -k packing'
TESTS := $(wildcard tests/unit tests/parity tests/invariant tests/distributed tests/gpu)
PYTEST_ARGS ?=
# Only these: other tests may import what .venv-next has not.
NEXT_TESTS = $(sort $(shell grep -rl --include='test_*.py' 'pytest\.mark\.next_core' tests))
BALANCE_BENCHES := balance packing spreading planner real
DATA_BENCHES := packing_speed packed_training images
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup demo story test test-full test-serve test-next test-video check check-recipes bench bench-balance bench-checkpoint bench-data bench-precision bench-train clean

help:
	@echo 'make demo       train, export and question a tiny model on real images, on the CPU'
	@echo 'make story      the same kind of model from random weights to preferences: contrastive, projector, LoRA, DPO'
	@echo 'make test       the tests: pairwise choice of layouts'
	@echo 'make test-full  the tests: every layout'
	@echo 'make test-serve exported directories behind vLLM, in an environment of its own (some GB)'
	@echo 'make test-next  parity, layouts and checkpoints with the newest megatron-core, on Python 3.12, in an environment'
	@echo '                of its own (some GB)'
	@echo 'make test-video pixels of videos against the processors that need torchvision, in an environment of its own'
	@echo 'make check      lint, format, types'
	@echo 'make check-recipes  recipes of real size: they divide, every rank is built, memory fits (no GPU, no weights)'
	@echo 'make bench      all benches (bench-balance: places of the encoder, simulated and real; packing; spreading;'
	@echo '                bench-checkpoint: conversion, asynchronous saves; bench-data: packing, training on packed rows, images)'
	@echo 'make bench-precision  the demo in bf16 and with emulated FP8 (three times the demo, or more)'
	@echo 'make setup      .venv alone'
	@echo 'make clean      remove caches and build folders; .venv and runs/ stay'

setup:
	@tools/setup_env.sh

demo:
	@start=$$(date +%s%N) && tools/setup_env.sh && took_ms=$$((($$(date +%s%N) - start) / 1000000)) && \
	SETUP_S=$$(printf '%d.%03d' $$((took_ms / 1000)) $$((took_ms % 1000))) $(PYTHON) examples/demo.py

story: setup
	@examples/story.sh

test: setup
	$(TEST_ENV) $(PYTHON) -m pytest $(TESTS) $(PYTEST_ARGS)

test-full: setup
	$(TEST_ENV) MEGAVLM_FULL_MATRIX=1 $(PYTHON) -m pytest $(TESTS) $(PYTEST_ARGS)

test-serve: setup
	@tools/setup_serve_env.sh
	$(TEST_ENV) $(PYTHON) -m pytest tests/serve $(PYTEST_ARGS)

# Every family against transformers, checkpoints, some layouts and resumes, and runs of the command line: the tests that
# are marked next_core. Figures stay with the reference stack.
test-next:
	@tools/setup_next_env.sh
	$(TEST_ENV) MEGAVLM_NO_EVIDENCE=1 .venv-next/bin/python -m pytest $(NEXT_TESTS) -m next_core $(PYTEST_ARGS)

test-video:
	@tools/setup_video_env.sh
	$(TEST_ENV) PYTHONPATH=tests/serve MEGAVLM_NO_EVIDENCE=1 .venv-video/bin/python -m pytest tests/video $(PYTEST_ARGS)

check: setup
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

check-recipes: setup
	$(TEST_ENV) $(PYTHON) tools/check_recipes.py

bench: bench-balance bench-checkpoint bench-data bench-train

# All of them, also when one misses its figure.
bench-balance: setup
	@failed=0; for bench in $(BALANCE_BENCHES); do $(TEST_ENV) $(PYTHON) -m benchmarks.$$bench || failed=1; done; exit $$failed

bench-checkpoint: setup
	@failed=0; for bench in checkpoint "saving --plain" saving; do $(TEST_ENV) $(PYTHON) -m benchmarks.$$bench || failed=1; \
	done; exit $$failed

bench-data: setup
	@failed=0; for bench in $(DATA_BENCHES); do $(TEST_ENV) $(PYTHON) -m benchmarks.$$bench || failed=1; done; exit $$failed

bench-precision: setup
	$(TEST_ENV) $(PYTHON) -m benchmarks.precision

bench-train: setup
	$(TEST_ENV) $(PYTHON) -m benchmarks.train_step

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find megavlm tests examples tools -type d \( -name __pycache__ -o -name .ruff_cache \) -prune -exec rm -rf {} +

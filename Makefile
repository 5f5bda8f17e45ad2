# Two commands for a fresh machine with Python >= 3.11, gcc and a package index:
#   make quickstart   corpus -> tokenizer -> training -> checkpoint -> text, a picture and a Hugging Face folder
#   make test         the whole test suite
# and, after the quickstart, make finetune: conversations -> fine-tuning -> a Hugging Face folder that answers
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
DATA := $(RUN)/data
PROMPT := class Reader:
TUNED := runs/finetune_quickstart
QUESTION := What does json.loads do?

NUM_GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
ifeq ($(NUM_GPUS),0)
# no NVIDIA driver: the CPU build, and Triton for its interpreter; two processes share the cores
TORCH_PACKAGES := torch==2.13.0 triton==3.6.0 --extra-index-url https://download.pytorch.org/whl/cpu --retries 1
PROCESSES ?= 2
else
# the release that brings Triton 3.6, which the kernels were measured with
TORCH_PACKAGES := torch==2.11.0
PROCESSES ?= $(shell [ $(NUM_GPUS) -ge 2 ] && echo 2 || echo 1)
endif

# two single-threaded processes are what two cores can run
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart finetune test lint docs env chaos tensorboard

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet $(TORCH_PACKAGES)
	# DeepSpeed looks at the installed torch while it builds
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

$(DATA)/corpus/manifest.json: | $(VENV)/.installed
	@echo "== 1. corpus: the Python standard library's sources and documentation"
	$(BIN)/python -m data_tools.make_corpus --stdlib --output $(DATA)/corpus

$(DATA)/tokenizer.model: $(DATA)/corpus/manifest.json
	@echo "== 2. tokenizer"
	$(BIN)/python -m data_tools.train_tokenizer --input $(DATA)/corpus --vocab-size 4096 --output $@

$(DATA)/manifest.json: $(DATA)/tokenizer.model
	@echo "== 3. tokens: train and validation, split by document"
	$(BIN)/python -m data_tools.tokenize_corpus --input $(DATA)/corpus --tokenizer $< --output $(DATA)

quickstart: $(DATA)/manifest.json
	@echo "== 4. training: DashAttention in every layer, $(PROCESSES) processes, ZeRO 1"
	$(BIN)/python train.py --processes $(PROCESSES) --config configs/quickstart.yaml
	@echo "== 5. the model continues a prompt"
	$(BIN)/python -m dash_megatron sample $(RUN) --prompt "$(PROMPT)" --max-new-tokens 100
	@echo "== 6. losses and per-layer density"
	$(BIN)/python -m dash_megatron study plot-run $(RUN)
	@echo "== 7. export to $(RUN)/hf, and a text from there through transformers alone"
	rm -rf $(RUN)/hf
	$(BIN)/python -m dash_megatron convert to-hf $(RUN) $(RUN)/hf --dtype float32
	$(BIN)/python examples/generate.py $(RUN)/hf --prompt "$(PROMPT)"

$(TUNED)/data/manifest.json: $(DATA)/tokenizer.model
	@echo "== 1. conversations about the standard library, of which the answers alone are learnt"
	mkdir -p $(TUNED)/data
	$(BIN)/python examples/stdlib_chats.py > $(TUNED)/data/chats.jsonl
	$(BIN)/python -m data_tools.tokenize_corpus --conversations --input $(TUNED)/data/chats.jsonl --tokenizer $< --output $(TUNED)/data

finetune: $(TUNED)/data/manifest.json
	@echo "== 2. fine-tuning of $(RUN), which make quickstart trained"
	$(BIN)/python train.py --processes $(PROCESSES) --config configs/finetune_quickstart.yaml
	@echo "== 3. export to $(TUNED)/hf, and an answer from there through transformers alone"
	rm -rf $(TUNED)/hf
	$(BIN)/python -m dash_megatron convert to-hf $(TUNED) $(TUNED)/hf --dtype float32
	$(BIN)/python examples/generate.py $(TUNED)/hf --chat --prompt "$(QUESTION)" --temperature 0

# what only tests need: exports are scored by lm-eval, which brings fifty packages, and runs are shown by wandb
$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation 'lm-eval[hf]' wandb
	@touch $@

# tests of several processes and of SLURM wait more than they compute: three workers keep two cores busy
test: $(VENV)/.tested
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal

# faults of all kinds, each of which a run must survive as if it had not happened: 13 minutes on two cores
chaos: $(VENV)/.installed
	$(BIN)/python -m tests.chaos

# on this machine only: TensorBoard has no passwords
tensorboard: $(VENV)/.installed
	$(BIN)/tensorboard --host 127.0.0.1 --logdir runs

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

docs: $(VENV)/.installed
	$(BIN)/python -m docs.tools.configuration > docs/configuration.md

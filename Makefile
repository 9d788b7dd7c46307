# Two commands on a fresh machine: `make demo` shows medtpp at work, `make test` checks it.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo

.PHONY: demo test lint types unit slow install clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

install: .venv/installed

demo: install
	rm -rf $(DEMO)
	$(BIN)/medtpp phantom --out $(DEMO)/data
	$(BIN)/medtpp check $(DEMO)/data
	$(BIN)/medtpp compare $(DEMO)/data --out $(DEMO)/comparison --modality xray --labels 60 --seeds 5 \
	  --set data.image_size=128 --set tpp.steps=60 --set finetune.steps=100 --set finetune.batch_size=16 \
	  --set finetune.learning_rate=0.003
	$(BIN)/medtpp predict $(DEMO)/comparison/cells/lora-tpp/60/seed0/finetune/adapter $(DEMO)/data/images -o $(DEMO)/predictions.csv

test: lint types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install
	$(BIN)/mypy

# A process per core, each with one thread; a file stays in one process, which makes what its tests share once.
unit: install
	$(BIN)/pytest -n auto --dist loadfile

slow: install
	$(BIN)/pytest -n auto -m slow

clean:
	rm -rf .venv $(DEMO)

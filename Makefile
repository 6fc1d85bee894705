.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench bench-quality docs clean

# Any Python from 3.11: `make install PYTHON=python3.12`. The environment is made on the first call of any target,
# and again when one of the files that name its packages has changed.
PYTHON ?= python3
WORKERS ?= 2
ROW ?= sasrec
SEED ?= 0
ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

# Every choice that accelerate would otherwise ask a configuration file for, or guess and warn about.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## make .venv with the package in editable form and all that development needs
	@echo ".venv is ready"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "llmd4rec_hf needs Python 3.11 or later: make install PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -c constraints.txt -e ".[dev,export,serve,fast,docs]"
	@touch $@

demo: $(INSTALLED) ## run the whole method on built-in data, offline (ARGS="--rounds 1" to change options)
	HF_HUB_OFFLINE=1 $(LAUNCH) examples/train.py --output_dir runs/demo $(ARGS)

test: $(INSTALLED) ## run the tests, offline (ARGS="-k ranking", WORKERS=4)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## run the benchmarks that need no other package, one after the other (results in benchmarks/results)
	for script in loss overhead scaling; do $(BIN)/python benchmarks/$$script.py $(ARGS) || exit 1; done

bench-quality: $(INSTALLED) ## one row of the quality tables (ROW=sasrec DATA=folder LLM=folder-or-id SEED=0)
	@test -n "$(DATA)" || { echo "make bench-quality needs DATA=FOLDER, a data set with titles"; exit 2; }
	$(BIN)/python benchmarks/quality/run.py $(ROW) --data $(DATA) --seed $(SEED) $(if $(LLM),--backbone $(LLM)) $(ARGS)

docs: $(INSTALLED) ## build the documentation into site/ (ARGS="-d FOLDER" for another place)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

clean: ## remove the environment, caches and built files; runs/ stays
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis

# Needs Python 3.11 to 3.13 with venv and pip; everything else is installed into $(VENV) when it is missing.
#
#   make demo                      watch a small model learn           ARGS="--lora" is passed on
#   make test                      lint, types and all tests           ARGS="-k config" is passed on, "-n 0" too
#   make test PYTHON=python3.12    with another interpreter
#   make demo VENV=~/envs/strop    in another environment
#   STROP_ACCELERATOR=cpu make …   cpu or cuda instead of what the machine has

VENV ?= .venv
BIN := $(VENV)/bin
INSTALL = $(or $(PYTHON),python3) scripts/install.py --venv "$(VENV)" $(if $(PYTHON),--this-python)

# Where this is set, every start would compile vLLM's and torch's thousands of modules again: ten seconds and more.
unexport PYTHONDONTWRITEBYTECODE

.NOTPARALLEL:
.PHONY: help demo test check format install clean

help:
	@sed -n '3,7s/^#   //p' Makefile

demo:
	@$(INSTALL) run
	$(BIN)/strop demo $(ARGS)

test: check
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install:
	@$(INSTALL) dev

clean:
	rm -rf .venv dist build .hypothesis .mypy_cache .pytest_cache .ruff_cache

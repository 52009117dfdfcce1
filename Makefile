# Everything runs from a virtual environment that the first target to need it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
PIP := $(if $(UV),$(UV) pip install -q --python $(BIN)/python,$(BIN)/python -m pip install -q)

.PHONY: env demo test docs paper lint benchmark zoo clean

env: $(VENV)/ready

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) -e ".[dev]"
	touch $@

demo: env  ## train on scikit-learn's digits, compress with every method, show table and plot
	$(BIN)/python train.py --config configs/lenet_300_100_digits.yaml --trainer.enable_progress_bar false
	$(BIN)/python compress.py --checkpoint runs/lenet_300_100_digits/best.ckpt --method prune merge reconstruct \
		--criterion l2-norm --ratio 0.5 0.7 0.8 0.9 --output runs/demo

test: env docs  ## style, documents, doctests and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

docs: env  ## the pages and the Python API, docs/_build/index.html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

paper: env  ## every published number; NM_ASSETS names the folder with the published checkpoints
	$(BIN)/python -m pytest tests/test_paper.py --paper

benchmark: env  ## what people wait for, each against its alternative, as one table
	$(BIN)/python benchmarks/performance.py

zoo: env  ## every torchvision classifier in both scopes, next to torch-pruning (hours); goes on where it was stopped
	$(PIP) -e ".[benchmark]"
	$(BIN)/python benchmarks/zoo.py --export

lint: env
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) docs/_build runs .pytest_cache .ruff_cache

# make test: everything CI checks.  make demo: a fine-tuning run on real weights.  make bench: CPU figures.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# torch first and pinned, so that no later requirement picks another build
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==2.13.0"
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet -e ".[demo]"
	touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

.PHONY: lint test demo bench report clean

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest

demo: $(VENV)/demo
	$(BIN)/python bench/demo.py $(if $(METHODS),--methods $(METHODS))

bench: $(VENV)/dev
	$(BIN)/python bench/cpu.py --out bench/results/cpu/layers.csv
	$(BIN)/python bench/overhead.py --out bench/results/cpu/overhead.csv
	$(BIN)/python bench/mpc.py --out bench/results/cpu/mpc.csv
	$(BIN)/python bench/memory.py --out bench/results/cpu/saved_bytes.csv
	$(MAKE) report

report: $(VENV)/dev
	$(BIN)/python bench/report.py

clean:
	rm -rf $(VENV) build dist *.egg-info out

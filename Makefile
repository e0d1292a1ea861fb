# Everything runs in .venv, which the first command makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test torture fuzz docs site lint clean

quickstart: $(VENV)/installed  ## pre-train, transfer and report on embedded data: a few minutes
	$(BIN)/python tools/run_suite.py --config-file configs/suites/quickstart.yaml

test: lint  ## lint, types and tests
	$(BIN)/python -m pytest -n 2

torture: $(VENV)/installed  ## kill every kind of run 50 times, resume and compare: half an hour
	$(BIN)/python -m pytest tests/run/test_group.py
	$(BIN)/python tests/support/torture.py
	$(BIN)/python tests/support/torture.py --kills 12 --signal TERM

fuzz: $(VENV)/installed  ## 10,000 invalid files for each reader, 10,000 cases of each law
	FUZZ_INPUTS=10000 $(BIN)/python -m pytest tests/test_fuzz_*.py tests/test_properties*.py

docs: $(VENV)/installed  ## write the tables of docs/reference/recipes.md and docs/reference/errors.md
	$(BIN)/python docs/generate.py

site: $(VENV)/installed  ## build the documentation as a site; a broken link or a warning is an error
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs site

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

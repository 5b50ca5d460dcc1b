# Nothing is needed beforehand but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
MODELS := .models/.fetched
INSTALLED := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test coverage test-slow fuzz models bench docs tables fmt clean

demo: $(CORE)  ## run the main job on bundled data
	$(BIN)/weightsmith run mwa

test: $(INSTALLED) $(MODELS)  ## everything CI checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n auto --dist loadfile -m "not slow"

coverage: $(INSTALLED) $(MODELS)  ## the same tests, and which lines they reach
	$(BIN)/pytest -n auto --dist loadfile -m "not slow" --cov --cov-report=term:skip-covered

test-slow: $(INSTALLED) $(MODELS)  ## the tests that take longer
	$(BIN)/pytest -m slow

fuzz: $(INSTALLED)  ## a million changed files for each parser: hours; FUZZ=20000 for fewer
	WEIGHTSMITH_FUZZ=$(or $(FUZZ),1000000) $(BIN)/pytest tests/fuzz

models: $(MODELS)  ## two small real models for the tests that are marked so

bench: $(INSTALLED)  ## every performance target beside its peer
	cd benchmarks && for file in [a-z]*.py; do ../$(BIN)/python $$file || exit 1; done

docs: $(INSTALLED) tables  ## the site, in site/
	$(BIN)/mkdocs build --strict

tables: $(INSTALLED)  ## what README and docs repeat of the cards, and what composes
	$(BIN)/python docs/tables.py
	$(BIN)/python tests/contract/compositions.py

fmt: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .models site runs dist .coverage* .pytest_cache .mypy_cache .ruff_cache

$(CORE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	touch $@

$(INSTALLED): $(CORE)
	$(INSTALL) ".[hf,search,vision,onnx,noise,prune,rl,dev,docs]"
	touch $@

$(MODELS): tests/fetch_models.py | $(INSTALLED)
	$(BIN)/python tests/fetch_models.py $(@D)
	touch $@

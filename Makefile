# Run `make` to list the targets. To work in an environment of your own: `make test PY=/path/to/python`.
PYTHON ?= python3
VENV ?= .venv
# Passed to every `pip install`, for example PIP_ARGS="--extra-index-url URL" to choose where torch comes from.
PIP_ARGS ?=
# Passed to pytest, for example PYTEST_ARGS="-k cache -x".
PYTEST_ARGS ?=
# Two workers keep the memory tests honest on small machines; raise it on large ones.
WORKERS ?= 2
COMPAT_VERSIONS ?= 5.17.0 5.23.0

DEMO_DIR ?= .demo
QUESTION ?= What is shown at 3.0 seconds?

ifeq ($(origin PY), undefined)
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
else
READY :=
endif

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-gpu lint format bench compat clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):[^#]*## /\1|/' | awk -F'|' '{printf "  %-10s %s\n", $$1, $$2}'

venv: $(READY) ## create .venv with the pinned versions and install this repository into it, editable

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is %d.%d; set PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --quiet -c constraints.txt -e ".[test,train]"
	touch $@

demo: $(READY) ## make a clip and ask keye-tiny a question about it
	@mkdir -p $(DEMO_DIR)
	$(PY) -m examples.make_demo_clip $(DEMO_DIR)/clip.mp4
	$(PY) -m modeling_keye ask $(DEMO_DIR)/clip.mp4 "$(QUESTION)"

test: $(READY) ## run the tests (without those marked slow)
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -q $(PYTEST_ARGS)

test-slow: $(READY) ## run the tests marked slow
	$(PY) -m pytest -m slow -q $(PYTEST_ARGS)

test-gpu: $(READY) ## run the tests marked gpu, on a machine that has one
	$(PY) -m pytest -m gpu -q $(PYTEST_ARGS)

lint: $(READY) ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY) ## apply style and formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(READY) ## run every benchmark; each ends with one JSON line
	@set -e; for file in benchmarks/bench_*.py; do echo "== $$file"; $(PY) -m benchmarks.$$(basename $$file .py); done

# Users cannot pin a library for remote code, so the suite runs at both ends of the range, each in a fresh environment.
# The packages that a transformers release bounds itself are freed from the pins.
compat: ## run the tests with the oldest and the newest supported transformers, in fresh environments
	@set -e; for version in $(COMPAT_VERSIONS); do \
		echo "== transformers $$version"; \
		env=.compat/$$version; rm -rf $$env; $(PYTHON) -m venv $$env; \
		grep -vE '^(transformers|tokenizers|huggingface-hub|hf-xet)==' constraints.txt > $$env/constraints.txt; \
		echo "transformers==$$version" >> $$env/constraints.txt; \
		$$env/bin/python -m pip install $(PIP_ARGS) --quiet -c $$env/constraints.txt -e ".[test,train]"; \
		$$env/bin/python -c 'import sys, transformers; v = transformers.__version__; sys.exit(v != sys.argv[1] and "found " + v)' $$version; \
		$$env/bin/python -m pytest -n $(WORKERS) --dist loadfile -q $(PYTEST_ARGS); \
	done

clean: ## remove environments, caches and what demo made
	rm -rf $(VENV) .compat .demo build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

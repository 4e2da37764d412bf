# Every target sets up what it needs; all that is needed beforehand is a Python >= 3.11 called python3.
SHELL := /bin/bash
BIN := .venv/bin
PROJECTS := constraints.txt pyproject.toml tools/install.sh $(wildcard plugins/*/pyproject.toml)

.PHONY: install demo test lint format docs bench dist

install: .venv/.installed  ## .venv with core, all plugins and the tools

.venv/.installed: $(PROJECTS)
	bash tools/install.sh

demo: install  ## train a small model on real clips, in minutes on a CPU
	$(BIN)/python demo/run_demo.py

test: install  ## every test; OpenMP threads of two workers would only get in each other's way
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: install  ## style, types, import directions, no plugin named in core, generated docs up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	@if grep -rIinE --exclude-dir=__pycache__ 'kandinsky|sana|crepa|tread' core/hooktuner; then \
	  echo 'core/hooktuner names a plugin (above): core knows none.'; exit 1; fi
	$(BIN)/python tools/docs_pages.py --check

format: install  ## bring every file into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## write the generated pages: docs/hooks.md, docs/config.md, docs/cli.md
	$(BIN)/python tools/docs_pages.py

bench: install  ## our step beside a plain diffusers + peft loop
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kernel.py

dist: install  ## wheels of core and of every plugin, in dist/
	for project in . $(dir $(wildcard plugins/*/pyproject.toml)); do $(BIN)/python -m pip wheel --quiet --no-deps -w dist $$project || exit 1; done

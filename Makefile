PYTHON ?= python3
BIN := .venv/bin
# pip compiles on one core what it installs, which takes longer than the rest; files that no Python compiles are not ours.
INSTALL := $(BIN)/pip install --no-compile --disable-pip-version-check -c constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || true

.DEFAULT_GOAL := help
.PHONY: help install tools demo serve bench browser test short-tests test-long chaos lint docs site clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: .venv/installed  ## create .venv with the service and what the demo needs

.venv/installed: pyproject.toml constraints.txt
	@echo "installing the service, torch and transformers into .venv"
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[worker,embedded,demo]'
	@echo "compiling it, on all cores"
	@$(COMPILE)
	@touch $@

tools: .venv/tools  ## add linters, what tests need, and the optional extras

.venv/tools: .venv/installed
	$(INSTALL) --quiet -e '.[dev,docs,mcp,tracing]'
	@$(COMPILE)
	@touch $@

demo: install  ## train two experts, merge them through the service, show the result
	$(BIN)/python examples/demo.py

serve: install  ## the whole service on http://127.0.0.1:8000, its data in .demo
	@mkdir -p .demo/inputs
	$(BIN)/maskmerge serve --data-dir .demo/data --local-root .demo/inputs --port 8000

bench: tools  ## every bench, and docs/benchmarks.md from them (hours on an idle machine; DATA=folder of tasks)
	$(BIN)/python bench/every.py $(if $(DATA),--data $(DATA))

lint: tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

# The report page is tested in Debian's Chromium, which needs a root to install it.
browser: /usr/bin/chromium  ## install the browser that tests drive

/usr/bin/chromium:
	@test "$$(id -u)" = 0 || { echo "tests need Chromium: sudo apt-get install --no-install-recommends chromium"; exit 1; }
	apt-get update --quiet
	DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends chromium

# Three at once, since much of the time goes into waiting for services to start, to be killed and to recover; in the
# order that conftest.py gives the files, rather than by how many tests they have.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# Linters and types fill the time in which tests wait.
test:  ## linters, types, import contracts, and all tests but the long ones
	$(MAKE) --no-print-directory --jobs 2 tools browser
	$(MAKE) --no-print-directory --jobs 2 lint short-tests

short-tests: tools browser
	$(PYTEST) -m "not long"

test-long: tools browser  ## every test, before a release
	$(PYTEST)

chaos: tools  ## random faults under real jobs until KILLS of them killed something (1000, which takes hours); all faults as root
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.chaos --kills $(or $(KILLS),1000)

docs: tools  ## write docs/reference.md from the code
	$(BIN)/python docs/generate.py

site: tools  ## build the documentation as a site in site/, where a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:  ## remove what install and demo made
	rm -rf .venv .demo site

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo serve bench browser test lint docs site clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: .venv/installed  ## create .venv with everything in it

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,embedded,demo,dev,docs,mcp,tracing]'
	@touch $@

demo: install  ## train two experts, merge them through the service, show the result
	$(BIN)/python examples/demo.py

serve: install  ## the whole service on http://127.0.0.1:8000, its data in .demo
	@mkdir -p .demo/inputs
	$(BIN)/maskmerge serve --data-dir .demo/data --local-root .demo/inputs --port 8000

bench: install  ## how fast scoring is, against bare passes (about 15 minutes on an idle machine)
	$(BIN)/python bench/scoring.py

lint: install
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
test: install browser lint  ## linters, types, import contracts and every test
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

docs: install  ## write docs/reference.md from the code
	$(BIN)/python docs/generate.py

site: install  ## build the documentation as a site in site/, where a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:  ## remove what install and demo made
	rm -rf .venv .demo site

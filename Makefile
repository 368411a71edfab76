# Two commands do all the set-up on a bare machine:
#   make demo    create .venv, install, run the main job: a table and a picture
#   make test    create .venv, install, lint, type-check, test, run the examples of the docs
#   make docs    create .venv, install, run the programs of the pages, build them into out/docs; a warning is an error
#   make coverage which lines of the package the tests run: a quarter of an hour
#   make mutants change the numerical core a little, a place at a time, and see whether tests fail: an hour
#   make package build wheel and source distribution, install each into an environment of its own, try it

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test lint types tests coverage mutants docs package clean

demo: $(VENV)/.runs
	$(BIN)/optex compare ackley rosenbrock logistic-breast-cancer \
		--methods vanilla,target,optex-paper,optex-alone,optex --optimizer adam --lr 0.01 --parallelism 5 --rounds 60 --seeds 3 --threads 1 \
		--json out/demo.json --plot out/demo.png

test: lint types tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

# By file: the examples of a page build on each other.
tests: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

coverage: $(VENV)/.coverage
	rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile -q
	$(BIN)/python -m coverage combine -q
	$(BIN)/python benchmarks/line_coverage.py

mutants: $(VENV)/.mutants
	$(BIN)/python benchmarks/mutants.py

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -q -c docs -b html . out/docs
	@echo "out/docs/docs/index.html"

# The library alone, as a user gets it: an archive that forgot a file, or a dependency not declared, fails here.
package: $(VENV)/.runs
	rm -rf dist build/package
	$(PIP) install build
	$(BIN)/python -m build -q --outdir dist .
	for archive in dist/*.whl dist/*.tar.gz; do \
		rm -rf build/package && $(PYTHON) -m venv build/package || exit 1; \
		build/package/bin/python -m pip --disable-pip-version-check -q install "$$(grep '^torch==' constraints.txt)" || exit 1; \
		build/package/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt "$$archive" || exit 1; \
		(cd build && package/bin/python ../benchmarks/first_run.py) || exit 1; \
	done

# What the library and its command line need, and nothing of what tests and examples do. torch first and by its exact
# version, so that no other package's requirement picks another build of it. Byte code is written when a module is first
# imported: to write all of it first takes as long as the rest of the installation. Tests have it written, as they start
# many processes, and where PYTHONDONTWRITEBYTECODE is set each of these would compile what it imports.
$(VENV)/.runs: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11, 1))" \
		|| { echo "optex needs Python 3.11.1 or later; name one with: make PYTHON=python3.12"; exit 1; }
	@echo "installing into $(VENV): torch"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --no-compile "$$(grep '^torch==' constraints.txt)"
	@echo "installing into $(VENV): optex and its command line"
	@$(PIP) install --no-compile -c constraints.txt -e ".[studies]"
	@touch $@

$(VENV)/.installed: $(VENV)/.runs
	@echo "installing into $(VENV): what tests and examples need"
	@$(PIP) install -c constraints.txt -e ".[studies,test]"
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true  # torch has a file for later Pythons alone
	@touch $@

$(VENV)/.coverage: $(VENV)/.installed
	@echo "installing into $(VENV): coverage.py"
	@$(PIP) install -c constraints.txt -e ".[coverage]"
	@touch $@

$(VENV)/.mutants: $(VENV)/.installed
	@echo "installing into $(VENV): mutmut"
	@$(PIP) install -c constraints.txt -e ".[mutants]"
	@touch $@

$(VENV)/.docs: $(VENV)/.runs
	@echo "installing into $(VENV): what the pages need"
	@$(PIP) install -c constraints.txt -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) out build dist docs/tour docs/examples *.egg-info .pytest_cache .ruff_cache .hypothesis

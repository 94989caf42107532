# make demo    an environment, a training of minutes on photographs that need no download, a table and pictures
# make test    the whole test suite in that environment
# make cluster-test    a training under SLURM and over two hosts, both made here for it; needs root and Debian
# make lint    the linter
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test cluster-test lint venv

demo: venv
	$(BIN)/python tools/demo.py

test: venv
	$(BIN)/python -m pytest

cluster-test: venv
	failed=; for test in slurm two_nodes; do \
	    PYTHON=$(abspath $(BIN))/python timeout --kill-after=30 1200 tests/cluster/$$test.sh || failed=yes; \
	done; test -z "$$failed"

lint: venv
	$(BIN)/ruff check .

venv: $(VENV)/installed

# basicsr 1.4.2 imports torch in its own setup: torch comes first, and basicsr is built without isolation.
$(VENV)/installed: setup.py $(wildcard elan_basicsr/archs/kernels/*)
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 13) else "Python 3.10 to 3.12 is needed, \
	this is %d.%d; call make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "setuptools<81" wheel torch torchvision
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e '.[demo,test]'
	touch $@

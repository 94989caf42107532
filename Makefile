# make demo    an environment, a training of minutes on photographs that need no download, a table and pictures
# make test    the whole test suite in that environment
# make test-all    the same on every Python from 3.10 to 3.14 that this machine has, each in an environment of its own
# make cluster-test    a training under SLURM and over two hosts, both made here for it; needs root and Debian
# make gpu-test    the tests that need a GPU
# make lint    the linter and the type checker
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all cluster-test gpu-test lint venv

demo: venv
	$(BIN)/python tools/demo.py

test: venv
	$(BIN)/python -m pytest

test-all:
	failed=; for python in $$(tools/pythons.sh); do \
	    version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	    $(MAKE) --no-print-directory test PYTHON=$$python VENV=$(VENV)-$$version || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "failed on Python$$failed"; exit 1; }

cluster-test: venv
	failed=; for test in slurm two_nodes; do \
	    PYTHON=$(abspath $(BIN))/python timeout --kill-after=30 1200 tests/cluster/$$test.sh || failed=yes; \
	done; test -z "$$failed"

gpu-test: venv
	$(BIN)/python -m pytest -m gpu -rs

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy

venv: $(VENV)/installed

# Nothing is downloaded before check_machine.py has found what is missing. BasicSR comes first: pip would build it with a
# PyTorch of its own, or not at all (bootstrap.py). `setup` is for machines where OpenCV does not load.
$(VENV)/installed: setup.py $(wildcard elan_basicsr/archs/cpu/kernels/*)
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON); type: $$(if command -v dnf >/dev/null; \
	    then echo dnf install python3; else echo apt install python3 python3-venv; fi), or make PYTHON=…" >&2; exit 2; }
	@$(PYTHON) tools/check_machine.py $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python elan_basicsr/bootstrap.py
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test]'
	$(BIN)/basicsr setup
	touch $@

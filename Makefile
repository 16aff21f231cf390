# make demo | test | quick | test-kvm | sanitize | lint | docs | bench: each prepares .venv by itself, as an ordinary user, in a fresh clone.

PYTHON ?= python3
PYTEST_ARGS ?= -n auto --dist worksteal
VENV := .venv
READY := $(VENV)/.ready

SANITIZED := tests/machine/test_native.py tests/machine/test_extended.py tests/machine/kvm/test_run.py \
    tests/machine/native_user tests/hypervisor/test_ring0.py tests/hypervisor/test_grants.py tests/dom0/test_block.py tests/guests

.PHONY: help demo test quick test-kvm sanitize lint docs bench clean

help:
	@echo "make demo      boot several domains side by side and show that they are isolated"
	@echo "make test      all tests, booting the stock Debian kernels among them (apt fetches those once)"
	@echo "make quick     the tests that take seconds"
	@echo "make test-kvm  what concerns the KVM engine, on this host's KVM"
	@echo "make sanitize  the native code's tests, with AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make lint      ruff, mypy and the import directions"
	@echo "make docs      what docs/ has from the definitions of commands and requests, anew"
	@echo "make bench     the evaluation: tables of measurements, into bench/results"
	@echo "make clean     remove .venv and caches (not the downloaded guests in ~/.cache/xenolith)"

demo: $(READY)
	@$(VENV)/bin/xenolith demo

test: $(READY)
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

quick: $(READY)
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m "not slow"

# On whatever host this is: docs/engine-kvm.md says how to have it run on an ordinary one.
test-kvm: $(READY)
	@$(VENV)/bin/xenolith engines
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/machine/kvm
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/guests -k "kvm and not prebuilt"

# A sanitizer's report ends the process, and goes to standard error: pytest leaves that alone. Without the disks that
# QEMU's programs serve: those inherit the preloaded library, and their coroutines hang under it.
sanitize: $(READY)
	@XENOLITH_NATIVE=sanitize PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	    $(VENV)/bin/python -m pytest $(PYTEST_ARGS) --capture=sys -k "not qcow2" $(SANITIZED)

lint: $(READY)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/mypy --config-file tests/mypy.ini tests bench docs/howto
	@$(VENV)/bin/lint-imports

docs: $(READY)
	@$(VENV)/bin/python -m xenolith.cli.manual docs

bench: $(READY)
	@$(VENV)/bin/pip install --quiet --editable '.[evaluation]'
	@$(VENV)/bin/python -m bench

# Debian splits venv's pip into python3-venv. Without it, a pip of the machine can fill a bare environment.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Xenolith needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test "$$(uname -sm)" = "Linux x86_64" || { echo "Xenolith runs on Linux on x86-64, not on $$(uname -sm)." >&2; exit 1; }
	@echo "Preparing $(VENV) ..."
	@rm -rf $(VENV)
	@if $(PYTHON) -c 'import ensurepip; ensurepip.version()' 2>/dev/null; then \
	    $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1 && $(PYTHON) -m venv --without-pip $(VENV); then \
	    $(PYTHON) -m pip --quiet --python $(VENV)/bin/python install pip; \
	else \
	    echo "$(PYTHON) can make no virtual environment: install the package python3-venv (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; \
	fi
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist src/*.egg-info

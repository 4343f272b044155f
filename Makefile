# The two commands: `make demo` and `make test`.  Either makes .venv first, from the lock file.

PYTHON ?=
unexport PYTHONPATH PYTHONHOME

.PHONY: demo test test-full tools lint wheel venv clean

demo: venv
	@.venv/bin/r1kern demo

PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: venv tools
	@$(PYTEST)

# Every layout and every fault, where `make test` takes a part of them.
test-full: venv tools
	@$(PYTEST) -m "full or not full"

lint: venv
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

tools:
	@.ci/tools.sh

wheel: venv
	@.venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

# The first Python that runs and has a wheel for every pin; .ci/bootstrap.py does the rest, and
# nothing where .venv is already right.
venv:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3); do \
	    if "$$python" -I -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	        2>/dev/null; then exec "$$python" -I .ci/bootstrap.py; fi; \
	done; \
	echo "set-up failed: no Python 3.11, 3.12 or 3.13 found$(if $(PYTHON), as $(PYTHON)):" \
	    "install one (Debian, Ubuntu: \`apt install python3 python3-venv python3-dev\`)," \
	    "or name it with \`make PYTHON=/path/to/python3.11 ...\`" >&2; \
	exit 1

clean:
	rm -rf .venv build dist r1kern.egg-info r1kern/_C.*.so r1kern/_hopper.*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

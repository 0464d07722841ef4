# `make demo` and `make test` do all the set-up they need: a virtual environment in .venv, from constraints.txt.
PYTHON ?= python3
RUN := .venv/bin/python
# Two processes: the suite is tuned for two cores.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

.PHONY: install demo test test-full lint gpu clean

install: .venv/installed

.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastdit needs Python 3.10 or newer")'
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip
	# torch first and alone: a range in another package would otherwise choose the build.
	$(RUN) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(RUN) -m fastdit demo

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: lint
	$(PYTEST) -m 'not slow and not gpu'

test-full: lint
	$(PYTEST) -m 'not gpu'

# Everything that needs a GPU; runs from the source tree, uninstalled, with the torch that python3 has (whose warnings are
# not this project's). The results are files in benchmarks/results/. A benchmark that
# fails does not keep the next from running.
GPU_TESTS := tests/test_gpu.py tests/ops tests/models tests/kernels tests/benchmarks tests/sampling tests/training
gpu:
	$(PYTHON) benchmarks/calibrate.py
	$(PYTHON) -m pytest -m gpu -p no:cacheprovider -o filterwarnings=default -q $(GPU_TESTS)
	-$(PYTHON) -m pytest benchmarks/kernels --benchmark-only --quick --save -p no:cacheprovider -o filterwarnings=default
	$(PYTHON) benchmarks/compile_matrix.py --quick
	$(PYTHON) benchmarks/attention_registry.py
	$(PYTHON) benchmarks/sampling.py --quick
	$(PYTHON) benchmarks/training.py --quick
	$(PYTHON) benchmarks/training.py --largest-batch

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

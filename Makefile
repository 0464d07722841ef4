# `make demo` and `make test` do all the set-up they need: a virtual environment in .venv, from constraints.txt.
PYTHON ?= python3
RUN := .venv/bin/python
# Two processes: the suite is tuned for two cores.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

.PHONY: install demo test test-full lint gpu clean gpu-calibrate gpu-tests gpu-kernels gpu-compile gpu-attention \
	gpu-sampling gpu-images gpu-training gpu-batch

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

# Everything that needs a GPU, from the source tree, uninstalled, with the torch that python3 has (whose warnings are not
# this project's). Each part can be made alone, as `make gpu-tests`, and is meant to take less than ten minutes; one that
# fails does not keep the next from running. Results are files in benchmarks/results/ and fastdit/attention/.
# Fewer tests: `make gpu-tests GPU_TESTS=tests/ops`. All 200 steps and more shapes, which takes longer: `make gpu QUICK=`.
GPU_PARTS := calibrate tests kernels compile attention sampling images training-32 training-128 training-256 batch
GPU_TESTS := tests/test_gpu.py tests/ops tests/models tests/kernels tests/benchmarks tests/sampling tests/training
GPU_PYTEST := $(PYTHON) -m pytest -p no:cacheprovider -o filterwarnings=default
QUICK ?= --quick

gpu:
	@failed=; for part in $(GPU_PARTS); do \
		echo "== gpu-$$part"; $(MAKE) --no-print-directory gpu-$$part || failed="$$failed gpu-$$part"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

gpu-calibrate:
	$(PYTHON) benchmarks/calibrate.py

gpu-tests:
	$(GPU_PYTEST) -m gpu -q $(GPU_TESTS)

gpu-kernels:
	$(GPU_PYTEST) benchmarks/kernels --benchmark-only $(QUICK) --save

gpu-compile:
	$(PYTHON) benchmarks/compile_matrix.py $(QUICK)

gpu-attention:
	$(PYTHON) benchmarks/attention_registry.py

gpu-sampling:
	$(PYTHON) benchmarks/sampling.py $(QUICK)

gpu-images:
	$(PYTHON) benchmarks/sampling.py --images 512

gpu-training: gpu-training-32 gpu-training-128 gpu-training-256

gpu-training-%:
	$(PYTHON) benchmarks/training.py $(QUICK) --batch $*

gpu-batch:
	$(PYTHON) benchmarks/training.py --largest-batch

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

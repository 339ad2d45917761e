# make tutorial       environment, install, tutorial 01 on real data
# make test           environment, install, lint, types, all tests on TensorFlow
# make test-backends  the core tests on JAX and on PyTorch, each in an environment of its own
# make test-implementations  the layers' tests under every implementation that can be forced
# make bench          benchmarks of layers, training, memory, imports (nothing else should be running)
#                     ARGS are options of the first, layers.py; the others run with their defaults
# make results        RESULTS.md from the runs saved in docs/results
# make docs           the pages, into docs/_build/html, in an environment of their own
# make notebooks      the tutorials as notebooks, on the runs saved in docs/results, for the pages
# Environments are made when they are missing, or older than pyproject.toml, and only then.

PYTHON ?= python3
# Modules are compiled when they are first imported: most of TensorFlow's never are.
PIP_FLAGS := -qq --disable-pip-version-check --no-input --no-compile

export TF_CPP_MIN_LOG_LEVEL ?= 3
export TF_ENABLE_ONEDNN_OPTS ?= 1
export PYTHONUNBUFFERED := 1
# What has been compiled is written down: a process that imports TensorFlow begins 5 s of CPU sooner.
unexport PYTHONDONTWRITEBYTECODE

# As many processes as there are cores; `make test WORKERS=0` for one, to debug in.
WORKERS ?= auto
PYTEST := -m pytest --numprocesses=$(WORKERS) --dist=loadgroup
# As TensorFlow is by itself: with oneDNN or not is its own choice there.
BENCH := env -u TF_ENABLE_ONEDNN_OPTS KERAS_BACKEND=tensorflow .venv/bin/python

.PHONY: tutorial test test-backends test-implementations test-jax test-torch lint bench clean \
	results docs notebooks
.DELETE_ON_ERROR:

# $(call environment,DIR): an environment of $(PYTHON); one of another, or one that was left half made, gives way.
define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "keras_norm needs Python >= 3.11; received: " + sys.version.split()[0] + ". Choose another with: make PYTHON=python3.12 ...")'
@echo "Making the environment $(1) (once; a few minutes)"
@{ test "$$($(1)/bin/python --version)" = "$$($(PYTHON) --version)" && $(1)/bin/python -m pip --version; } >/dev/null 2>&1 \
	|| $(PYTHON) -m venv --clear $(1)
@$(1)/bin/python -m pip install $(PIP_FLAGS) --upgrade "pip>=25.1"
endef

# TensorFlow's releases come later than Python's.
TOO_NEW = { echo "Where tensorflow is not found, it may have no release for $$($(PYTHON) --version) yet. \
Choose another with: make PYTHON=python3.13 ..." >&2; exit 1; }

.venv/installed: pyproject.toml
	$(call environment,.venv)
	@.venv/bin/python -m pip install $(PIP_FLAGS) --editable '.[dev]' || $(TOO_NEW)
	@touch $@

.venv-docs/installed: pyproject.toml
	$(call environment,.venv-docs)
	@.venv-docs/bin/python -m pip install $(PIP_FLAGS) --editable '.[docs,notebooks]' || $(TOO_NEW)
	@touch $@

# --no-deps: the core group stands in for the dependencies, without TensorFlow.
.venv-%/installed: pyproject.toml
	$(call environment,.venv-$*)
	@.venv-$*/bin/python -m pip install $(PIP_FLAGS) $(BACKEND_PACKAGE) --group core
	@.venv-$*/bin/python -m pip install $(PIP_FLAGS) --no-deps --editable .
	@touch $@
.venv-jax/installed: BACKEND_PACKAGE = jax
.venv-torch/installed: BACKEND_PACKAGE = torch==2.13.0

tutorial: .venv/installed
	@KERAS_BACKEND=tensorflow .venv/bin/python tutorials/01_batchnorm.py --out results/01_batchnorm $(ARGS)

lint: .venv/installed
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet . || { echo "Formatting differs: run .venv/bin/ruff format"; exit 1; }
	@.venv/bin/mypy --no-error-summary
	@echo "lint, format and types: no findings"

test: lint
	@KERAS_BACKEND=tensorflow .venv/bin/python $(PYTEST) $(ARGS)

test-backends:
	@$(MAKE) --no-print-directory -j2 .venv-jax/installed .venv-torch/installed
	@echo "The core tests on JAX and on PyTorch, at the same time; each reports when it is done"
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-jax test-torch

# What one process has compiled the other need not: a fifth of the time.
JAX_CACHE := JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.venv-jax/compiled" \
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

# Some tests take JAX minutes, Keras's own among them: they run on the other two; or with JAX_TESTS=core.
JAX_TESTS ?= core and not slow_on_jax

test-jax: .venv-jax/installed
	@KERAS_BACKEND=jax JAX_PLATFORMS=cpu $(JAX_CACHE) .venv-jax/bin/python $(PYTEST) -m "$(JAX_TESTS)" $(ARGS)

test-torch: .venv-torch/installed
	@KERAS_BACKEND=torch OMP_NUM_THREADS=1 .venv-torch/bin/python $(PYTEST) -m core $(ARGS)

LAYER_TESTS := tests/test_kernels.py tests/test_batch_normalization.py \
	tests/test_batch_normalization_properties.py tests/test_check_vectors.py \
	tests/test_layer_normalization.py tests/test_group_normalization.py \
	tests/test_builtin_defects.py tests/test_statistics.py tests/test_models.py

test-implementations: .venv/installed
	@for name in composed folded fused products x_hat compiled by_channel; do \
		echo "KERAS_NORM_IMPLEMENTATION=$$name"; \
		KERAS_NORM_IMPLEMENTATION=$$name KERAS_BACKEND=tensorflow \
			.venv/bin/python $(PYTEST) $(LAYER_TESTS) $(ARGS) || exit 1; \
	done

bench: .venv/installed
	@$(BENCH) benchmarks/layers.py --layers batch layer rms group $(ARGS)
	@$(BENCH) benchmarks/training.py
	@$(BENCH) benchmarks/memory.py --layers batch layer rms group
	@$(BENCH) benchmarks/activation.py
	@$(BENCH) benchmarks/convolution.py
	@$(BENCH) benchmarks/backward.py
	@$(BENCH) benchmarks/imports.py

results: .venv/installed
	@.venv/bin/python docs/report.py

# Warnings are errors, among them links to pages, headings and functions that are not there; links
# to files are checked by the second command, which lists those to other sites.
docs: .venv-docs/installed
	@.venv-docs/bin/sphinx-build --quiet --fail-on-warning --keep-going -d docs/_build/doctrees \
		-b html docs docs/_build/html
	@.venv-docs/bin/sphinx-build --quiet -d docs/_build/doctrees -b linkcheck docs docs/_build/links
	@echo "Open docs/_build/html/index.html; links to other sites: docs/_build/links/output.txt"

TUTORIALS ?= $(basename $(notdir $(wildcard tutorials/[0-9][0-9]*_*.py)))

notebooks: .venv-docs/installed
	@KERAS_BACKEND=tensorflow .venv-docs/bin/python docs/notebooks.py $(TUTORIALS)

clean:
	rm -rf .venv .venv-jax .venv-torch .venv-docs build docs/_build docs/_pages *.egg-info

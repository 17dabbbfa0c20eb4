# SPDX-License-Identifier: Apache-2.0
# make demo       the demonstration: demo/report.html
# make serve      the web page with the demonstration
# make check      format, lint, types, the rule of rooms, and the fast tests
# make test       every test but the slowest ones
# make test-all   every test
# make lint       format, lint, types and the rule of rooms
# make consumers  an environment with fafbseg-py, which reads our export in a test
# make bench-env  an environment with the other sides of the benchmarks
# make bench      the benchmarks
# make clean      removes the environments, the demonstration and the benchmarks' files
#
# PYTHON=python3.12 chooses the interpreter of a new environment.

PYTHON ?= python3
SEED ?= 0
# Plant the demonstration's synapses in this volume instead of in generated texture.
BACKGROUND ?=
DEMO ?= demo
# Send the demonstration's synapses through this database: mongodb://HOST/DATABASE.
SYNAPSES ?=
# The benchmarks make their files in BENCH_FOLDER. TEXTURE is a volume of real EM that
# they read.
BENCH_FOLDER ?= bench
TEXTURE ?=
VENV := .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo serve check test test-all lint consumers bench-env bench clean

# An environment belongs to one interpreter: another PYTHON, or changed requirements,
# make it again.
STAMP = $(VENV)/installed-$(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "synister_jax needs Python 3.11 or newer; try make PYTHON=python3.11")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# PyTorch is large, and only the tests and tools/import_torch.py need it.
TORCH = $(STAMP)-torch

$(TORCH): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,torch]'
	touch $@

# Every stage skips what is done already: stop it at any time and type make demo again.
demo: $(STAMP)
	$(BIN)/python tools/make_demo.py --output='$(DEMO)/data' --seed=$(SEED) $(if $(BACKGROUND),--background='$(BACKGROUND)')
	$(if $(SYNAPSES),$(BIN)/python tools/import_mongo.py load --mongo='$(SYNAPSES)' --synapses='$(DEMO)/data')
	$(BIN)/python tools/make_splits.py --synapses='$(or $(SYNAPSES),$(DEMO)/data)' --by=neuron --name=skeleton --output='$(DEMO)/synapses.feather' --report='$(DEMO)/splits' --crop_shape_zyx=8,48,48
	$(BIN)/python tools/shard_crops.py --config=configs/demo.py --synapses='$(DEMO)/synapses.feather' --volume='$(DEMO)/data/volume.n5/volumes/raw/s0' --output='$(DEMO)/shards' --shard_mib=8 --verify
	$(BIN)/python -m synister_jax.train --config=configs/demo.py --config.shards='$(DEMO)/shards' --config.seed=$(SEED) --workdir='$(DEMO)/run'
	$(BIN)/python -m synister_jax.evaluate --workdir='$(DEMO)/run' --part=validation --steps=best
	$(BIN)/python -m synister_jax.calibrate --workdir='$(DEMO)/run' --steps=best
	$(BIN)/python -m synister_jax.evaluate --workdir='$(DEMO)/run' --part=test --steps=best
	$(BIN)/python -m synister_jax.calibrate --workdir='$(DEMO)/run' --steps=best --check=test
	$(BIN)/python -m synister_jax.predict --workdir='$(DEMO)/run' --step=best --calibrated --synapses='$(DEMO)/synapses.feather' --volume='$(DEMO)/data/volume.n5/volumes/raw/s0' --output='$(DEMO)/predictions'
	$(BIN)/python -m synister_jax.aggregate --predictions='$(DEMO)/predictions/predictions.feather' --by=neuron --rule=majority,mean_probability,conf_nt --confusion='$(DEMO)/run/evaluation/test' --output='$(DEMO)/neurons.feather'
	$(BIN)/python -m synister_jax.one_transmitter --predictions='$(DEMO)/predictions/predictions.feather' --by=neuron --confusion='$(DEMO)/run/evaluation/test' --output='$(DEMO)/one_transmitter.feather'
	$(BIN)/python -m synister_jax.export --predictions='$(DEMO)/predictions/predictions.feather' --to=flyem --split=skeleton --confusion='$(DEMO)/run/evaluation/test' --output='$(DEMO)/flyem'
	$(BIN)/python -m synister_jax.report --workdir='$(DEMO)/run' --predictions='$(DEMO)/predictions/predictions.feather' --output='$(DEMO)/report.html'

# The web page offers the network, the volume and the neurons of the demonstration.
define SERVED
[demo]
title = "Demonstration"
workdir = "../run"
volume = "../data/volume.n5/volumes/raw/s0"
calibrated = true
synapses = "../synapses.feather"
endef
export SERVED

serve: $(STAMP)
	test -f '$(DEMO)/report.html' || $(MAKE) demo
	mkdir -p '$(DEMO)/models'
	printf '%s\n' "$$SERVED" > '$(DEMO)/models/models.toml'
	$(BIN)/python -m synister_jax.serve --models='$(DEMO)/models' --open

# fafbseg-py reads our export in the tests. It has 137 requirements of its own.
CONSUMERS = .venv-consumers

$(CONSUMERS)/installed: constraints-consumers.txt
	rm -rf $(CONSUMERS)
	$(PYTHON) -m venv $(CONSUMERS)
	$(CONSUMERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-consumers.txt fafbseg
	touch $@

consumers: $(CONSUMERS)/installed

# The other sides of the benchmarks are PyTorch and gunpowder.
BENCH = .venv-bench
BENCH_STAMP = $(STAMP:$(VENV)/%=$(BENCH)/%)

$(BENCH_STAMP): pyproject.toml constraints-bench.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "synister_jax needs Python 3.11 or newer; try make PYTHON=python3.11")'
	rm -rf $(BENCH)
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-bench.txt --editable '.[bench]'
	touch $@

bench-env: $(BENCH_STAMP)

# On a GPU: install '.[bench,cuda]' into the environment, then make bench JAX_PLATFORMS=cuda.
bench: $(BENCH_STAMP)
	$(BENCH)/bin/python -m benchmarks.run_all --folder='$(BENCH_FOLDER)' $(if $(TEXTURE),--texture='$(TEXTURE)')

# The markers are explained in pyproject.toml.
check: lint
	$(BIN)/python -m pytest -n 2 -m 'not long and not slow'

test: $(TORCH)
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-all: test
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(CONSUMERS) $(BENCH) $(BENCH_FOLDER) $(DEMO)

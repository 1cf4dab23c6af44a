# `make quickstart` and `make test` need Python 3.10 or newer and nothing else: the environment is made on first use.
PYTHON ?= python3
# Installed first and by name, so that no other requirement chooses the build. For another build, e.g. of a CUDA
# version of yours: make quickstart TORCH="torch==2.13.0 --index-url URL"
TORCH ?= torch==2.13.0
BIN := .venv/bin
OUT ?= runs/tiny-arithmetic

.PHONY: quickstart test test-slow test-versions clean
quickstart: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/cdpo.py \
		--config recipes/configs/cdpo/tiny-arithmetic.yaml --output $(OUT)

# One thread per process, as tiny models are fastest; two processes, as many tests wait for launches of their own.
test: .venv/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# The trainers' tests with the oldest and the newest supported TRL. Any other: make test-trl-1.15
test-versions: test-trl-1.14 test-trl-1.16

test-trl-%: .venv-trl-%/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-trl-$*/bin/python -m pytest -n 2 --dist loadfile -m "trainers and not slow and not gpu"

# The stamp is written last: an interrupted installation is taken up again, not mistaken for a finished one.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev,qlora]'
	touch $@

# The oldest TRL is its first release and gets the oldest transformers; of others, the newest patch release is installed.
.PRECIOUS: .venv-trl-%/installed
.venv-trl-%/installed: pyproject.toml
	test -x .venv-trl-$*/bin/python || $(PYTHON) -m venv .venv-trl-$*
	.venv-trl-$*/bin/python -m pip install --quiet $(TORCH)
	.venv-trl-$*/bin/python -m pip install --quiet -e '.[dev,qlora]' 'trl==$*$(if $(filter 1.14,$*),.0' 'transformers==5.16.*',.*')
	touch $@

clean:
	rm -rf .venv .venv-trl-* runs build *.egg-info

# `make quickstart` and `make test` need Python 3.10 or newer and nothing else: the environment is made on first use.
PYTHON ?= python3
# Installed first and by name, so that no other requirement chooses the build. For another build, e.g. of a CUDA
# version of yours: make quickstart TORCH="torch==2.13.0 --index-url URL"
TORCH ?= torch==2.13.0
BIN := .venv/bin
OUT ?= runs/tiny-arithmetic

.PHONY: quickstart test test-slow clean
quickstart: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/cdpo.py \
		--config recipes/configs/cdpo/tiny-arithmetic.yaml --output $(OUT)

# One thread per process, as tiny models are fastest; two processes, as many tests wait for launches of their own.
test: .venv/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# The stamp is written last: an interrupted installation is taken up again, not mistaken for a finished one.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev,qlora]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info

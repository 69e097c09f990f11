# make demo, make test and make lint set up what they need in .venv; PYTHON and TORCH may be overridden.
# make gpu takes what is there.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*/*)

.PHONY: demo test lint bench bench-kept gpu dist clean

demo: .venv/ready
	$(BIN)/fastvae compare --data digits --priors standard,vamp --seeds 3 --out runs/demo

test: .venv/ready
	FASTVAE_TEST_REQUIRE_CPU=1 $(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.tables --check

# on a quiet machine; FASTVAE_DATA names the folder with the latents of a trained model
bench: .venv/ready
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench]"
	$(BIN)/fastvae bench mixture gaussian --isa all --out benchmarks/results
	$(BIN)/fastvae bench train-step --out benchmarks/results/train-step
	$(BIN)/python examples/score_groups.py --record benchmarks/results/groups.json
	for part in estimators refresh memory; do $(BIN)/python -m benchmarks.bounds $$part || exit 1; done
	$(BIN)/python -m benchmarks.tables

# the targets once more with an allocator that keeps what is freed; JEMALLOC is the path of its library
bench-kept: .venv/ready
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench]"
	LD_PRELOAD=$(JEMALLOC) MALLOC_CONF=oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1 $(BIN)/fastvae bench \
		mixture gaussian --no-series --out benchmarks/results/kept

# on a bare machine with PyTorch, Triton, nvcc, ninja and a GPU, without network; `make gpu DRY=1` where there is no GPU
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(or $(OUT),benchmarks/results/gpu) $(if $(DRY),--dry-run)

dist: .venv/ready
	$(BIN)/python -m build --no-isolation

# torch first, and no build isolation, so that the extension is built against the torch it will run with
.venv/ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist fastvae.egg-info fastvae/_C*.so

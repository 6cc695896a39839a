# Everything a contributor types. `make` alone lists it.
#
# The environment lives in .venv and is rebuilt when pyproject.toml or constraints.txt change;
# the demo bases live in .models. Both are made on demand and reused afterwards.

PYTHON  ?= python3.11
HOST    ?= 127.0.0.1
PORT    ?= 8000

VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
READY   := $(VENV)/.installed
SOURCES := $(wildcard molex molex_client server scripts examples benchmarks loadtests)

# Threads of torch and of the tests would otherwise fight over the same cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

# Where `make bench` leaves its figures.
SHORT := runs/bench

.DEFAULT_GOAL := help
.PHONY: help install models peers serve demo lint deploy-lint format test test-faults bench bench-full loadtest clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(READY) ## Install the pinned environment into .venv

# The virtual environment is made without ensurepip, which Debian ships separately, and pip is then
# put into it by the pip that is already there. torch is named beside everything else, so that pip
# resolves all of it against that one build.
$(READY): pyproject.toml constraints.txt
	@echo "==> Installing the pinned environment into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet --constraint constraints.txt pip
	@$(PIP) install --constraint constraints.txt torch==2.13.0 --editable '.[train,bench,load,gguf,structured,onnx,s3,dev]'
	@touch $@
	@echo "==> Installed"

models: $(READY) ## Prepare the demo bases in .models
	@$(BIN)/python -m scripts.prepare_bases

peers: $(READY) ## Install what the benchmarks compare with into .peers (compiles for 10 minutes)
	@$(BIN)/python -m scripts.install_peers

serve: models ## Serve the demo bases and the example adapters on 127.0.0.1:8000
	@$(BIN)/molex serve --host $(HOST) --port $(PORT) \
		--base e5-small=.models/e5-small \
		--base smollm2=.models/smollm2-135m-instruct \
		--adapters examples/adapters

demo: models ## Start a server, send it real requests, print the answers, stop
	@$(BIN)/python examples/demo.py

lint: $(READY) deploy-lint ## Check style, types, import directions and deployment files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)
	$(BIN)/lint-imports

deploy-lint: $(READY) ## Check the Dockerfile and docker-compose.yml
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

format: $(READY) ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Tests of a file share the servers that it starts, so they stay together.
test: models ## Run the tests, two files at a time
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-faults: models ## Run the long tests: hostile input, churn, disconnects, reloads under traffic
	$(TEST_ENV) $(BIN)/python -m pytest -m faults $(ARGS)

bench: models ## Measure most that needs no peer, in 15 to 30 minutes; writes runs/bench/figures.md
	$(BIN)/python -m benchmarks.bench_lora_classification --rounds 3 --requests 64 --adapters 32 --output $(SHORT)
	$(BIN)/python -m benchmarks.bench_molex --rounds 3 --requests 128 --adapters 32 --output $(SHORT)
	$(BIN)/python -m benchmarks.bench_published --rounds 3 --requests 32 --output $(SHORT)
	$(BIN)/python -m benchmarks.bench_many_adapters --rounds 5 --seconds 3 --output $(SHORT)
	$(BIN)/python -m benchmarks.bench_adapter_load --rounds 2 --block-seconds 5 --output $(SHORT)
	$(BIN)/python -m benchmarks.bench_matrix_rate --rounds 3 --output $(SHORT)
	$(BIN)/python -m benchmarks.bench_http_overhead --rounds 2 --output $(SHORT)
	$(BIN)/python -m benchmarks.bench_fairness --rounds 3 --block-seconds 4 --output $(SHORT)
	@$(BIN)/python -m benchmarks.table $(SHORT)

# bench_kernels compares ways that the engine chooses between: it prints, and has no figure.
bench-full: models peers ## Measure everything, peers included; writes runs/bench-full/figures.md
	$(BIN)/python -m benchmarks.bench_kernels
	@for script in $(filter-out bench_kernels,$(notdir $(basename $(wildcard benchmarks/bench_*.py)))); do \
		echo "==> benchmarks.$$script"; \
		$(BIN)/python -m benchmarks.$$script --output runs/bench-full || exit 1; done
	@$(BIN)/python -m benchmarks.table runs/bench-full

loadtest: models ## Put load on MoLEx, LoRA and the base in float32 and bfloat16, in minutes; reports in runs/load
	@$(BIN)/python -m benchmarks.bench_http_ratio --rounds 2 --seconds 3 --output runs/load

clean: ## Remove caches and build output; keep .venv and .models
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf

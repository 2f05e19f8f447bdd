# One command each: `make demo` shows the plugin at work, `make test` checks everything. `make help` lists the rest.

PYTHON ?= python3.11
# Processes that share the tests: most of them keep one core busy.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
comma := ,

export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Servers under test listen on the loopback interface, which no proxy can reach.
export no_proxy := $(if $(no_proxy),$(no_proxy)$(comma),)127.0.0.1,localhost
export NO_PROXY := $(no_proxy)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean distclean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## Create .venv with vLLM and compile the extension (quick when nothing changed)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "make setup needs Python 3.11, and '$(PYTHON)' is not one: install it or name it, as in 'make setup PYTHON=/path/to/python3.11'." >&2; \
	  exit 2; }
	@$(PYTHON) -m tools.setup_env

demo: setup  ## Quantize the bundled model, serve it with vLLM beside bf16, print the comparison
	@$(BIN)/python -m benchmarks.demo

test: lint  ## Everything: lint, types and all tests
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

lint: setup  ## ruff, format check and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup  ## Apply ruff's fixes and formatting
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup  ## Linear layers, attention and whole engines beside their rivals (about two hours), written to results/
	@$(BIN)/python -m benchmarks.linear --json results/linear.json $(BENCH_LINEAR)
	@$(BIN)/python -m benchmarks.attention --json results/attention.json $(BENCH_ATTENTION)
	@$(BIN)/python -m benchmarks.throughput --json results/throughput.json $(BENCH_THROUGHPUT)

clean:  ## Remove what builds, tests and the demo wrote (the environment stays)
	rm -rf build dist demo results *.egg-info resq_vllm/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## Remove the environment as well
	rm -rf $(VENV)

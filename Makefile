# `make` prints what there is to make. Needs git, make, and Python 3.11 or newer with pip.

.DEFAULT_GOAL := help
.NOTPARALLEL:

# Who makes the pictures of `make run`: sandbox (draws them here, for nothing) or openai.
UPSTREAM ?= sandbox
PORT ?= 8080
# The Python that makes .venv; empty: the first of these that is new enough and has pip.
PYTHON ?=
# More for pytest: make test ARGS="tests/cli -x"
ARGS ?=

# Of `make clients`: half, or how a name begins ("openai-node"); empty: all, and their page is written.
CLIENTS ?=

# What `make bench` measures: QUICK=1 is five cases in three minutes, PEERS=1 brings LiteLLM and
# Portkey (installed under .tools), CASES=s_c32,m_c8 and ROUNDS=9 as they say; STUDY=growth, ledger
# and scale are studies of their own (gateway/docs/growth.md), STUDY=where is a profile.
QUICK ?=
PEERS ?=
CASES ?=
ROUNDS ?=
STUDY ?=

# How long `make torture` goes on, on both databases together.
MINUTES ?= 2

# Of these `make test` tells a part (tests/sizes.py).
WHOLE = $(filter-out tests/contract/test_ledger.py,$(shell grep -l '^from tests.sizes' tests/*/test_*.py))

VENV := .venv
IN_VENV := $(VENV)/bin/python
DEMO := $(VENV)/installed-demo
DEV := $(VENV)/installed-dev
BENCH := $(VENV)/installed-bench

# Leaves the first usable Python in $$python. Asking pip for --python says that pip is there and
# at least 22.3: with it neither python3-venv nor ensurepip is needed, so Debian's own Python will do.
FIND_PYTHON = \
	for name in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
		python=$$("$$name" -c 'import sys, venv; print(sys.executable * (sys.version_info >= (3, 11)))' 2>/dev/null) \
		&& [ -n "$$python" ] && "$$python" -m pip --python "$$python" --version >/dev/null 2>&1 && break; \
		python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "$(or $(PYTHON),python3) will not do: Python 3.11 or newer with pip 22.3 or newer is needed" >&2; \
		echo "(Debian: apt install python3 python3-pip; or name another: make PYTHON=/path/to/python3)" >&2; \
		exit 1; \
	fi

PIP_INSTALL = "$$python" -m pip --python $(IN_VENV) --disable-pip-version-check --no-input install --quiet

LOCK = $(IN_VENV) -m uv pip compile --generate-hashes --no-emit-index-url --universal --quiet \
	--python-version 3.11 --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)

.PHONY: help
help: ## Print this list.
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '%-19s%s\n' "$$name" "$$text"; done

.PHONY: run
run: $(DEMO) ## Start a gateway and show a picture coming back (UPSTREAM=openai: the real one behind it).
	@$(IN_VENV) -m gateway demo --upstream $(UPSTREAM) --port $(PORT)

.PHONY: test
test: $(DEV) ## Run every test.
	@PYTHONDONTWRITEBYTECODE= $(IN_VENV) -m pytest -n auto --maxprocesses 6 --dist worksteal $(ARGS)

.PHONY: lint
lint: $(DEV) ## Check style and formatting with ruff.
	@$(IN_VENV) -m ruff check .
	@$(IN_VENV) -m ruff format --check .

.PHONY: types
types: $(DEV) ## Check types with mypy, strictly.
	@$(IN_VENV) -m mypy

# pytest keeps what it makes of a test module beside it. In a fresh clone each process that runs tests
# would make all of it, at the same time as the others: it is made before, on the core that mypy leaves.
.PHONY: modules
modules: $(DEV) ## Make of the test modules what pytest makes of them (`make check` does).
	@PYTHONDONTWRITEBYTECODE= $(IN_VENV) -m pytest --collect-only -qq >/dev/null || true

.PHONY: check
check: lint ## What CI runs: lint, types, test.
	@$(MAKE) --no-print-directory modules & modules=$$!; \
	$(MAKE) --no-print-directory types; types=$$?; wait $$modules; exit $$types
	@$(MAKE) --no-print-directory test

.PHONY: torture
torture: $(DEV) ## Kill and freeze real processes under load for MINUTES (2), and count the money.
	@$(IN_VENV) -m tests.torture --minutes $(MINUTES)

.PHONY: soak
soak: $(DEV) ## Hours: the long stories whole, 50,000 runs of the ledger's model, an hour of torture.
	@SOAK=1 $(IN_VENV) -m pytest --timeout 900 $(WHOLE)
	@SOAK=1 $(IN_VENV) -m pytest tests/contract/test_ledger.py -k Model
	@$(IN_VENV) -m tests.torture --minutes 60

.PHONY: bench
bench: $(BENCH) ## Measure the gateway beside nginx; QUICK=1, PEERS=1, CASES=..., ROUNDS=..., STUDY=growth|ledger|scale|where
	@$(IN_VENV) -m tests.bench $(STUDY) $(if $(QUICK),--quick) $(if $(PEERS),--peers) \
		$(if $(CASES),--cases $(CASES)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

.PHONY: chart
chart: $(DEV) ## Render the chart with every helm, and check it against every Kubernetes.
	@$(IN_VENV) -m pytest -n 2 -m chart tests/ops $(ARGS)

.PHONY: image
image: $(DEV) ## Build the image and run it (buildah, podman).
	@$(IN_VENV) -m pytest -s -m image tests/ops $(ARGS)

.PHONY: dashboards
dashboards: $(DEV) ## Ask a real Prometheus every question of the dashboards and the alerts.
	@$(IN_VENV) -m pytest -s -m dashboards tests/ops $(ARGS)

.PHONY: clients
clients: $(DEV) ## Try every client's real package against a gateway; CLIENTS=half, or a name.
	@$(IN_VENV) -m tests.e2e.clients $(CLIENTS)

.PHONY: docs
docs: $(DEV) ## Write the reference pages anew (gateway/docs).
	@$(IN_VENV) -m tests.reference

.PHONY: lock
lock: $(DEV) ## Lock what the image installs, by hash (uv); UPGRADE=1 takes the newest of everything.
	@$(FIND_PYTHON); $(PIP_INSTALL) uv
	@$(LOCK) --extra otel --output-file requirements.txt pyproject.toml
	@sed -n '/^\[build-system\]/,/^$$/s/^requires = \["\(.*\)"\]/\1/p' pyproject.toml | \
		$(LOCK) --output-file requirements-build.txt -

.PHONY: live
live: $(DEV) ## Compare the real OpenAI with what we assume; needs OPENAI_API_KEY, spends under $0.02.
	@LIVE=1 $(IN_VENV) -m pytest -s -m live tests/live

.PHONY: clean
clean: ## Remove what make and the tests made. .demo stays: it has the books of `make run`.
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find gateway tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(IN_VENV):
	@$(FIND_PYTHON); \
	echo "Making $(VENV) with $$("$$python" --version) ..."; \
	"$$python" -m venv --clear --without-pip $(VENV)

$(DEMO): pyproject.toml $(IN_VENV)
	@$(FIND_PYTHON); \
	echo "Installing the gateway into $(VENV), this once ..."; \
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

# The test extra has all that the demo needs, so `make run` need not install again after it.
$(DEV): pyproject.toml $(IN_VENV)
	@$(FIND_PYTHON); \
	echo "Installing the gateway and its tests into $(VENV), this once ..."; \
	$(PIP_INSTALL) -e '.[test,lint]'
	@touch $@ $(DEMO)

$(BENCH): $(DEV)
	@$(FIND_PYTHON); \
	echo "Installing what the benchmark draws with into $(VENV), this once ..."; \
	$(PIP_INSTALL) -e '.[bench]'
	@touch $@

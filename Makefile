# Every goal sets up first (python3 -m setup: under a second when there is nothing to do).
PYTHON ?= python3
STACK ?= p510
TESTS ?=
TAKE ?=
UNLOCK ?=
DESTROY ?=
FUZZ ?= 40
MUTANTS ?=
setup = $(PYTHON) -m setup
# make status JSON=1
JSON ?=
# Only where tests/cluster is going to run: it needs a kube-apiserver.
cluster = $(if $(TESTS),$(if $(findstring tests/cluster,$(TESTS)),--cluster),--cluster)

# Without cached bytecode every run compiles the providers' SDKs anew, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup recover adopt rehearse test fuzz kill check fleet status doctor owners diagram mutants bench format

help: ## list the goals
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: ## install what is missing: uv, Pulumi, the Python packages
	@$(setup)

recover: ## go on after a run that died, from the lock it left: make recover STACK=p510
	@$(setup) -- .venv/bin/python -m components.recovery $(if $(UNLOCK),--unlock) recover $(STACK) $(if $(DESTROY),--destroy) $(if $(LOST),--lost $(LOST))

adopt: ## what exists and the state does not know; take it over: make adopt STACK=p510 TAKE=1
	@$(setup) -- .venv/bin/python -m components.recovery $(if $(UNLOCK),--unlock) adopt $(STACK) $(if $(TAKE),--take)

rehearse: ## preview, up, up again and outputs of a stack against stand-ins: make rehearse STACK=p510
	@$(setup) -- .venv/bin/python -m rehearsal $(STACK)

test: ## all tests; some of them: make test TESTS=tests/unit
	@$(setup) $(cluster) -- .venv/bin/pytest -n 2 --dist worksteal $(TESTS)

kill: ## kill a rehearsed up, edit and destroy at every step and recover, a run for each: make kill STACK=every-kind
	@$(setup) -- .venv/bin/python -m tests.engine.test_killed $(STACK)

fuzz: setup ## hostile settings, specs and tools' output, FUZZ times what `make test` tries of them
	@HOMELAB_FUZZ=$(FUZZ) .venv/bin/pytest -n 2 --dist worksteal tests/fuzz

check: setup ## lint, format, types, import rule, schema, collisions of stacks, pictures; no engine
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/pyright
	@.venv/bin/lint-imports
	@.venv/bin/python -m components.settings.schema --check
	@.venv/bin/python -m components.settings
	@.venv/bin/python -m diagram --check

fleet: setup ## whether two stacks want the same address, port, directory, hostname or name
	@.venv/bin/python -m components.settings

status: ## what is there now against what is declared: make status STACK=p510, JSON=1; exit 1 where it differs, 2 where it cannot tell
	@$(setup) -- .venv/bin/python -m status $(if $(JSON),--json) $(STACK)

doctor: ## what is wrong with the host of a stack, with remedies: make doctor STACK=p510
	@$(setup) -- .venv/bin/python -m status --doctor $(if $(JSON),--json) $(STACK)

owners: ## who owns each object of the cluster, two where they are refused: make owners STACK=p510, JSON=1
	@$(setup) -- .venv/bin/python -m status --owners $(if $(JSON),--json) $(STACK)

diagram: setup ## draw what a stack declares, docs/diagrams/<stack>.svg: make diagram STACK=p510
	@.venv/bin/python -m diagram $(STACK)

mutants: ## show that each incident's test fails without its safeguard; one: MUTANTS=no-lock
	@$(setup) --cluster -- .venv/bin/python -m tests.cluster.mutants $(MUTANTS)

bench: ## the benchmarks
	@$(setup) --cluster -- .venv/bin/python -m bench

format: setup ## mend what lint and format can mend by themselves
	@.venv/bin/ruff check --fix
	@.venv/bin/ruff format

# Every action is a target; `make` lists them. All of them make the environment (.venv) first if it is not there. Variables
# on make's command line (MODEL=... ARGS="...") reach the programs in their environment; make itself reads $$ as one $.

PYTHON ?= python3
RUN := .venv/bin/python
comma := ,
.DEFAULT_GOAL := help
.PHONY: help install train plan doctor smoke bench test test-all lint eval pairs online look table figure compare margins sweep samples reproduce

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

train: .venv/.installed ## train a setting: MODEL=tiny [STAGE=sft|rmipo] [METHOD=dpo] [ARGS="--learning_rate 1e-6"] [DATA=folder] [GPUS=4] [DRY=1]
	@$(RUN) scripts/launch.py

plan: .venv/.installed ## memory, time and disk of a run before you launch it: MODEL=... GPUS=8x80
	@$(RUN) scripts/plan.py

doctor: .venv/.installed ## check GPUs, disk, access to model and data, W&B login, each with its fix
	@$(RUN) scripts/doctor.py

smoke: .venv/.installed ## ten steps on the GPUs here, or on the CPU; pass or fail per check: MODEL=... [METHOD=dpo]
	@$(RUN) scripts/smoke.py

compare: .venv/.installed ## every method with the same search budget: MODEL=tiny [METHODS=...] [SEEDS=0,1]
	@$(RUN) scripts/compare.py

margins: .venv/.installed ## whether margins must belong to their pairs, and how much tuning matters: MODEL=tiny [WORKERS=2]
	@$(RUN) scripts/compare.py --margins

sweep: .venv/.installed ## the paper's hyperparameter search of a method, without an account: METHOD=simpo
	@$(RUN) scripts/sweep.py

look: .venv/.installed ## a page that shows what the margin does to your pairs: MODEL=... [METHOD=...] [DATA=pairs] [AFTER=...]
	@$(RUN) scripts/look.py

pairs: .venv/.installed ## preference pairs from a model's own answers: MODEL=... [METHOD=...] [PROMPTS=file] [ARGS="--answers 8"]
	@$(RUN) scripts/pairs.py

online: .venv/.installed ## rounds of sampling, scoring and training from the current policy: MODEL=... ROUNDS=3 [METHOD=...]
	@$(RUN) scripts/online.py

eval: .venv/.installed ## evaluate a trained model: MODEL=... METHOD=...
	@$(RUN) scripts/evaluate.py

samples: .venv/.installed ## answers of trained models side by side: MODEL=...
	@$(RUN) scripts/samples.py

table: .venv/.installed ## one of the paper's tables from result files: N=1
	@$(RUN) scripts/table.py

figure: .venv/.installed ## one of the paper's figures: N=7 MODEL=...
	@$(RUN) scripts/figure.py

reproduce: .venv/.installed ## all runs behind one table, in order: TABLE=1 [DRY=1]
	@$(RUN) scripts/reproduce.py

bench: .venv/.installed ## speed and memory against other implementations
	@$(RUN) -m benchmarks.bench

test: .venv/.installed ## the tests, without those that take long
	@$(RUN) -m pytest -m "not slow" -n 3 --dist worksteal

test-all: .venv/.installed ## all tests; those of benchmarks need EXTRAS=eval
	@$(RUN) -m pytest -n 3 --dist worksteal

lint: .venv/.installed ## style, and the import order of the packages
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && .venv/bin/lint-imports

install: ## make the environment, or add to it: EXTRAS=gpu (bitsandbytes, kernels, Liger), EXTRAS=eval, EXTRAS=vllm, EXTRAS=smollm2
	@rm -f .venv/.installed
	@$(MAKE) .venv/.installed

.venv/.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is not. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making the environment in .venv: several minutes, once"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e ".[dev$(if $(EXTRAS),$(comma)$(EXTRAS))]"
	@touch $@

# Every step of the lab as a target. A run that is there is not trained again unless its config
# changed. Start with `make help`.

DATA        ?= generated
PROFILE     ?= quick
SEEDS       ?= 0
DEVICE      ?= auto
SET         ?=
AFO_ARCHIVE ?=
IMAGES      ?=
OUT         ?= predictions
CHECKPOINT  ?= weights/best.pt
PYTHON      ?= python3
PIP_OPTIONS ?=

PY     := .venv/bin/python
MODELS := initial modified tuned best
# Any experiment in configs/ can be trained by its name: a new file there is a new target.
NAMED   := $(filter-out allowed default quick,$(patsubst configs/%.yaml,%,$(wildcard configs/*.yaml)))
names   = $(sort $(patsubst configs/$(1)/%.yaml,%,$(wildcard configs/$(1)/*.yaml)))
OVERFIT := $(call names,overfit)
TUNE    := $(call names,tune)
AUGMENT := $(call names,augment)
HEADS   := $(call names,heads)
SCENES  ?= real-300 generated-300 generated-1500 generated-10800 both-11100
GENERATED := data/scenes data/scenes-300 data/scenes-1500 data/scenes-both
SPEEDRUN := $(foreach seed,0 1 2,runs/speedrun/seed$(seed)/on-afo.json)

# DATA=my.yaml: a config that says where your data lie. It wins over those of the experiments.
OWN       := $(filter %.yaml,$(DATA))
DATA_NAME := $(subst /,-,$(basename $(DATA)))
DATA_DIR  := $(or $(OWN),data/$(DATA))
RUNS      ?= runs/$(DATA_NAME)/$(PROFILE)
$(if $(filter generated afo,$(DATA))$(wildcard $(filter-out generated.yaml afo.yaml,$(OWN))),,\
  $(error DATA=$(DATA): must be generated, afo, or a file NAME.yaml of your own data, of another name))
$(if $(filter quick full,$(PROFILE)),,$(error PROFILE=$(PROFILE): must be quick or full))

# The files of runs, one for each seed: $(call files,testing,initial tuned).
files = $(foreach name,$(2),$(foreach seed,$(SEEDS),$(RUNS)/$(name)/seed$(seed)/$(1).json))
# The quick profile's overlay for an experiment: its own, or the common one. Overfitting and the
# speedrun have their own budget in either profile.
quick = $(or $(wildcard configs/quick/$(1).yaml),$(if $(filter overfit/% heads/% scenes/% speedrun,$(1)),,configs/quick.yaml))
overlay = $(if $(filter quick,$(PROFILE)),$(call quick,$(1)))

.DEFAULT_GOAL := help
.SECONDARY:
.PHONY: help setup data check predict report overfit tune augment heads final scenes publish results tensorboard doctor bench \
        speedrun torture test lint clean FORCE $(NAMED:%=train-%)

help:  ## list the targets
	@echo "make TARGET [DATA=generated|afo|my.yaml] [AFO_ARCHIVE=file.zip] [PROFILE=quick|full] [SEEDS=\"0 1 2\"] [DEVICE=auto|cpu|cuda|mps] [SET=\"key=value ...\"]"
	@awk -F ':.*## ' '/^[a-z][a-z -]*:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  train-NAME      train and test configs/NAME.yaml: $(NAMED)"

setup: .venv/installed  ## create .venv with everything the project needs

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON): need Python 3.10 or newer with venv (apt install python3-venv); name one: make PYTHON=python3.12" >&2; exit 2; }
	@echo "setting up .venv (PyTorch is large: some minutes)"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) --requirement requirements.txt
	@touch $@

# ---- data

data: $(DATA_DIR)  ## prepare the data of DATA

data/generated: | .venv/installed
	$(PY) data.py generate --sequences 5400 1100 1100 --frames 2 --out $@

# One seed for all; "What scenes are worth" in the README says what they are for.
data/scenes:      drawn = --sequences 21600 1000 1100 --frames 1
data/scenes-300:  drawn = --sequences 300 60 1
data/scenes-1500: drawn = --sequences 1500 150 1 --frames 7
data/scenes-both: drawn = --sequences 10800 600 1 --frames 1 --with data/afo
data/scenes-both: | data/afo
$(GENERATED): | .venv/installed
	$(PY) data.py generate --seed 1 $(drawn) --out $@

data/afo: | .venv/installed
	$(PY) data.py download --out $@ $(if $(AFO_ARCHIVE),--archive $(AFO_ARCHIVE))

data/afo-blurred: | data/afo
	$(PY) -m tools.blur_masks data/afo $@

check: | $(DATA_DIR) .venv/installed  ## list all problems of the data, and show samples with their masks
	$(PY) data.py check $(if $(OWN),--config $(OWN),$(DATA_DIR)) --picture report/check-$(DATA_NAME).png

# ---- runs: config → training → test

# RUN.yaml beside the folder RUN is the config asked for, RUN/config.yaml that of the run there. An
# experiment that says itself, not by its base, where its data lie keeps them.
$(RUNS)/%/summary.json: FORCE | $(DATA_DIR) .venv/installed
	@$(PY) config.py --out $(@D).yaml --config configs/$(*D).yaml $(call overlay,$(*D)) $(OWN) \
	  --set name=$(notdir $(*D)) seed=$(patsubst seed%,%,$(*F)) \
	  $(if $(OWN)$(shell grep -s '^data:' configs/$(*D).yaml),,data=$(DATA_DIR)) $(SET)
	@test -f $@ && cmp -s $(@D).yaml $(@D)/config.yaml || \
	  $(PY) train.py --config $(@D).yaml --run-dir $(@D) --resume --overwrite --device $(DEVICE)
FORCE:
$(call files,summary,blurred-masks): | data/afo-blurred

$(RUNS)/%/testing.json: $(RUNS)/%/summary.json
	@$(PY) evaluate.py $(@D)/best.pt --device $(DEVICE) --predictions $(@D)/testing.npz --json $@ > /dev/null

$(RUNS)/%/on-afo.json: $(RUNS)/%/summary.json | data/afo
	@$(PY) evaluate.py $(@D)/best.pt --device $(DEVICE) --data data/afo --json $@ > /dev/null

$(RUNS)/%/on-scenes.json: $(RUNS)/%/summary.json | data/scenes
	@$(PY) evaluate.py $(@D)/best.pt --device $(DEVICE) --data data/scenes --json $@ > /dev/null

$(foreach name,$(NAMED),$(eval train-$(name): $(call files,testing,$(name))))
overfit: $(call files,summary,$(OVERFIT:%=overfit/%))  ## force the models to overfit, with scores on validation
tune: $(call files,summary,tuned $(TUNE:%=tune/%))  ## learning rate, dropout, width, kernel, skip, head, loss of tuned, on validation
augment: $(call files,testing,tuned $(AUGMENT:%=augment/%))  ## flips, blur, jitter: the lab's nine runs and ours
heads: $(call files,summary,$(HEADS:%=heads/%))  ## how classes die in the lab's models, and what keeps them alive
final: $(call files,testing,final)  ## tuned with flips and twice the epochs

$(NAMED:%=train-%) overfit tune augment heads final:
	@$(PY) evaluate.py $^

scenes: | data/afo $(GENERATED)  ## what scenes are worth: best on real and generated ones, tested on both
	@$(MAKE) --no-print-directory DATA=afo RUNS=runs PROFILE=full $(foreach name,$(SCENES:%=runs/scenes/%),\
	  $(foreach seed,$(SEEDS),$(addprefix $(name)/seed$(seed)/,on-afo.json on-scenes.json)))
	@$(PY) -m tools.scenes runs/scenes

# Named in one command with -j, the report waits for the experiments.
report: $(call files,testing,$(MODELS)) | $(filter overfit tune augment heads final,$(MAKECMDGOALS))  ## train and test the four models, write report/, print the comparison table
	@$(PY) -m tools.report --runs $(RUNS) --out report
	@$(PY) evaluate.py $^

publish: | $(filter-out publish results,$(MAKECMDGOALS))  ## copy the small files of the finished runs below RUNS to results/, which git keeps
	@test -d $(RUNS) && test $(RUNS) != $(RUNS:runs/%=%) || { echo "error: RUNS=$(RUNS): must be a folder below runs/" >&2; exit 2; }
	@find $(RUNS:%/=%) -name summary.json | while read -r file; do run=$${file%/*}; kept=results/$${run#runs/}; \
	  rm -rf $$kept && mkdir -p $$kept && cp $$run/config.yaml $$run/metrics.jsonl $$run/*.json $$kept || exit 2; done

results: | .venv/installed $(filter-out results,$(MAKECMDGOALS))  ## write RESULTS.md and the tables of README.md from results/ alone
	@$(PY) -m tools.results

predict: | .venv/installed  ## predict IMAGES="a.png folder/" into OUT, with CHECKPOINT (default: the weights shipped)
	@$(PY) predict.py --checkpoint $(CHECKPOINT) --out $(OUT) --device $(DEVICE) -- $(IMAGES)

tensorboard: | .venv/installed  ## look at the runs in a browser
	$(PY) -m tensorboard.main --logdir runs

doctor: | .venv/installed  ## say what is wrong with the run RUN=runs/... and what to try
	@$(PY) -m tools.doctor $(or $(RUN),$(error RUN is missing: make doctor RUN=runs/generated/quick/tuned/seed0)) --device $(DEVICE)

# ---- development

bench: | $(DATA_DIR) .venv/installed  ## measure training speed beside a baseline loop, in one run
	$(PY) -m tools.bench --data $(DATA_DIR) --device $(DEVICE)

speedrun: | data/afo data/scenes  ## a minute of training on generated scenes to a mean IoU of 0.995 on the real test split, three seeds
	@$(MAKE) --no-print-directory DATA=configs/data/scenes.yaml RUNS=runs $(SPEEDRUN)
	@$(PY) evaluate.py $(SPEEDRUN) --goal 0.995

torture: | .venv/installed  ## kill training 50 times at random moments, compare with a run left alone
	$(PY) tests/torture.py

test: | .venv/installed  ## run the tests
	$(PY) -m pytest

lint: | .venv/installed  ## check style
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:  ## remove what make made: runs, reports, predictions, generated data (not .venv, not data/afo)
	rm -rf runs report predictions data/generated data/afo-blurred $(GENERATED)

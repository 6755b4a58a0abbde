# `make demo` and `make test` need Python 3.11 or newer, make and gcc; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := out/demo

.PHONY: demo test lint types unit slow clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,gpu,dev]'
	touch $@

demo: $(STAMP)
	@$(BIN)/python examples/demo.py $(DEMO)

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy -p moec
	@for folder in tests tests/*/ benchmarks examples; do \
		case $$folder in tests) files=tests/conftest.py;; *) files=$$folder;; esac; \
		case $$folder in *__pycache__*) continue;; esac; \
		echo "mypy $$files"; MYPYPATH=$$folder:tests/e2e:tests/families $(BIN)/mypy $$files || exit 1; \
	done

# Tests share two cores: kernels and torch must not each start a thread per core and worker.
unit: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"

slow: $(STAMP)
	$(BIN)/pytest -m slow

clean:
	rm -rf $(VENV) out build

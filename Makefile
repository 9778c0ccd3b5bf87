.PHONY: install demo test test-fast lint style

install:
	python -m pip install -c constraints.txt -e ".[dev]"

demo:
	restune demo

test:
	python -m pytest

test-fast:
	python -m pytest -m "not slow"

lint:
	ruff check .
	ruff format --check .
	mypy

style:
	ruff check --fix .
	ruff format .

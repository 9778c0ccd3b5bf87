.PHONY: install peers demo test test-all lint style

install:
	python -m pip install -c constraints.txt -e ".[dev]"

# Another program whose module is an oracle for ours; what it depends on would collide with what is pinned here. And
# torchao, for its own tests alone: where it is installed, diffusers imports it at every start.
peers:
	python -m pip install --no-deps ms-swift==4.6.0
	python -m pip install --no-deps --target build/peers torchao==0.18.0

demo:
	restune demo

test:
	python -m pytest --numprocesses=2 --dist=loadfile

# Learning, compiling, several processes, full-size models: what the unit tests leave out, and they.
test-all:
	python -m pytest tests/unit tests/integration --numprocesses=2 --dist=loadfile

lint:
	ruff check .
	ruff format --check .
	mypy

style:
	ruff check --fix .
	ruff format .

.PHONY: install install-lowest peers demo test test-all test-lowest lint style docs

install:
	python -m pip install -c constraints.txt -e ".[dev]"

# In an environment of its own: the oldest versions that pyproject.toml promises, with the CPU build of torch.
install-lowest:
	python -m pip install "$$(grep '^torch==' constraints.txt)"
	python -m pip install -c constraints-lowest.txt -e ".[tensorboard]" pytest pytest-timeout pytest-xdist hypothesis \
		peft psutil prodigyopt lion-pytorch tomesd==0.1.3 DeepCache==0.1.1

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

# What depends on the versions of diffusers, transformers, PEFT and tyro. Compiling takes minutes, and
# enable_group_offload is newer than the oldest diffusers. The run that is resumed was made with the versions of
# constraints.txt, whose random base has other weights.
LOWEST = tests/unit/test_floors.py $(addprefix tests/unit/,pipelines storage/test_fileformat.py \
	storage/test_files_of_before.py hooks/test_attachment.py tuners/test_tuners.py training/test_train.py \
	cli/test_cli.py)

test-lowest:
	python -m pytest --numprocesses=2 -k "not compile and not group and not checkpoint_resumes" $(LOWEST)

lint:
	ruff check .
	ruff format --check .
	mypy

# The documentation as a site in build/site; a broken link is an error.
docs:
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet

style:
	ruff check --fix .
	ruff format .

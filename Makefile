# Every target first makes the environment: VENV is its folder, PYTHON the interpreter it is made from.
PYTHON ?= python3
VENV ?= .venv
QUICKSTART_FLAGS ?=
PYTEST_FLAGS ?=

INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python

.PHONY: quickstart test test-slow test-frameworks lint types docs package fuzz chaos soak trust lock lock-check victims \
	results results-render bench clean .venv

quickstart: $(INSTALLED)
	$(RUN) -m experiments.quickstart $(QUICKSTART_FLAGS)

# Two processes. Each runs whole files, whose tests share compiled programs; folders with long tests come first.
test: $(INSTALLED)
	$(RUN) -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test-slow: $(INSTALLED)
	$(RUN) -m pytest -m slow $(PYTEST_FLAGS)

# Adapters against the frameworks themselves, which are large: they are installed here only. Torchattacks goes into a
# folder of its own, since it asks for versions of 2020 that it does not need, which `pip check` would find.
test-frameworks: $(INSTALLED)
	$(RUN) -m pip install --quiet --no-input -r .ci/requirements-frameworks.txt
	$(RUN) -m pip install --quiet --no-input --no-deps --upgrade --target $(VENV)-torchattacks torchattacks==3.5.1
	PYTHONPATH=$(VENV)-torchattacks $(RUN) -m pytest -m frameworks tests/models tests/interop tests/docs tests/experiments/studies/test_public_models.py tests/test_benchmarks.py $(PYTEST_FLAGS)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pip check

types: $(INSTALLED)
	$(RUN) -m pyrefly check

# The site, in docs/_build/html. Warnings are errors; links to other sites are checked for their form only.
docs: $(INSTALLED)
	$(RUN) -m pip install --quiet --no-input --no-compile -r .ci/requirements-docs.txt
	$(RUN) -m sphinx --builder html --fail-on-warning --keep-going --quiet --fresh-env --jobs 2 docs docs/_build/html
	$(RUN) .ci/check_links.py docs/_build/html

# Builds the distribution, checks it, installs it into an empty environment and tests it there.
package:
	rm -rf $(VENV)-package dist
	$(PYTHON) -m venv $(VENV)-package
	$(VENV)-package/bin/python -m pip install --quiet --no-input -r .ci/requirements-package.txt
	$(VENV)-package/bin/python -m build --outdir dist . > /dev/null
	$(VENV)-package/bin/python -m twine check --strict dist/*
	$(PYTHON) .ci/check_package.py dist

# Damaged files, cards, archives, flags, answers and folders: more than 10,000, in minutes on one core. See SECURITY.md.
fuzz: $(INSTALLED)
	$(RUN) -m tests.fuzz --output=results/fuzz.json

# Runs of meta-training that are killed 300 times, resumed, and compared with one that is not: minutes on one core.
chaos: $(INSTALLED)
	$(RUN) -m tests.chaos --output=results/chaos.json

# Attacks on 1,000 models, and meta-training, in one process for half an hour: what does its memory do?
soak: $(INSTALLED)
	$(RUN) -m tests.soak --output=results/soak.json

# All that measures reliability: killed runs, properties, meta-gradients, fuzz, soak. Goes on where it stopped.
trust: $(INSTALLED)
	$(RUN) -m tests.trust --output=results/reliability.json

# The versions of requirements.txt and of all below them, with the hashes of their files.
lock: $(INSTALLED)
	$(RUN) -m pip install --quiet --no-input -r .ci/requirements-lock.txt
	$(RUN) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" --output-file .ci/requirements.lock requirements.txt

# Downloads all files of the lock, checks their hashes and that they fit together; installs nothing.
lock-check: $(INSTALLED)
	$(RUN) -m pip install --quiet --no-input --dry-run --ignore-installed --require-hashes -r .ci/requirements.lock

# Trains the victims that are missing in victims/, then runs the studies. They need TFDS_DATA_DIR.
victims: $(INSTALLED)
	$(RUN) -m experiments.studies.victims

results: victims
	$(RUN) -m experiments.studies.study --study=hard --attacked=mnist_small_cnn_1000 --output=results/hard/mnist.json
	$(RUN) -m experiments.studies.study --study=hard --attacked=mnist_vgg_1001 --output=results/hard/mnist_vgg.json
	$(RUN) -m experiments.studies.study --study=hard --attacked=cifar10_small_cnn_1000 --output=results/hard/cifar10.json
	$(RUN) -m experiments.studies.study --study=hard --attacked=cifar10_vgg_1001 --output=results/hard/cifar10_vgg.json
	$(RUN) -m experiments.studies.study --study=hard --attacked=digits --output=results/hard/digits.json
	$(RUN) -m experiments.studies.study --study=five_images --attacked=mnist_small_cnn_1000 \
		--output=results/five_images/mnist.json
	$(RUN) -m experiments.studies.study --study=five_images --attacked=cifar10_small_cnn_1000 \
		--output=results/five_images/cifar10.json
	$(RUN) -m experiments.studies.study --study=five_images --attacked=digits --output=results/five_images/digits.json
	$(RUN) -m experiments.studies.study --study=paper --attacked=mnist_small_cnn_1000,cifar10_small_cnn_1000
	$(RUN) -m experiments.studies.study --study=query --attacked=digits --output=results/query/digits.json
	$(RUN) -m experiments.studies.study --study=query --attacked=mnist_small_cnn_1000 --output=results/query/mnist.json
	$(RUN) -m experiments.studies.study --study=query --attacked=cifar10_small_cnn_1000 --output=results/query/cifar10.json
	$(RUN) -m experiments.train_victim --source=mnist_5k --seed=1000
	$(RUN) -m experiments.train_victim --source=mnist_5k --seed=1000 --architecture=lenet
	$(RUN) -m experiments.evaluate --preset=study --output=results/query/mnist_5k.json --num_validation=5 \
		--learned=runs/studies/query/lft_cifar10_0,runs/studies/query/lft_cifar10_1,runs/studies/query/lft_cifar10_2 \
		--victims=runs/victims/mnist_5k_small_cnn_1000,runs/victims/mnist_5k_lenet_1000 --methods=sgd,adam,adamm
	$(RUN) -m experiments.studies.study --study=l2 --attacked=mnist_small_cnn_1000,cifar10_small_cnn_1000,digits
	$(RUN) -m experiments.studies.ablation \
		--variants='base,no features but momenta,no spread,no context,no progress,no constraint'
	$(RUN) -m experiments.studies.ablation --variants='base,momenta and context,no spread' --seeds=6 \
		--output=results/ablation_seeds.json
	$(RUN) -m experiments.studies.ablation --output=results/ablation_parts.json --variants="base,coordinatewise,no start,\
momenta alone,one victim a source,learned on support images,log_sign for momenta,no augmentation"
	$(RUN) -m experiments.studies.ablation --variants="base,the paper's rule" --seeds=1 --output=results/ablation_paper.json
	$(RUN) -m experiments.studies.ablation --variants='no augmentation,learned on support images without augmentation' \
		--seeds=1 --architectures=small_cnn --workdir=runs/ablation_small --output=results/ablation_support.json
	$(RUN) -m experiments.studies.ablation --variants='base,twenty times the meta-steps' --seeds=1 \
		--output=results/ablation_steps.json
	$(RUN) -m experiments.studies.ablation --study=query --output=results/ablation_search.json \
		--variants='base,60% of the queries to search,80% of the queries to search,90% of the queries to search'
	$(RUN) -m experiments.studies.ablation --study=query --seeds=1 --architectures=small_cnn --meta_steps=40 --num_tasks=40 \
		--workdir=runs/ablation_small
	$(RUN) -m experiments.studies.directions
	$(RUN) -m experiments.studies.breadth
	$(RUN) -m experiments.studies.theory_gap --victim=victims/mnist_small_cnn_1000 --num_tasks=20
	$(RUN) -m experiments.studies.sine
	$(RUN) -m experiments.studies.zo_l2l
	$(RUN) -m experiments.studies.classification
	$(MAKE) results-render

results-render: $(INSTALLED)
	$(RUN) -m experiments.report.render

bench: $(INSTALLED)
	$(RUN) -m pip install --quiet --no-input -r benchmarks/requirements.txt
	$(RUN) -m benchmarks.meta_step
	$(RUN) -m benchmarks.rewriting
	$(RUN) -m benchmarks.first
	$(RUN) -m benchmarks.adapters
	$(RUN) -m benchmarks.overhead
	$(RUN) -m benchmarks.uap
	$(RUN) -m benchmarks.growth
	$(RUN) -m benchmarks.render

.venv: $(INSTALLED)

# --no-compile halves the installation time; modules are compiled when they are first imported.
$(INSTALLED): requirements.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lft_jax needs Python 3.11 or later; set PYTHON.")'
	@echo "Installing into $(VENV); this takes a minute or two."
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-input --no-compile -r requirements.txt
	$(RUN) -m pip install --quiet --no-input --no-compile --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-package $(VENV)-torchattacks build dist docs/_build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find lft_jax experiments benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

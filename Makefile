# Everything runs in .venv, which is made on first use and again when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := examples/emoji/model
DEMO := build/demo
HERE := not slow and not gpu and not npu and not jetson

# What setup did not compile is compiled once and kept, or each of the many processes of the tests would do it again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup npu-compiler schema demo test test-all test-int8 test-slow fuzz interop lint format types imports check-all bench bench-peers eval ablation example claim routers typed report-picture clean

help: ## list what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(READY) ## make .venv with everything the compiler, the tests and the training need

# torch first and by itself: a later install must find it satisfied rather than pick another build. Most modules are
# never imported: Python compiles the others when they are.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[compile,rtx,train,bench,deploy,serve,cluster,dev]'
	@touch $@

npu-compiler: $(READY) ## set up Intel's NPU compiler (Debian/Ubuntu without an Intel NPU: under Wine)
	$(BIN)/python -m targets.npu

demo: $(READY) ## compile the example model to INT8 for this CPU, check it, and make a picture with each of its four tasks
	@BIN=$(BIN) MODEL=$(MODEL) OUT=$(DEMO) sh examples/emoji/demo.sh

# A worker for each core, and one thread in each: more would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(READY) ## run the tests but those that take ten seconds to minutes each
	$(PYTEST)

test-all: $(READY) ## run those, too
	$(PYTEST) -m '$(HERE)'

# Seconds of tests: one process, which imports nothing but them. Whole builds try lesser CPUs themselves, in test-all.
test-int8: $(READY) ## run the quick tests of INT8 layers alone; with ONEDNN_MAX_CPU_ISA=AVX2 as on a lesser CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'int8 and not heavy and $(HERE)' \
		$$(grep -rl --include='test_*.py' 'pytest\.mark\.int8' tests)

test-slow: $(READY) ## run the largest tests too (SD 1.5-sized graphs: 16 GB of memory)
	$(BIN)/python -m pytest -m 'slow or not slow' -n 0

# One process each, one after the other; what is learnt is kept in build/fuzz, and a fault ends its run with its input there.
FUZZ ?= reference onnx archive manifest signature signed-manifest
RUNS ?= 200000
fuzz: $(READY) ## fuzz the readers of what comes from elsewhere for an hour or two (RUNS=inputs for each, FUZZ="names")
	@for name in $(FUZZ); do mkdir -p build/fuzz/$$name; \
		$(BIN)/python -m tests.fuzz $$name -runs=$(RUNS) -artifact_prefix=build/fuzz/$$name- build/fuzz/$$name || exit 1; done

# optimum-intel wants an older transformers than this project, so it gets an environment of its own.
interop: $(READY) ## open an example bundle with optimum-intel, in .venv-optimum
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-optimum/bin/python -m pip install --quiet --no-deps optimum-intel==2.2.0 optimum==2.3.0
	.venv-optimum/bin/python -m pip install --quiet transformers==5.5.4 huggingface-hub==1.21.0 diffusers==0.39.0 \
		openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 nncf==3.4.0 requests setuptools pillow
	$(BIN)/python -m pytest -m 'slow or not slow' tests/test_interop.py tests/cli/test_sdxl.py

lint: $(READY) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

schema: $(READY) ## write docs/manifest.schema.json anew, after the manifest's dataclasses were changed
	$(BIN)/python -m mtu_compile.bundle.json_schema > docs/manifest.schema.json

format: $(READY) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## mypy, strict
	$(BIN)/mypy

imports: $(READY) ## the layering contract
	$(BIN)/lint-imports

check-all: lint types imports test-all ## what CI runs

bench: $(READY) ## side-by-side timings; writes build/bench/*.json (see docs/benchmarks.md)
	$(BIN)/python -m bench.unet example
	$(BIN)/python -m bench.build example

# Peers want other versions of transformers than this project, and than each other.
bench-peers: $(READY) ## this project beside diffusers, optimum-intel, OpenVINO GenAI, ONNX Runtime and stable-diffusion.cpp
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-peers/bin/python -m pip install --quiet --no-deps optimum-intel==2.2.0 optimum==2.3.0
	.venv-peers/bin/python -m pip install --quiet transformers==5.5.4 huggingface-hub==1.21.0 diffusers==0.39.0 openvino==2026.4.1 \
		openvino-tokenizers==2026.4.1.0 openvino-genai==2026.4.1.0 nncf==3.4.0 requests setuptools pillow accelerate
	.venv-peers/bin/python -m pip install --quiet stable-diffusion-cpp-python==0.4.7 || true
	$(PYTHON) -m venv .venv-peers-onnx
	.venv-peers-onnx/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-peers-onnx/bin/python -m pip install --quiet optimum-onnx==0.1.0 transformers==4.57.6 diffusers==0.35.2 \
		onnxruntime==1.32.0 onnx onnxscript accelerate
	@[ -d build/emoji/held-out ] || $(BIN)/python -m examples.emoji.make_tasks
	$(BIN)/python -m bench.peers example
	$(BIN)/python -m bench.peers sd15
	$(BIN)/python -m bench.peers.page

eval: $(READY) ## accuracy on held-out pictures: INT8 as built, all INT8, bf16, with step times; writes docs/accuracy.md
	@[ -d build/emoji/held-out ] || $(BIN)/python -m examples.emoji.make_tasks
	$(BIN)/python -m bench.eval

ablation: $(READY) ## what each part of the quantisation is worth; writes docs/accuracy.md
	@[ -d build/emoji/held-out ] || $(BIN)/python -m examples.emoji.make_tasks
	$(BIN)/python -m bench.ablation

example: $(READY) ## train the example model anew, from data to checkpoint (hours on two cores, GPU=1: minutes; resumes)
	BIN=$(BIN) GPU=$(GPU) sh examples/emoji/reproduce.sh

claim: $(READY) ## one multi-task network against a network for each task (one data-centre GPU, 9 minutes); writes docs/paper.md
	$(BIN)/python -m examples.emoji.claim --minutes 7 --compile
	$(BIN)/python -m examples.emoji.claim_page

routers: $(READY) ## draw what the example's routers learnt: docs/routers.png, and its table in docs/paper.md
	$(BIN)/python -m examples.emoji.routers

typed: $(READY) ## try prompts as people type them on the bundle of make demo; writes examples/emoji/typed.png and README.md
	$(BIN)/python -m examples.emoji.typed $(DEMO)/bundle

# Text-to-image is left out: what it is checked with are prompts it has never seen, and nobody recognises what it draws.
report-picture: ## photograph the report of make demo, its verdict and editing: docs/report.png (Chromium)
	sed 's|</head>|<style>#task-t2i { display: none }</style></head>|' $(DEMO)/report.html > $(DEMO)/shown.html
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1280,1420 --force-device-scale-factor=0.75 \
		--screenshot=$(CURDIR)/docs/report.png file://$(CURDIR)/$(DEMO)/shown.html

clean: ## remove what was built, keep .venv
	rm -rf build .pytest_cache .mypy_cache .ruff_cache

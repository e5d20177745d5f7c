# make run       set up if needed, then the main job: search, cut and retrain a ViT on real images,
#                and beside it the same cut without a search
# make test      set up if needed, then the tests, but for the slow ones: minutes on two cores
# make test-all  the same, then the slow ones: sanitizers, every kernel compiled for GPUs, kills
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
OUTPUT ?= runs/digits
# The extension is built against the torch that is installed, not against a second download.
INSTALL = $(GPUS) $(PY) -m pip install -v --no-build-isolation --no-deps
# A build that is not to be given away needs CUDA kernels for the GPU that is here, or for one
# generation, to see that they compile; all those of setup.py take four times as long.
TORCH_CUDA_ARCH_LIST ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader \
  2> /dev/null | grep -x '[0-9]*\.[0-9]' | sort -u | tr '\n' ' '),9.0)
GPUS = TORCH_CUDA_ARCH_LIST="$(TORCH_CUDA_ARCH_LIST)"
CXX_FILES = $$(find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml

.PHONY: run test test-all test-oldest-timm bench bench-cpu lint format aot ptxas gpu asan fuzz tsan soak clean
.PHONY: ablation evidence gpu-install gpu-test gpu-bench gpu-bench-ops gpu-bench-step gpu-bench-model gpu-sanitize

run: $(VENV)/.built
	$(PY) -m vitslim run --data digits --budget macs=60% --compress --output $(OUTPUT) --resume
	@echo "report: $(OUTPUT)/report/index.html"

# How many processes share the tests' files, each with one thread; 0 for none but pytest itself.
JOBS ?= logical
# A process may take 2 GB, so no more than some.
PYTEST = $(PY) -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
  -p no:benchmark

test: $(VENV)/.built
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m slow

bench: $(VENV)/.built
	$(PY) -m pytest benchmarks -c benchmarks/pytest.ini -s -k "not cuda and not vit_encoder"

# The packed encoder against timm, torch.compile, ONNX Runtime and OpenVINO, then its tables and
# plots. 20 minutes on two cores that do nothing else.
bench-cpu: $(VENV)/.runtimes
	$(PY) -m pytest $(wildcard benchmarks/bench_vit_encoder*.py) -c benchmarks/pytest.ini -s
	$(PY) benchmarks/plots.py
	$(PY) benchmarks/tables.py

# The ablations and the baselines on digits, 5 seeds; stopped, it goes on by the same command.
# Three quarters of an hour on two cores that do nothing else.
ablation: $(VENV)/.runtimes
	$(PY) -m benchmarks.ablation.study
	$(PY) -m benchmarks.ablation.tables

# What a cut without training keeps of a pretrained model, against rivals, on your photos; stopped,
# it goes on by the same command. Hours for thousands of photos: EVIDENCE_OPTIONS="--minutes 60".
#   make evidence DATA=folder:PHOTOS DENSE=FOLDER
EVIDENCE_OUTPUT ?= runs/evidence
evidence: $(VENV)/.runtimes
	$(PY) -m benchmarks.evidence.study --data $(DATA) $(if $(DENSE),--dense $(DENSE)) \
	  --output $(EVIDENCE_OUTPUT) $(EVIDENCE_OPTIONS)
	$(PY) -m benchmarks.evidence.tables $(EVIDENCE_OUTPUT)/evidence-*.json

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# What the Triton kernels compile to on every GPU they are for: registers, spills, shared memory,
# tensor-core instructions. No GPU is needed; long on two cores, half an hour by estimate.
aot: $(VENV)/.built
	$(PY) tests/aot.py --all

# The same of the CUDA kernels, by nvcc: registers, spills, stack; fails where a kernel spills.
ptxas: $(VENV)/.installed
	$(PY) tests/ptxas.py

# The suite of a machine with a GPU and its own torch, in steps of a few minutes each; without -m
# pytest chooses slow tests too.
# -P keeps the source tree, which holds no compiled module, off the path.
GPU_PY ?= python3 -P
# Most of the tests' time is compiling: with pytest-xdist, GPU_TEST="-n 8" shares it out.
GPU_TEST ?=
GPU_BENCH = $(GPU_PY) -m pytest -c benchmarks/pytest.ini -q -s
# Small shapes, odd strides, both dtypes. Triton compiles before anything runs under the tool.
GPU_SMALL = tests/ops -q \
  -k "cuda and (triton or native) and (strided or stride_zero or empty or bits)"
SANITIZE = compute-sanitizer --error-exitcode 1 --target-processes application-only

gpu: gpu-install gpu-test gpu-bench gpu-sanitize

gpu-install:
	$(GPUS) $(GPU_PY) -m pip install -v --no-build-isolation --no-deps .

gpu-test:
	$(GPU_PY) -m pytest $(GPU_TEST) tests/ops -k cuda
	$(GPU_PY) -m pytest $(GPU_TEST) tests/layers tests/test_surgery.py tests/workflow/training/test_training_on_cuda.py
	$(GPU_PY) -m pytest tests/ops/test_native.py tests/test_bfloat16_products.py -rs
	$(GPU_BENCH) --smoke $(wildcard benchmarks/bench_*_cuda.py)

gpu-bench: gpu-bench-ops gpu-bench-step gpu-bench-model

gpu-bench-ops:
	$(GPU_BENCH) $(filter-out %search_step_cuda.py %model_cuda.py,$(wildcard benchmarks/bench_*_cuda.py))

gpu-bench-step:
	$(GPU_BENCH) benchmarks/bench_search_step_cuda.py

gpu-bench-model:
	$(GPU_BENCH) benchmarks/bench_model_cuda.py

gpu-sanitize:
	$(GPU_PY) -m pytest $(GPU_SMALL)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZE) --tool memcheck $(GPU_PY) -m pytest $(GPU_SMALL)
	$(SANITIZE) --tool racecheck $(GPU_PY) -m pytest $(GPU_SMALL)

# The kernels under AddressSanitizer and UBSan, in a copy so that the ordinary build stays.
ASAN := build/asan
asan: $(VENV)/.installed
	rm -rf $(ASAN) && mkdir -p $(ASAN)
	cp -r csrc vitslim triton_kernels tests setup.py pyproject.toml README.md LICENSE $(ASAN)
	rm -f $(ASAN)/vitslim/_C*.so
	cd $(ASAN) && VITSLIM_SANITIZE=address,undefined VITSLIM_CUDA=0 \
	  $(abspath $(PY)) setup.py -q build_ext --inplace
	cd $(ASAN) && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(abspath $(PY)) -m pytest tests/ops/test_ragged_attention.py tests/ops/test_native.py \
	  -k "native or instruction" -p no:cacheprovider

# The CPU kernels alone, in a program without Python (tests/native): random cases with arrays that
# have no slack, several callers at once, and many calls. SEED=1 gives other cases.
SEED ?= 0
STRESS := build/stress
fuzz:
	$(MAKE) -C tests/native address
	$(STRESS)/address/stress fuzz 10000 $(SEED)
	$(STRESS)/address/stress broken 20000 $(SEED)

tsan:
	$(MAKE) -C tests/native thread
	TSAN_OPTIONS=halt_on_error=1 $(STRESS)/thread/stress threads 120 $(SEED)

soak:
	$(MAKE) -C tests/native plain
	$(STRESS)/plain/stress soak 5000000 $(SEED)

# The oldest timm that is supported; the tests of everything that touches timm.
OLDEST_TIMM := 1.0.16
test-oldest-timm: $(VENV)/.built
	$(PY) -m pip install -q --no-deps --target build/timm-$(OLDEST_TIMM) --upgrade timm==$(OLDEST_TIMM)
	PYTHONPATH=build/timm-$(OLDEST_TIMM) $(PYTEST) -q \
	  -m "not slow" tests/layers tests/oneshot tests/packed tests/test_surgery.py tests/test_checkpoint.py \
	  tests/test_cost.py tests/test_description.py tests/test_variants.py tests/test_wrapped.py

clean:
	rm -rf build dist *.egg-info vitslim/_C*.so $(VENV)/.built $(VENV)/.runtimes

$(VENV)/.installed: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

# Of the runtimes that are compared, and of nothing else.
$(VENV)/.runtimes: $(VENV)/.built benchmarks/requirements.txt
	$(PY) -m pip install -q --disable-pip-version-check -r benchmarks/requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@$(INSTALL) -e . > $(VENV)/build.log 2>&1 || { tail -40 $(VENV)/build.log; exit 1; }
	@grep -h "^ *vitslim: " $(VENV)/build.log | tail -1
	touch $@

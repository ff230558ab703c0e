# make check: lint, rules and the fast tests.  make test: everything CI checks.  make gate, make cuda-check: compile every kernel.  make bare: torch and this alone.
# make demo: a fine-tuning run on real weights.  make bench: CPU figures, tables and plots.  make docs: the pages as a site, links checked.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# every package at the version that constraints.txt names: what is set up next month is what was tested; modules are compiled as they are imported, not all at set-up
PIN := pip install --quiet --no-compile --constraint constraints.txt
# for a CPU build of torch; a CUDA build requires one Triton and brings it
TRITON := triton==3.9.0; platform_system == 'Linux'

# torch first, so that no later requirement picks another build; setuptools builds the package itself
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIN) torch setuptools
	$(BIN)/pip show torch | grep "^Requires:.*triton" >/dev/null || $(BIN)/$(PIN) "$(TRITON)"
	touch $@

$(VENV)/demo $(VENV)/dev: $(VENV)/%: $(VENV)/torch pyproject.toml
	$(BIN)/$(PIN) --no-build-isolation --editable ".[$*]"
	touch $@

# what a user's first two commands make, with neither PEFT nor Transformers nor a test runner
$(VENV)/bare/torch: constraints.txt
	$(PYTHON) -m venv --clear $(VENV)/bare
	$(VENV)/bare/bin/$(PIN) torch
	touch $@

# an older Triton beside the environment's, as torch 2.11 brings it: the gate runs on both
$(VENV)/triton-3.6: $(VENV)/torch
	$(BIN)/pip install --quiet --no-compile --no-deps --target $@ "triton==3.6.0"

# CUDA's compiler as a library, as CUDA builds of PyTorch bring it: csrc/ is compiled by it, and by nvcc where that is
$(VENV)/nvrtc: $(VENV)/torch
	$(BIN)/pip install --quiet --no-compile --no-deps --target $@ "nvidia-cuda-nvrtc==13.0.88" \
	  || { rm -rf $@; echo "NOT CHECKED: csrc/ by NVRTC, since that does not install"; }

# CUTLASS's headers, which tests compare csrc/'s layouts with
$(VENV)/cutlass: $(VENV)/torch
	$(BIN)/pip install --quiet --no-compile --no-deps --target $@ "nvidia-cutlass==4.2.0.0"

# DeepSpeed for the tests of ZeRO-3, and what it imports; where it does not install they are skipped, and this says so
$(VENV)/deepspeed: $(VENV)/dev
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-compile --no-deps --no-build-isolation --target $@ "deepspeed==0.19.8" \
	  "hjson==3.1.0" "einops==0.8.1" "msgpack==1.1.2" "py-cpuinfo==9.0.0" \
	  || { rm -rf $@; echo "NOT CHECKED: ZeRO-3, since DeepSpeed does not install"; }

# torchao for the tests of its weights, apart since Transformers and PEFT import it wherever they find it, for seconds
$(VENV)/torchao: $(VENV)/torch
	$(BIN)/pip install --quiet --no-compile --no-deps --target $@ "torchao==0.18.0"

# TRL and what it imports; where they do not install the tests of its trainers are skipped, and this says so
$(VENV)/trl: $(VENV)/dev
	$(BIN)/pip install --quiet --no-compile --no-deps --target $@ "trl==1.16.0" "datasets==5.2.0" "dill==0.4.1" \
	  "multiprocess==0.70.19" "xxhash==4.1.0" "pandas==3.1.1" "pyarrow==23.0.1" \
	  || { rm -rf $@; echo "NOT CHECKED: TRL's trainers, since TRL does not install"; }

# what builds the pages, apart: the extra "docs" without the package and PyTorch
DOCS := $(shell sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')
$(VENV)/docs/mkdocs: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/$(PIN) $(DOCS)
	touch $@

.PHONY: lint check test docs bare gate cuda-check demo bench bench-gpu report clean

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# a worker a core, each with one thread of PyTorch's; the tests of a file stay together, and share what they build
PYTEST := OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

check: lint
	$(PYTEST) -m "not slow"

test: lint docs bare gate cuda-check $(VENV)/cutlass $(VENV)/deepspeed $(VENV)/torchao $(VENV)/trl
	$(PYTEST)

bare: $(VENV)/bare/torch
	rm -rf build/lib  # or files of an earlier build come back in this one
	$(VENV)/bare/bin/$(PIN) .
	$(VENV)/bare/bin/python tests/bare_install.py

# every plan of csrc/'s GEMM, without a GPU, by NVRTC and by nvcc where that is: no spills, wgmma and TMA in each, no warning of ptxas
cuda-check: $(VENV)/dev $(VENV)/nvrtc
	if [ -d $(VENV)/nvrtc ] || command -v nvcc >/dev/null; then \
	  PYTHONPATH=$(VENV)/nvrtc $(BIN)/python -m fused_peft compile --arch sm_90a --out build/cuda --json build/cuda/report.json; \
	else echo "NOT CHECKED: csrc/, since neither NVRTC nor nvcc is installed"; fi

# every kernel compiled without a GPU: no spills, shared memory that fits, tensor cores used. For sm_90 every two options
# of a kernel together, on the older Triton each; for sm_80 and sm_100 each; for the others what differs from sm_80
# (make gate COVER=0: all that there are, for each)
COVER ?= 2
EACH := $(if $(filter 2,$(COVER)),1,$(COVER))
GATE = $(BIN)/python -m fused_peft compile --arch $(1) --cover $(2) --out out/gate/$(1)$(3) --json out/gate/$(1)$(3).json
BESIDE := $(if $(filter 2,$(COVER)),--beside sm_80)
gate: $(VENV)/dev $(VENV)/triton-3.6
	$(call GATE,sm_90,$(COVER))
	PYTHONPATH=$(VENV)/triton-3.6 $(call GATE,sm_90,$(EACH),-triton-3.6)
	$(call GATE,sm_80,$(EACH))
	$(call GATE,sm_100,$(EACH))
	for arch in sm_86 sm_89 sm_120; do $(call GATE,$$arch,$(EACH)) $(BESIDE) || exit 1; done

demo: $(VENV)/demo
	$(BIN)/python bench/demo.py $(if $(METHODS),--methods $(METHODS))

bench: $(VENV)/dev
	$(BIN)/python -m pytest bench --benchmark-columns=median --results bench/results/cpu
	$(BIN)/python bench/estimate.py --out bench/results/estimate.csv
	$(BIN)/python bench/experts.py --out bench/results/experts_predicted.csv
	$(BIN)/python bench/packed.py --out bench/results/packed_predicted.csv
	$(BIN)/python bench/hopper.py --out bench/results/hopper_predicted.csv
	$(MAKE) report

# in the Python environment of a GPU machine, whose PyTorch has CUDA
bench-gpu:
	status=0; for stage in 1 2 3; do bench/gpu.sh $$stage || status=1; done; exit $$status

report: $(VENV)/dev
	$(BIN)/python bench/report.py
	$(BIN)/python bench/plot.py

# the pages as a site in build/docs, every link and heading in them checked: laid out as in the repository, with what README.md and its
# neighbours link to, so that links hold in both
docs: $(VENV)/docs/mkdocs
	rm -rf build/pages
	mkdir -p build/pages
	tar -cf - *.md docs csrc/README.md $$(grep -ohE '\]\([A-Za-z][^):#]*[#)]' *.md | tr -d '](#)' | sort -u) | tar -xf - -C build/pages
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info out

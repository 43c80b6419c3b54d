# The benchmarks: what each shows is in docs/performance.md and docs/overlap.md. Included by the Makefile.
# Samples go to bench/results/local/, which git ignores; README and docs/ cite those in bench/results/.
.PHONY: bench bench-overlap bench-link bench-layer bench-nodes figures
bench: setup  ## dispatch and combine over commlib, gloo, MPI and its shared windows, RANKS=4
	$(LAUNCH) bench/dispatch_combine.py

bench-overlap: setup  ## communication beside compute: on cores of their own; on slow links, with a whole MoE layer
	$(call launch,1) bench/overlap.py --tokens 4096 --hidden 7168 --experts 64 --topk 8
	$(call launch,2) bench/overlap.py

bench-link: RANKS = 8
bench-link: setup  ## what an H800's link leaves, slowed down; how few threads fill it; RANKS=8
	$(LAUNCH) bench/dispatch_combine.py --preset h800

bench-layer: setup  ## a whole MoE layer over commlib and over all-to-alls; RANKS=4; LAYER_BENCH="--tokens 1024"
	$(LAUNCH) bench/moe_layer.py $(LAYER_BENCH)

bench-nodes: setup  ## as root: across nodes whose links are limited for real; NODES_BENCH=--small
	PATH="$(BIN):$$PATH" $(BIN)/python bench/nodes.py $(NODES_BENCH)

figures: setup  ## the tables in README.md and docs/, from the samples in bench/results/
	$(BIN)/python bench/figures.py

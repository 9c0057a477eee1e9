# Everything that is done with this project by hand or by a machine. "make help" lists it.

CARGO ?= cargo
SOAK_MINUTES ?= 30

# rustup keeps cargo in a place that a fresh shell does not look at.
export PATH := $(PATH):$(HOME)/.cargo/bin

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-guest check sim soak bench bench-scale bench-policy bench-page

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | column -t -s @
	@echo
	@echo "  variables: SEED=n (one simulator run), N=n (that many), SOAK_MINUTES=n,"
	@echo "             ROWS=name,name (of the benchmark), ARGS=\"--peer 'name=command with {sock} {img}'\""

setup: ## install what is missing (Debian, Ubuntu); quick when nothing is
	@scripts/setup.sh

build: ## build the release binary
	$(CARGO) build --release --locked

demo: setup ## format, write, restart and read a disk from a virtual machine; shows what the cache did
	@scripts/demo.sh

test: setup ## every test, the ones with a virtual machine included
	$(CARGO) test --locked --no-fail-fast

test-guest: setup ## only the tests with a virtual machine
	$(CARGO) test --locked --test guest

check: ## formatting, lints and the quick tests
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) test --locked --lib --bins --test tidy

sim: ## the simulator: make sim SEED=7 replays one run, make sim N=1000 tries that many
	@$(if $(SEED),GENBLK_SIM_SEED=$(SEED),GENBLK_SIM_COUNT=$(or $(N),100)) \
		$(CARGO) test --release --locked --lib sim::seeds_from_the_environment -- --nocapture

soak: setup ## simulator, kills and guest tests over and over, SOAK_MINUTES long
	@end=$$(( $$(date +%s) + $(SOAK_MINUTES) * 60 )); round=0; \
	while [ $$(date +%s) -lt $$end ]; do \
		round=$$((round + 1)); echo "soak: round $$round"; \
		$(MAKE) --no-print-directory sim SEED= N=1000 && \
		GENBLK_KILLS=200 $(CARGO) test --release --locked --test survival && \
		GENBLK_CRASH_POINTS=2000 $(CARGO) test --release --locked --test guest || exit 1; \
	done; echo "soak: $$round rounds, no failure"

bench: setup ## measure against other servers and the limit (about 15 minutes; some rows need root, for their disks)
	$(CARGO) bench --locked --bench load -- compare $(if $(ROWS),--rows $(ROWS)) $(ARGS)

bench-scale: setup ## how the cost grows with sizes and numbers
	$(CARGO) bench --locked --bench load -- scale $(ARGS)

bench-policy: ## miss ratios against LRU, CLOCK, ARC and OPT; readahead on a model store; fails where a demand is not met
	$(CARGO) bench --locked --bench miss_ratio
	$(CARGO) bench --locked --bench readahead

bench-page: ## what the cache itself takes for a page, in nanoseconds: where the noise of a machine hides what a change did
	$(CARGO) bench --locked --bench page_cost

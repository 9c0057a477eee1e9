# Every task of development and continuous integration. "make help" lists them.

CARGO ?= cargo
SOAK_MINUTES ?= 30

# rustup installs cargo in a directory that a fresh shell's PATH lacks.
export PATH := $(PATH):$(HOME)/.cargo/bin

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-guest check sim mutants soak bench bench-scale bench-policy bench-page

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | column -t -s @
	@echo
	@echo "  variables: SEED=n, N=n, FIRST=n (simulator), BUG=text (mutants), SOAK_MINUTES=n, ROWS=name,name (of make bench),"
	@echo "             ARGS=\"--peer 'name=command with {sock} {img}'\" (another server for make bench)"

setup: ## get what building and testing need (Debian, Ubuntu); quick when nothing is missing
	@scripts/setup.sh

build: ## build the release binary
	$(CARGO) build --release --locked

demo: setup ## a guest writes, reads, and survives a kill of its disk's daemon (1 minute)
	@scripts/demo.sh

test: setup ## every test, those with a virtual machine included (6 minutes)
	$(CARGO) test --locked --no-fail-fast

test-guest: setup ## only the tests with a virtual machine (3 minutes)
	$(CARGO) test --locked --test guest

check: ## formatting, lints, documentation, dependencies and unit tests (2 minutes)
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items
	scripts/check-dependencies.sh
	$(CARGO) test --locked --lib --bins --test tidy

sim: ## both simulators, cache and daemon: SEED=n replays one run, N=n runs that many (100 unless given), FIRST=n on
	@$(if $(SEED),GENBLK_SIM_SEED=$(SEED),GENBLK_SIM_COUNT=$(or $(N),100) GENBLK_SIM_FIRST=$(or $(FIRST),1000)) \
		$(CARGO) test --release --locked --lib seeds_from_the_environment -- --nocapture

mutants: setup ## plants known bugs one by one; the named test must find each (about 100 minutes); BUG=text selects
	GENBLK_MUTANTS="$(BUG)" $(CARGO) test --locked --test mutations -- --ignored --nocapture

soak: setup ## simulator, kills and guest tests in a loop, SOAK_MINUTES long
	@end=$$(( $$(date +%s) + $(SOAK_MINUTES) * 60 )); round=0; \
	while [ $$(date +%s) -lt $$end ]; do \
		round=$$((round + 1)); echo "soak: round $$round"; \
		$(MAKE) --no-print-directory sim SEED= N=1000 FIRST=$$((round * 1000)) && \
		GENBLK_KILLS=200 GENBLK_EVENTS=300 $(CARGO) test --release --locked --test survival && \
		GENBLK_CRASH_POINTS=2000 $(CARGO) test --release --locked --test guest || exit 1; \
	done; echo "soak: $$round rounds, no failure"

bench: setup ## compare with other servers and the machine's limit (15 minutes; some rows need root)
	$(CARGO) bench --locked --bench load -- compare $(if $(ROWS),--rows $(ROWS)) $(ARGS)

bench-scale: setup ## how cost grows with sizes and numbers
	$(CARGO) bench --locked --bench load -- scale $(ARGS)

bench-policy: ## replacement against LRU, CLOCK, ARC and OPT, and readahead; fails where a target is missed
	$(CARGO) bench --locked --bench miss_ratio
	$(CARGO) bench --locked --bench readahead

bench-page: ## CPU time of the cache itself for a page, in nanoseconds: sees changes that a whole machine hides
	$(CARGO) bench --locked --bench page_cost

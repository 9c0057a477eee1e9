# Every task of development and continuous integration. "make help" lists them.

CARGO ?= cargo
SOAK_MINUTES ?= 30
# Seconds for each fuzz target.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS := request_parse ring_turn inflight_recover wire_relay control_plane cache_ops ledger_decode config store_limits disk_protocol
HOST := x86_64-unknown-linux-gnu

# rustup installs cargo in a directory that a fresh shell's PATH lacks.
export PATH := $(PATH):$(HOME)/.cargo/bin

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-guest check deb package-test manual sim mutants fuzz loom miri sanitize bystander soak \
	bench bench-scale bench-policy bench-page bench-turn

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | column -t -s @
	@echo
	@echo "  variables: SEED=n, N=n, FIRST=n (simulator), BUG=text, SAMPLE=n, SKIP=file (mutants; output of an earlier run;"
	@echo "             bugs that it found are skipped), FUZZ_SECONDS=n, SOAK_MINUTES=n, ROWS=name,name (of make bench),"
	@echo "             ARGS=\"--peer 'name=command with {sock} {img}'\" (another server for make bench),"
	@echo "             BASE=commit (of make bench: compares with that commit, interleaved)"

setup: ## get what building and testing need (Debian, Ubuntu); quick when nothing is missing
	@scripts/setup.sh

build: ## build the release binary
	$(CARGO) build --release --locked

demo: setup ## a guest writes, reads, and survives a kill of its disk's daemon (1 minute)
	@scripts/demo.sh

test: setup ## every test, those with a virtual machine included (9 minutes)
	$(CARGO) test --locked --no-fail-fast
	@$(MAKE) --no-print-directory loom

test-guest: setup ## only the tests with a virtual machine (3 minutes)
	$(CARGO) test --locked --test guest

check: ## formatting, lints, documentation, dependencies and unit tests (2 minutes)
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items
	scripts/check-dependencies.sh
	$(CARGO) test --locked --lib --bins --test tidy

deb: ## build the Debian package, into target/debian (needs cargo-deb: cargo install cargo-deb --locked)
	@scripts/deb.sh release

package-test: ## build the package, check it with lintian, install and purge it in a clean Debian (root, debootstrap, lintian)
	$(CARGO) test --locked --test package -- --ignored --nocapture

manual: ## regenerate the manual pages and shell completions from the command line and the table of keys
	GENBLK_WRITE_MANUAL=1 $(CARGO) test --locked --lib cli::manual

sim: ## both simulators, cache and daemon: SEED=n replays one seed; N=n runs n seeds (default 100), starting at FIRST=n
	@$(if $(SEED),GENBLK_SIM_SEED=$(SEED),GENBLK_SIM_COUNT=$(or $(N),100) GENBLK_SIM_FIRST=$(or $(FIRST),1000)) \
		$(CARGO) test --release --locked --lib seeds_from_the_environment -- --nocapture

mutants: setup ## plants known bugs one by one; the named test must find each (2 hours on a busy machine)
	GENBLK_MUTANTS="$(BUG)" GENBLK_MUTANTS_SAMPLE=$(SAMPLE) GENBLK_MUTANTS_SKIP=$(SKIP) \
		$(CARGO) test --locked --test mutations -- --ignored --nocapture

fuzz: ## every fuzz target for FUZZ_SECONDS: with libFuzzer (a nightly compiler and a C++ compiler), or mutations from a seed
	@scripts/fuzz.sh $(FUZZ_SECONDS) $(FUZZ_TARGETS)

loom: ## fences, wakers and mailboxes in every order of their steps (1 minute; most of it to compile loom)
	cd loom && $(CARGO) test --release --locked -q

miri: ## units of guest memory, rings, ledger and cache under Miri (a nightly compiler with miri and rust-src)
	@scripts/sanitize.sh miri

sanitize: ## Miri; tests under AddressSanitizer, and under ThreadSanitizer with four workers (a nightly compiler)
	@scripts/sanitize.sh

bystander: ## how much a hostile guest slows its neighbours, against the promised bounds (release build, idle machine)
	GENBLK_STRICT=1 $(CARGO) test --release --locked --test bystander --test disk_processes -- --nocapture --test-threads=1

soak: setup ## simulators, kills, guests, fuzzers, package test (root), ten planted bugs: rounds of about 2 hours, until SOAK_MINUTES
	@end=$$(( $$(date +%s) + $(SOAK_MINUTES) * 60 )); round=0; \
	while [ $$(date +%s) -lt $$end ]; do \
		round=$$((round + 1)); echo "soak: round $$round"; \
		$(MAKE) --no-print-directory sim SEED= N=1000 FIRST=$$((round * 1000)) && \
		GENBLK_KILLS=200 GENBLK_EVENTS=300 GENBLK_CHANGES=10000 $(CARGO) test --release --locked --test survival && \
		GENBLK_CRASH_POINTS=2000 $(CARGO) test --release --locked --test guest && \
		$(MAKE) --no-print-directory bystander && \
		$(MAKE) --no-print-directory package-test && \
		$(MAKE) --no-print-directory fuzz FUZZ_SECONDS=600 && \
		$(MAKE) --no-print-directory mutants BUG= SKIP= SAMPLE=10 || exit 1; \
	done; echo "soak: $$round rounds, no failure"

bench: setup ## compare with other servers and the machine's limit (20 minutes; some rows need root)
	$(if $(BASE),base=$$(scripts/base-binary.sh $(BASE)) &&) $(CARGO) bench --locked --bench load -- \
		compare $(if $(ROWS),--rows $(ROWS)) $(if $(BASE),--base "$$base") $(ARGS)

bench-scale: setup ## how cost grows with sizes and numbers
	$(CARGO) bench --locked --bench load -- scale $(ARGS)

bench-policy: ## replacement against LRU, CLOCK, ARC and OPT, and readahead; fails where a target is missed
	$(CARGO) bench --locked --bench miss_ratio
	$(CARGO) bench --locked --bench readahead

bench-turn: ## CPU time of a cached request in a worker, in nanoseconds
	$(CARGO) bench --locked --bench turn_cost

bench-page: ## CPU time of the cache itself for a page, in nanoseconds: shows changes that are lost in the noise of a whole machine
	$(CARGO) bench --locked --bench page_cost

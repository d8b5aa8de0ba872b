# Build, check, install and show. `make demo` and `make test` work on a fresh machine and install what they need.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := all

CARGO ?= cargo
export CARGO
PREFIX ?= /usr/local
DESTDIR ?=
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
ARTIFACTS := $(TARGET)/artifacts
# A build that changes Cargo.lock is a mistake in CI and a convenience elsewhere.
LOCKED := $(if $(filter true,$(CI)),--locked)
# What to run: `make e2e BINARIES=e2e TEST_ARGS=hello`.
BINARIES ?=
TEST_ARGS ?=

# Every step has a limit, in seconds, ten times what it takes on two cores; a limit that strikes says how to raise it.
export LIMIT_LINT ?= 3600
export LIMIT_UNIT ?= 3600
export LIMIT_BUILD ?= 10800
export LIMIT_PROPERTIES ?= 10800
export LIMIT_E2E ?= 7200
export LIMIT_DEMO ?= 1800
export LIMIT_BENCH ?= 3600
export LIMIT_CONFORMANCE ?= 43200
export LIMIT_CONFORMANCE_TEST ?= 600
# $(call limit,NAME,WHAT) COMMAND...
limit = tests/limit $(1) '$(2)'
comma := ,

INSTALL_PACKAGES = bash -c 'source tests/lab/lib.sh; need_packages "$$@"' make

# Whether KVM here runs Linux; then tests run directly, elsewhere in the lab. The command comes with the build.
KVM_RUNS_LINUX = $(ARTIFACTS)/usr/local/bin/kata-ctl check --kvm-can-run-linux

.PHONY: all
all: toolchain ## debug build of the shim and everything beside it
	$(CARGO) build $(LOCKED) --workspace

.PHONY: test
test: ## everything: lint, unit and KVM tests, end-to-end tests
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory e2e

.PHONY: lint
lint: toolchain deny ## formatting, clippy, and what may be depended on
	$(CARGO) fmt --all --check
	$(call limit,LIMIT_LINT,lints) $(CARGO) clippy $(LOCKED) --workspace --all-targets --features tests/e2e,dragonball/e2e -- -D warnings

# Built once, without optimization: a minute of two cores.
DENY_VERSION := 0.20.2
DENY := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/dragonball/cargo-deny/$(DENY_VERSION)
# A clone of rustsec/advisory-db; without one, advisories cannot be looked up (no network but the registry's).
ADVISORY_DB ?=

.PHONY: deny
deny: toolchain ## licences, duplicates and sources of dependencies; advisories with ADVISORY_DB=FOLDER (a clone of advisory-db)
	[ -x $(DENY)/bin/cargo-deny ] || \
	    CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_DEBUG=0 \
	    $(call limit,LIMIT_BUILD,build of cargo-deny) $(CARGO) install --root $(DENY) --locked --no-default-features \
	    --version $(DENY_VERSION) cargo-deny
	$(call limit,LIMIT_LINT,check of dependencies) $(DENY)/bin/cargo-deny --all-features check licenses bans sources
	if [ -n '$(ADVISORY_DB)' ]; then \
	    mkdir -p $(TARGET)/advisory-dbs && ln -sfn $(abspath $(ADVISORY_DB)) $(TARGET)/advisory-dbs/advisory-db-3157b0e258782691; \
	    $(call limit,LIMIT_LINT,look-up of advisories) $(DENY)/bin/cargo-deny --offline --all-features check advisories; \
	else \
	    echo 'advisories: not looked up, ADVISORY_DB names no clone of advisory-db'; \
	fi

.PHONY: unit
unit: setup ## unit tests, and KVM tests with tiny guests
	$(call limit,LIMIT_UNIT,unit and KVM tests) $(CARGO) test $(LOCKED) --workspace

# Input tried by each property test; one that needs a hundred times as long for each gets a hundredth of it.
PROPTEST_CASES ?= 10000

.PHONY: properties
properties: toolchain ## searches for input that property tests fail with: PROPTEST_CASES (10000) each, at random; not part of `make test`
	@$(INSTALL_PACKAGES) acpica-tools
	$(call properties_of,$(PROPTEST_CASES),properties:: --skip slow_properties::)
	$(call properties_of,$$((($(PROPTEST_CASES) + 99) / 100)),slow_properties::)

# $(call properties_of,CASES,TESTS): with another seed each time, whatever is set for `make test`.
properties_of = env -u PROPTEST_RNG_SEED PROPTEST_CASES=$(1) \
    $(call limit,LIMIT_PROPERTIES,property tests) $(CARGO) test $(LOCKED) --workspace --lib -- $(2)

.PHONY: toolchain
toolchain: # what the Rust compiler needs beside itself
	@command -v $(CARGO) >/dev/null || { echo "$(CARGO) not found: install Rust 1.95 or newer" >&2; exit 1; }
	@$(INSTALL_PACKAGES) gcc libc6-dev

.PHONY: setup
setup: toolchain # what tests and demo need on the host
	@$(INSTALL_PACKAGES) containerd runc busybox-static iproute2 iptables nftables containernetworking-plugins socat acpica-tools \
	    erofs-utils cpio xz-utils e2fsprogs mount

.PHONY: kernel
kernel: ## the guest kernel; prints its folder
	@$(call limit,LIMIT_BUILD,guest kernel) kernel-config/build.sh

.PHONY: image
image: ## the guest image
	$(call limit,LIMIT_BUILD,guest image) tests/gather $(ARTIFACTS) image

.PHONY: artifacts
artifacts: setup ## kernel, image, release binaries and test binaries in the installed layout
	$(call limit,LIMIT_BUILD,build of kernel$(comma) image$(comma) binaries and tests) tests/gather $(ARTIFACTS)

# Runs the end-to-end binaries: here where KVM runs Linux, in the lab elsewhere.
define run_e2e
	if $(KVM_RUNS_LINUX); then \
	    for series in 1.7 2.1; do \
	        folder=$$(tests/lab/containerd $$series | tail -n 1)/usr/bin; \
	        export E2E_CONTAINERD_$${series/./_}=$$folder; \
	    done; \
	    $(call limit,LIMIT_E2E,end-to-end tests) $(ARTIFACTS)/e2e/run-e2e here $(1) -- $(2); \
	else \
	    tests/lab/suite $(ARTIFACTS) LIMIT_E2E $(1) -- $(2); \
	fi
endef

.PHONY: e2e
e2e: artifacts ## end-to-end tests: here where KVM runs Linux, in the lab elsewhere
	$(KVM_RUNS_LINUX) || \
	    E2E_LINUX_GUESTS=0 $(call limit,LIMIT_E2E,tests of bad input) $(ARTIFACTS)/e2e/run-e2e here bad_input
	$(call run_e2e,$(BINARIES),$(TEST_ARGS))

.PHONY: try
try: setup ## after an edit, the end-to-end tests whose names hold TEST: make try TEST=hello [BINARIES=e2e]
	@[ -n '$(TEST)' ] || { echo "which? make try TEST=part-of-a-name [BINARIES='linux e2e bad_input compat guests cri']" >&2; exit 2; }
	$(call limit,LIMIT_BUILD,build of what was edited) tests/gather $(ARTIFACTS) kernel image binaries \
	    $(if $(filter-out linux,$(or $(BINARIES),e2e)),tests) $(if $(filter linux,$(BINARIES)),vmm-tests) \
	    $(if $(filter guests linux,$(BINARIES)),guests)
	$(call run_e2e,$(or $(BINARIES),e2e),$(TEST))

STRESS_PODS ?= 20
STRESS_EXECS ?= 300

.PHONY: stress
stress: artifacts ## STRESS_PODS pods at once, STRESS_EXECS commands one after another
	export STRESS_PODS=$(STRESS_PODS) STRESS_EXECS=$(STRESS_EXECS); $(call run_e2e,cri,stress)

.PHONY: bench
bench: toolchain ## set-up time here; boot, memory and throughput beside QEMU in the lab
	$(call limit,LIMIT_UNIT,set-up benchmark) $(CARGO) bench $(LOCKED) -p dragonball --bench setup
	tests/lab/bench

.PHONY: netbench
netbench: setup ## a pod's network beside runc's: RunPodSandbox, streams, datagrams, memory; instruction counts in the lab
	$(call limit,LIMIT_BUILD,build of kernel$(comma) image and binaries) tests/gather $(ARTIFACTS) kernel image binaries netbench
	if $(KVM_RUNS_LINUX); then \
	    E2E_CONTAINERD_1_7=$$(tests/lab/containerd 1.7 | tail -n 1)/usr/bin \
	        $(call limit,LIMIT_BENCH,network bench) $(ARTIFACTS)/e2e/run-e2e here netbench; \
	else \
	    tests/lab/run --artifacts $(ARTIFACTS) --timeout LIMIT_BENCH --icount -- /artifacts/e2e/run-e2e installed netbench; \
	fi

.PHONY: demo
demo: setup ## one container in a microVM, with its timeline
	$(call limit,LIMIT_BUILD,build of kernel$(comma) image and binaries) tests/gather $(ARTIFACTS) kernel image binaries demo
	if $(KVM_RUNS_LINUX); then \
	    $(call limit,LIMIT_DEMO,demo) $(ARTIFACTS)/e2e/run-e2e here demo; \
	else \
	    echo "KVM here cannot run Linux: running in the lab, an emulated machine 5 to 20 times slower than metal"; \
	    tests/lab/run --artifacts $(ARTIFACTS) --timeout LIMIT_DEMO -- /artifacts/e2e/run-e2e installed demo; \
	fi

CONFORMANCE_RESULTS ?= $(TARGET)/conformance
export RUNTIMES ?= runc kata
export CHUNK ?= 16
TESTS ?=

.PHONY: conformance
conformance: setup ## containerd's client and CRI suites in the lab, beside runc, into docs/conformance.md; goes on where it was (TESTS, RUNTIMES)
	$(call limit,LIMIT_BUILD,build of kernel$(comma) image and binaries) tests/gather $(ARTIFACTS) kernel image binaries
	$(call limit,LIMIT_BUILD,build of the suites) tests/conformance/build
	$(call limit,LIMIT_CONFORMANCE,suites of containerd) tests/conformance/conformance $(ARTIFACTS) $(CONFORMANCE_RESULTS) $(TESTS)
	RUNTIMES='runc kata' tests/conformance/report $(CONFORMANCE_RESULTS) >docs/conformance.md

FUZZ_SECONDS ?= 60
# The target is built first.
export LIMIT_FUZZ ?= $(shell echo $$(($(FUZZ_SECONDS) + $(LIMIT_BUILD))))
# vmm/fuzz: what a guest's devices take; runtime/fuzz: text and messages from elsewhere.
FUZZ_TARGETS ?= $(basename $(notdir $(wildcard */fuzz/fuzz_targets/*.rs)))

.PHONY: fuzz
fuzz: toolchain ## each fuzz target for FUZZ_SECONDS; not part of `make test`
	@$(INSTALL_PACKAGES) g++
	[ -x $(TARGET)/cargo-fuzz/bin/cargo-fuzz ] || \
	    $(call limit,LIMIT_BUILD,build of cargo-fuzz) $(CARGO) install --root $(TARGET)/cargo-fuzz --locked cargo-fuzz
	# A guest may make a file as large as it likes: not larger than this, which is an error for it and not the end of us.
	ulimit -f 262144; trap '' XFSZ; \
	export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$(TARGET)/fuzz PATH=$(TARGET)/cargo-fuzz/bin:$$PATH; \
	for target in $(FUZZ_TARGETS); do \
	    file=$$(echo */fuzz/fuzz_targets/$$target.rs); \
	    folder=$${file%/fuzz_targets/*}; \
	    echo "fuzzing $$target of $$folder for $(FUZZ_SECONDS) s"; \
	    mkdir -p $(TARGET)/fuzz-corpus/$$target; \
	    $(call limit,LIMIT_FUZZ,fuzzing of $$target) cargo-fuzz run --fuzz-dir $$folder $$target \
	        $(TARGET)/fuzz-corpus/$$target $$folder/seeds/$$target -- \
	        -max_total_time=$(FUZZ_SECONDS) -timeout=30 -rss_limit_mb=4096 -handle_xfsz=0 -print_final_stats=1; \
	done

.PHONY: install
install: ## install under PREFIX, with its configuration in /etc
	CARGO_PROFILE_RELEASE_LTO=fat CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1 \
	    $(call limit,LIMIT_BUILD,optimized build) \
	    tests/gather $(ARTIFACTS) kernel image binaries
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(ARTIFACTS)/usr/local/bin/*
	install -D -m 644 -t $(DESTDIR)/usr/share/kata-containers \
	    $(ARTIFACTS)/usr/share/kata-containers/vmlinux $(ARTIFACTS)/usr/share/kata-containers/kata-agent.{erofs,initrd}
	# A configuration that is there stays.
	[ -e $(DESTDIR)/etc/kata-containers/configuration.toml ] || \
	    install -D -m 644 -t $(DESTDIR)/etc/kata-containers $(ARTIFACTS)/etc/kata-containers/configuration.toml

.PHONY: clean
clean: ## remove what was built here; the cache of kernel and lab stays
	$(CARGO) clean
	rm -rf $(ARTIFACTS)

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z0-9]*\):.* ## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

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

# Every step has a limit, in seconds, ten times what it takes on two cores.
LIMIT_LINT ?= 1200
LIMIT_UNIT ?= 1800
LIMIT_BUILD ?= 2700
LIMIT_E2E ?= 2700
limit = timeout --kill-after=30

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
lint: toolchain ## formatting and clippy
	$(CARGO) fmt --all --check
	$(limit) $(LIMIT_LINT) $(CARGO) clippy $(LOCKED) --workspace --all-targets --features tests/e2e,dragonball/e2e -- -D warnings

.PHONY: unit
unit: setup ## unit tests, and KVM tests with tiny guests
	$(limit) $(LIMIT_UNIT) $(CARGO) test $(LOCKED) --workspace

.PHONY: toolchain
toolchain: # what the Rust compiler needs beside itself
	@command -v $(CARGO) >/dev/null || { echo "$(CARGO) not found: install Rust 1.95 or newer" >&2; exit 1; }
	@$(INSTALL_PACKAGES) gcc libc6-dev

.PHONY: setup
setup: toolchain # what tests and demo need on the host
	@$(INSTALL_PACKAGES) containerd runc busybox-static iproute2 socat acpica-tools

.PHONY: kernel
kernel: ## the guest kernel; prints its folder
	@$(limit) $(LIMIT_BUILD) kernel-config/build.sh

.PHONY: image
image: ## the guest image
	$(limit) $(LIMIT_BUILD) tests/gather $(ARTIFACTS) image

.PHONY: artifacts
artifacts: setup ## kernel, image, release binaries and test binaries in the installed layout
	$(limit) $(LIMIT_BUILD) tests/gather $(ARTIFACTS)

.PHONY: e2e
e2e: artifacts ## end-to-end tests: here where KVM runs Linux, in the lab elsewhere
	if $(KVM_RUNS_LINUX); then \
	    for series in 1.7 2.1; do \
	        folder=$$(tests/lab/containerd $$series | tail -n 1)/usr/bin; \
	        export E2E_CONTAINERD_$${series/./_}=$$folder; \
	    done; \
	    $(limit) $(LIMIT_E2E) $(ARTIFACTS)/e2e/run-e2e here $(BINARIES) -- $(TEST_ARGS); \
	else \
	    E2E_LINUX_GUESTS=0 $(limit) $(LIMIT_E2E) $(ARTIFACTS)/e2e/run-e2e here bad_input; \
	    tests/lab/suite $(ARTIFACTS) $(LIMIT_E2E) $(BINARIES) -- $(TEST_ARGS); \
	fi

.PHONY: bench
bench: toolchain ## set-up time here; boot, memory and throughput beside QEMU in the lab
	$(limit) $(LIMIT_UNIT) $(CARGO) bench $(LOCKED) -p dragonball --bench setup
	$(limit) $(LIMIT_E2E) tests/lab/bench

.PHONY: demo
demo: setup ## one container in a microVM, with its timeline
	$(limit) $(LIMIT_BUILD) tests/gather $(ARTIFACTS) kernel image binaries tests
	if $(KVM_RUNS_LINUX); then \
	    $(limit) 300 $(ARTIFACTS)/e2e/run-e2e here demo; \
	else \
	    echo "KVM here cannot run Linux: running in the lab, an emulated machine 5 to 20 times slower than metal"; \
	    tests/lab/run --artifacts $(ARTIFACTS) --timeout 600 -- /artifacts/e2e/run-e2e installed demo; \
	fi

FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(basename $(notdir $(wildcard vmm/fuzz/fuzz_targets/*.rs)))

.PHONY: fuzz
fuzz: toolchain ## each fuzz target for FUZZ_SECONDS; not part of `make test`
	@$(INSTALL_PACKAGES) g++
	[ -x $(TARGET)/cargo-fuzz/bin/cargo-fuzz ] || \
	    $(limit) $(LIMIT_BUILD) $(CARGO) install --root $(TARGET)/cargo-fuzz --locked cargo-fuzz
	# A guest may make a file as large as it likes: not larger than this, which is an error for it and not the end of us.
	ulimit -f 262144; trap '' XFSZ; \
	export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$(TARGET)/fuzz PATH=$(TARGET)/cargo-fuzz/bin:$$PATH; \
	for target in $(FUZZ_TARGETS); do \
	    echo "fuzzing $$target for $(FUZZ_SECONDS) s"; \
	    mkdir -p $(TARGET)/fuzz-corpus/$$target; \
	    $(limit) $$(($(FUZZ_SECONDS) + $(LIMIT_BUILD))) cargo-fuzz run --fuzz-dir vmm/fuzz $$target \
	        $(TARGET)/fuzz-corpus/$$target vmm/fuzz/seeds/$$target -- \
	        -max_total_time=$(FUZZ_SECONDS) -timeout=30 -rss_limit_mb=4096 -handle_xfsz=0 -print_final_stats=1; \
	done

.PHONY: install
install: ## install under PREFIX, with its configuration in /etc
	CARGO_PROFILE_RELEASE_LTO=fat CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1 $(limit) $(LIMIT_BUILD) \
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

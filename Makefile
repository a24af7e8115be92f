# The verbs that README and CI use, word for word. `make help` lists them.

PREFIX ?= /usr/local
TARGET := $(or $(CARGO_TARGET_DIR),target)

# Everything in one invocation of cargo and with the same packages each time: another choice of packages would choose
# other features of the dependencies, and build them again.
BUILD = cargo build --workspace --locked $(FLAGS)
FLAGS = --all-targets
OUTPUT = $(TARGET)/debug

# The demo and the benchmark show what a user would install; tests run what builds fastest.
demo bench bench-quick bench-neighbours build install: FLAGS = --release
demo bench bench-quick bench-neighbours build install: OUTPUT = $(TARGET)/release

PROGRAMS = containerd-shim-agentcube-v1 agentcube

.PHONY: help packages setup build demo bench bench-quick bench-neighbours test test-vm install clean

help:
	@echo "make setup    packages that this machine lacks, and the test node's root file system (once; a minute)"
	@echo "make build    the release binaries, in $(TARGET)/release"
	@echo "make demo     an agent falls asleep and wakes, on a container node of its own"
	@echo "make bench    times against runc, crun and cold starts, into docs/benchmarks and README (20 minutes)"
	@echo "make bench-quick  whether the goals hold, by a short run that writes nothing (3 minutes)"
	@echo "make bench-neighbours  what neighbours do to an agent, in a virtual machine, into docs/benchmarks (20 minutes)"
	@echo "make test     format, lints, unit tests, then the behaviour suite on such a node, then make test-vm"
	@echo "make test-vm  what needs another kernel, every controller or swap, in a virtual machine (minutes without KVM)"
	@echo "make install  the binaries into \$$(DESTDIR)\$$(PREFIX)/bin; PREFIX is $(PREFIX)"
	@echo "make clean    what was built; the node's files in the user's cache folder stay"

# Pairs of a file and the package that brings it. Only what is missing is installed.
NEEDED = \
	/usr/bin/cc:gcc \
	/usr/include/stdio.h:libc6-dev \
	/usr/bin/unshare:util-linux \
	/usr/sbin/debootstrap:debootstrap \
	/usr/share/keyrings/debian-archive-keyring.gpg:debian-archive-keyring

test test-vm bench-neighbours: NEEDED += /usr/bin/qemu-system-x86_64:qemu-system-x86 /usr/sbin/mke2fs:e2fsprogs

packages:
	@missing=; \
	for pair in $(NEEDED); do [ -e "$${pair%%:*}" ] || missing="$$missing $${pair##*:}"; done; \
	[ -n "$$missing" ] || exit 0; \
	echo "This machine lacks:$$missing"; \
	[ "$$(id -u)" = 0 ] || { echo "Installing them needs root: run this as root, or install them yourself."; exit 1; }; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get install -qq --yes --no-install-recommends $$missing || \
		{ apt-get update -qq && apt-get install -qq --yes --no-install-recommends $$missing; }

setup: packages
	@echo "Building (the first time takes minutes) …"
	@$(BUILD)
	@$(OUTPUT)/node rootfs

build: packages
	@echo "Building the release (the first time takes minutes) …"
	@$(BUILD)
	@size=$$(stat -c %s $(OUTPUT)/containerd-shim-agentcube-v1); \
	[ "$$size" -le 5000000 ] || { echo "The shim has $$size bytes: keep it at 5 MB at most."; exit 1; }

demo: setup
	@$(OUTPUT)/demo

bench: setup
	@$(OUTPUT)/bench --out docs/benchmarks --readme README.md

bench-quick: setup
	@$(OUTPUT)/bench --plan quick --check

bench-neighbours: setup
	@$(OUTPUT)/bench --plan neighbours --virtual --out docs/benchmarks

test: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	@echo "Unit tests: no root needed."
	cargo test --workspace --locked --no-fail-fast --lib --bins
	@echo "The behaviour suite, on nodes with real containerd, runc and CRIU: this takes minutes."
	AGENTCUBE_TEST_ROOTFS="$$($(OUTPUT)/node rootfs)" cargo test --workspace --locked --no-fail-fast --test '*'
	@$(MAKE) --no-print-directory test-vm

ifeq ($(shell uname -m),x86_64)
test-vm: setup
	@$(OUTPUT)/node vm setup
	@echo "Tests in virtual machines: without KVM they are emulated, and this takes minutes."
	$(OUTPUT)/node vm test tests/virtual-nodes.toml
else
test-vm:
	@echo "skipped: virtual nodes exist on x86_64 alone"
endif

install: build
	@for program in $(PROGRAMS); do \
		install -D -m 755 "$(OUTPUT)/$$program" "$(DESTDIR)$(PREFIX)/bin/$$program" || exit 1; \
		echo "$(DESTDIR)$(PREFIX)/bin/$$program"; \
	done

clean:
	cargo clean

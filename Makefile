# What a developer of tailwart-edge types. `make` alone lists the targets; there is nothing here that could
# not be typed by hand. Needs GNU make; scripts/install-deps says what else.
#
# Variables: CARGO, GO, and TARGET for `make release`.

CARGO ?= cargo
GO    ?= go

# Release builds have a target directory of their own: switching flags in a shared one rebuilds everything.
STATIC_DIR := target/static
RELEASE    := dist/tailwart-edge
MAX_BYTES := 31000000
MDBOOK     := 0.5.4

# Packed relocations save 2.6 MB: a static-pie relocates itself at start, at 110,000 places. The C library
# that is linked in must know them (glibc 2.36 or newer); `make check-release` runs what came out.
STATIC_FLAGS := -C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs

# aarch64 is built on x86_64 with `make release TARGET=aarch64-unknown-linux-gnu`, given
#   apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross
#   rustup target add aarch64-unknown-linux-gnu
# The two variables below name its C compiler: to build.rs (for cgo), and to cargo as the linker. They change
# nothing for other targets.
TARGET ?= x86_64-unknown-linux-gnu
export CC_aarch64_unknown_linux_gnu ?= aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER ?= aarch64-linux-gnu-gcc

# The Go code is built for release with these tags, and for the test tailnet without.
GO_TAGS = $$(grep -v '^\#' $(CURDIR)/libtailscale/build-tags | paste -sd, -)

step = @printf '\n==> %s\n' '$(1)'

# One step after the other, also under `make -j`: each of them uses every core, and the first failure should
# be the last thing on the screen.
.NOTPARALLEL:
.PHONY: help test deps format vet lint test-go test-rust soak doc reference book release check-release demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

# The quickest checks come first.
test: deps format vet lint test-go test-rust doc check-release ## everything that has to pass before a merge
	$(call step,all passed)

deps: ## install what building and testing needs (Debian, as root), else say what is missing
	$(call step,dependencies)
	scripts/install-deps

format: ## check the formatting of Rust and Go
	$(call step,formatting)
	$(CARGO) fmt --check
	@wrong=$$(gofmt -l libtailscale) && [ -z "$$wrong" ] || { echo "run gofmt -w on:" $$wrong; exit 1; }

vet: ## go vet, with the release's build tags and without
	$(call step,go vet)
	cd libtailscale && $(GO) vet ./...
	cd libtailscale && $(GO) vet -tags="$(GO_TAGS)" .

lint: ## clippy, warnings denied
	$(call step,clippy)
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --test release -- -D warnings

test-go: ## the Go tests, under the race detector
	$(call step,Go tests)
	cd libtailscale && $(GO) test -race -timeout 15m ./...

test-rust: ## unit, integration, end-to-end and documentation tests (root: Postfix and Dovecot run in them)
	$(call step,Rust tests)
	$(CARGO) test --locked

soak: ## outages of 30 and 120 seconds under load, 20 restarts, and what else is too long for every day
	$(call step,long outages and many restarts)
	TAILWART_SOAK=1 $(CARGO) test --locked --test end_to_end -- --nocapture outage:: strange a_restart_with_stored

doc: ## the crate's documentation, broken links denied
	$(call step,documentation)
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps

reference: ## write the pages of the book that are made from the code
	$(call step,reference pages)
	TAILWART_WRITE_REFERENCE=1 $(CARGO) test --locked --test docs reference::

# Not part of `make test`: mdBook takes minutes to build, and what it would complain of is tested without it.
book: ## the book, in target/book (cargo install mdbook)
	$(call step,book)
	@mdbook --version 2>/dev/null | grep -qxF 'mdbook v$(MDBOOK)' || \
		{ echo 'needs mdBook $(MDBOOK): $(CARGO) install --locked mdbook@$(MDBOOK)'; exit 1; }
	@mkdir -p target
	@mdbook build docs 2>target/book.log; status=$$?; cat target/book.log; \
		[ "$$status" -eq 0 ] && ! grep -qE 'WARN|ERROR' target/book.log

release: ## dist/tailwart-edge, one static file (TARGET=aarch64-unknown-linux-gnu for ARM)
	$(call step,release for $(TARGET))
	RUSTFLAGS='$(STATIC_FLAGS)' \
		$(CARGO) build --locked --release --target $(TARGET) --target-dir $(STATIC_DIR)
	@mkdir -p dist
	install -m 755 $(STATIC_DIR)/$(TARGET)/release/tailwart-edge $(RELEASE)
	@bytes=$$(stat -c %s $(RELEASE)) && echo "$(RELEASE): $$bytes bytes of at most $(MAX_BYTES)" && \
		[ "$$bytes" -le $(MAX_BYTES) ]

check-release: release ## build the release and run it where there is nothing but itself (root)
	$(call step,release in an empty root)
	TAILWART_RELEASE_BINARY='$(CURDIR)/$(RELEASE)' \
		$(CARGO) test --locked --test release

demo: deps ## a mailbox, a tailnet and the edge on this machine, one message through them (DEMO_ONCE=1 ends then)
	$(call step,building for the demo (debug: quicker to build than a release))
	$(CARGO) build --locked --bin tailwart-edge --example demo
	@$(CARGO) run --quiet --locked --example demo

clean: ## remove everything that was built
	rm -rf target dist

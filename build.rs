//! Builds `libtailscale` (Go) into a static archive, generates its Rust
//! bindings, and tells cargo to link it. Nothing is rebuilt unless an input has
//! changed. Every failure says what to install or set.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const SOURCE: &str = "libtailscale";

/// A script that runs Go. The variable GO may name another Go command for it.
const GO: &str = "scripts/go";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    declare_inputs();
    build_archive(&out.join("libtailscale.a"));
    generate_bindings(&out.join("tailscale.rs"));
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=tailscale");
    // For the test that links a C program to the same archive.
    println!("cargo::rustc-env=LIBTAILSCALE_DIR={}", out.display());
}

/// Names every file and variable that changes the result.
fn declare_inputs() {
    for name in ["GO", "CC", "GOFLAGS", "GOTOOLCHAIN", "LIBCLANG_PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={GO}");
    // The whole directory: a list of files would miss a new one.
    println!("cargo::rerun-if-changed={SOURCE}");
}

/// Runs `go build -buildmode=c-archive`. `-buildvcs=false` leaves out git's state: with it, builds of
/// the same files would differ, and a build in a checkout of another user would fail.
fn build_archive(archive: &Path) {
    let (goos, goarch) = go_target();
    let compiler = cc::Build::new().try_get_compiler().unwrap_or_else(|e| {
        fail(&format!("no C compiler ({e}); install one (Debian: apt-get install gcc) or set CC"))
    });
    let status = Command::new(GO)
        .args(["build", "-C", SOURCE, "-buildmode=c-archive"])
        .args(["-trimpath", "-buildvcs=false", "-ldflags=-s -w"])
        .arg(format!("-tags={}", build_tags()))
        .arg("-o")
        .arg(archive)
        .arg(".")
        .env("CGO_ENABLED", "1")
        .env("GOOS", goos)
        .env("GOARCH", goarch)
        .env("CC", compiler.path())
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("`go build` in {SOURCE}/ failed ({status}); its messages are above")),
        Err(e) => fail(&format!("cannot run {GO}: {e}")),
    }
}

/// The tags of `libtailscale/build-tags`, as one argument.
fn build_tags() -> String {
    let path = format!("{SOURCE}/build-tags");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| fail(&format!("cannot read {path}: {e}")));
    let tags: Vec<&str> =
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    tags.join(",")
}

/// Rust's target as GOOS and GOARCH.
fn go_target() -> (&'static str, &'static str) {
    let os = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    if env::var("CARGO_CFG_TARGET_ENV").as_deref() == Ok("musl") {
        fail(
            "musl is not supported: Go's archive needs argv in its constructor, which only glibc gives \
              (golang/go#13492); build for a -gnu target, statically with RUSTFLAGS='-C target-feature=+crt-static'",
        );
    }
    match (os.as_str(), arch.as_str()) {
        ("linux", "x86_64") => ("linux", "amd64"),
        ("linux", "aarch64") => ("linux", "arm64"),
        _ => fail(&format!("{os}/{arch} is not supported; build for Linux on x86_64 or aarch64")),
    }
}

/// Turns `tailscale.h` into Rust declarations.
fn generate_bindings(output: &Path) {
    // bindgen panics with a long text when it cannot load libclang.
    let generated = std::panic::catch_unwind(|| {
        bindgen::Builder::default()
            .header(format!("{SOURCE}/tailscale.h"))
            .allowlist_file(".*tailscale[.]h")
            .default_enum_style(bindgen::EnumVariation::Consts)
            .prepend_enum_name(false)
            .layout_tests(false)
            .generate_comments(false)
            .generate()
    });
    let bindings = match generated {
        Ok(Ok(bindings)) => bindings,
        Ok(Err(e)) => fail(&format!("bindgen cannot read {SOURCE}/tailscale.h: {e}")),
        Err(_) => fail(
            "libclang is missing; install it (Debian: apt-get install libclang-dev) or set LIBCLANG_PATH",
        ),
    };
    if let Err(e) = bindings.write_to_file(output) {
        fail(&format!("cannot write {}: {e}", output.display()));
    }
}

/// Ends the build with one line that says what to do.
fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1);
}

//! What the Go half is built from: the sources that `go.mod` names, and the one line by which
//! `scripts/go` changes them.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::tools::{Finished, run};

const LIMIT: Duration = Duration::from_secs(60);

/// The file that is changed, and the line that goes.
const SOURCE: &str = "wgengine/netstack/netstack.go";
const LINE: &str = "opts.ClockResolution = 500 * time.Microsecond";

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().expect("it is in a directory")).unwrap();
    fs::write(path, text).unwrap();
}

/// A repository of which only what `scripts/go` looks at is there, with a Go command that prints its
/// arguments and has `source` as Tailscale's.
fn repository(source: &str, go_mod: &str) -> tempfile::TempDir {
    let dir = common::temp_dir("go-sources");
    let root = dir.path();
    write(&root.join("libtailscale/go.mod"), go_mod);
    write(&root.join("original").join(SOURCE), source);
    fs::create_dir(root.join("scripts")).unwrap();
    fs::copy(common::repo_root().join("scripts/go"), root.join("scripts/go")).unwrap();
    let original = root.join("original");
    let go = format!(
        "#!/bin/sh\n[ \"$2\" = download ] || exec echo \"$GOTOOLCHAIN $*\"\nprintf '\\t\"Dir\": \"{}\",\\n'\n",
        original.display()
    );
    write(&root.join("go"), &go);
    fs::set_permissions(root.join("go"), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

const WITH_REPLACE: &str = "module x\n\ngo 1.27.4\n\nrequire (\n\ttailscale.com v1.2.3\n)\n\nreplace gvisor.dev/gvisor => gvisor.dev/gvisor v0.1.0\n";

fn scripts_go(root: &Path) -> Finished {
    let mut command = Command::new(root.join("scripts/go"));
    command.args(["vet", "./..."]).env("GO", root.join("go")).env_remove("GOTOOLCHAIN");
    run(&mut command, b"", LIMIT)
}

#[test]
fn one_line_is_taken_out_of_a_copy_and_the_copy_is_used() {
    let dir = repository(&format!("a\n\t\t{LINE}\nb\n"), WITH_REPLACE);
    let root = dir.path();
    let first = scripts_go(root).expect_success();
    assert_eq!(first.stdout(), "auto vet ./...\n");
    assert!(first.stderr.contains("copied tailscale.com v1.2.3"), "{}", first.stderr);
    let copy = root.join("target/tailscale.com@v1.2.3").join(SOURCE);
    assert_eq!(fs::read_to_string(copy).unwrap(), "a\nb\n");
    let go_work = fs::read_to_string(root.join("go.work")).unwrap();
    assert!(go_work.contains("\ngo 1.27.4\nuse ./libtailscale\n"), "{go_work}");
    assert!(go_work.ends_with("\nreplace tailscale.com => ./target/tailscale.com@v1.2.3\n"), "{go_work}");

    let again = scripts_go(root).expect_success();
    assert_eq!((again.stdout().as_str(), again.stderr.as_str()), ("auto vet ./...\n", ""));
    write(&root.join("libtailscale/go.mod"), &WITH_REPLACE.replace("1.27.4", "1.28.0"));
    scripts_go(root).expect_success();
    let go_work = fs::read_to_string(root.join("go.work")).unwrap();
    assert!(go_work.contains("\ngo 1.28.0\n"), "another Go is taken over too: {go_work}");
    assert!(!scripts_go_is_needed_after(root), "a release of which the gVisor is served is taken as it is");
}

/// Whether a copy is used once go.mod replaces nothing any more.
fn scripts_go_is_needed_after(root: &Path) -> bool {
    let (served, _) = WITH_REPLACE.split_once("\nreplace ").unwrap();
    write(&root.join("libtailscale/go.mod"), served);
    scripts_go(root).expect_success();
    root.join("go.work").exists()
}

#[test]
fn a_release_without_the_line_is_an_error_and_leaves_nothing() {
    for source in ["a\nb\n".to_owned(), format!("{LINE}\n{LINE}\n")] {
        let dir = repository(&source, WITH_REPLACE);
        let finished = scripts_go(dir.path());
        assert!(!finished.succeeded() && finished.stdout.is_empty(), "{}", finished.stdout());
        let expected = format!("tailscale.com v1.2.3 has no line '{}' in {SOURCE}", LINE.replace('*', "\\*"));
        assert!(finished.stderr.contains(&expected), "{}", finished.stderr);
        assert_eq!(fs::read_dir(dir.path().join("target")).unwrap().count(), 0);
        assert!(!dir.path().join("go.work").exists());
    }
}

#[test]
fn this_build_differs_from_tailscales_in_that_line_alone() {
    let go = |arguments: &[&str], work: Option<&str>| {
        let mut command = Command::new(common::repo_root().join("scripts/go"));
        command.current_dir(common::repo_root().join("libtailscale")).args(arguments);
        if let Some(work) = work {
            command.env("GOWORK", work);
        }
        run(&mut command, b"", LIMIT).expect_success().stdout().trim().to_owned()
    };
    let directory = ["list", "-m", "-f", "{{.Dir}}", "tailscale.com"];
    let (used, original) = (go(&directory, None), go(&directory, Some("off")));
    assert_ne!(used, original);
    let difference = run(Command::new("diff").args(["-r", &original, &used]), b"", LIMIT);
    let changed: Vec<String> =
        difference.stdout().lines().filter(|line| line.starts_with(['<', '>'])).map(str::to_owned).collect();
    assert_eq!(changed, [format!("< \t\t{LINE}")], "{}", difference.stdout());
}

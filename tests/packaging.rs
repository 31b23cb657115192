//! What the project is packaged with agrees with the program and with itself: units, manifests,
//! images, workflows, versions.
//!
//! That the units work is shown in `systemd.rs`, the image's content in `release.rs`, the Debian
//! package in `deb.rs`; linters of their own look at manifests and workflows in `make manifests`.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::edge::{Builder, Edge};
use common::netns::Namespace;
use common::tailnet::{Options, TestTailnet};
use common::tools::{Finished, run};
use common::wait::eventually;
use serde::Deserialize;
use serde_yaml_ng::Value;
use tailwart_edge::config::Config;

const LIMIT: Duration = Duration::from_secs(60);

/// As `systemd-analyze security` counts, times ten.
const MAX_EXPOSURE: &str = "15";

fn text(file: &str) -> String {
    fs::read_to_string(common::repo_root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// The documents of a YAML file.
fn yaml(file: &str) -> Vec<Value> {
    let text = text(file);
    let documents = serde_yaml_ng::Deserializer::from_str(&text).map(Value::deserialize);
    documents.collect::<Result<_, _>>().unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn strings(list: &Value) -> Vec<&str> {
    list.as_sequence().map(|list| list.iter().filter_map(Value::as_str).collect()).unwrap_or_default()
}

/// The configuration that the Debian package installs, with an empty environment.
fn installed_config() -> Config {
    let path = common::repo_root().join("packaging/debian/config.toml");
    Config::load(&path, None, &|_| None).unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

fn edge(arguments: &[&str]) -> Finished {
    run(Command::new(env!("CARGO_BIN_EXE_tailwart-edge")).args(arguments).env_clear(), b"", LIMIT)
}

/// The part of a text between two marks.
fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
    let (_, rest) = text.split_once(start).unwrap_or_else(|| panic!("no {start:?}"));
    rest.split_once(end).unwrap_or_else(|| panic!("no {end:?} after {start:?}")).0
}

#[test]
fn systemd_finds_no_fault_with_the_units() {
    let dir = common::temp_dir("units");
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no", "--recursive-errors=no"]);
    let mut seen = 0;
    for unit in fs::read_dir(common::repo_root().join("packaging/systemd")).expect("it is there").flatten() {
        let copy = dir.path().join(unit.file_name());
        // The program has to be there for this.
        let unit = fs::read_to_string(unit.path()).expect("it can be read");
        fs::write(&copy, unit.replace("/usr/bin/tailwart-edge", env!("CARGO_BIN_EXE_tailwart-edge")))
            .unwrap();
        verify.arg(copy);
        seen += 1;
    }
    assert_eq!(seen, 6);
    let finished = run(&mut verify, b"", LIMIT).expect_success();
    assert!(!finished.stderr.contains("tailwart"), "{}", finished.stderr);
}

#[test]
fn the_service_is_hardly_exposed() {
    let service = common::repo_root().join("packaging/systemd/tailwart-edge.service");
    let mut judge = Command::new("systemd-analyze");
    judge.args(["security", "--offline=true", "--threshold", MAX_EXPOSURE]).arg(service);
    run(&mut judge, b"", LIMIT).expect_success();
}

#[test]
fn each_default_listener_has_its_socket_unit() {
    let config = installed_config();
    assert_eq!(config.listeners.len(), 5);
    for listener in &config.listeners {
        let unit = text(&format!("packaging/systemd/tailwart-edge-{}.socket", listener.name));
        assert!(unit.contains(&format!("\nFileDescriptorName={}\n", listener.name)), "{unit}");
        let bound: BTreeSet<_> = unit.lines().filter_map(|line| line.strip_prefix("ListenStream=")).collect();
        let wanted: Vec<String> = listener.listen.iter().map(ToString::to_string).collect();
        assert_eq!(bound, wanted.iter().map(String::as_str).collect(), "{}", listener.name);
    }
}

#[test]
fn whoever_stops_it_waits_longer_than_a_drain() {
    let drain = installed_config().timeouts.drain.as_secs();
    let unit = text("packaging/systemd/tailwart-edge.service");
    let systemd = between(&unit, "TimeoutStopSec=", "s\n").parse::<u64>().expect("seconds");
    let compose = yaml("compose.yaml");
    let compose = compose[0]["services"]["tailwart-edge"]["stop_grace_period"].as_str().expect("a duration");
    let compose = compose.trim_end_matches('s').parse::<u64>().expect("seconds");
    let pod = &deployment()["spec"]["template"]["spec"];
    let pre_stop = &pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"];
    let kubernetes = pod["terminationGracePeriodSeconds"].as_u64().unwrap() - pre_stop.as_u64().unwrap();
    for patience in [systemd, compose, kubernetes] {
        assert!(patience >= drain + 15, "{patience} s for a drain of {drain} s");
    }
}

#[test]
fn the_installed_configuration_is_good_without_any_variable() {
    assert_eq!(installed_config().warnings, [""; 0]);
}

#[test]
fn the_image_is_the_program_alone_and_not_run_by_root() {
    let dockerfile = text("Dockerfile");
    let (_, image) = dockerfile.split_once("\nFROM scratch\n").expect("the last stage is empty");
    let user = between(image, "\nUSER ", "\n");
    let (uid, gid) = user.split_once(':').expect("USER names a group too");
    assert!(uid.parse::<u32>().is_ok_and(|uid| uid > 0) && gid.parse::<u32>().is_ok(), "{user}: no numbers");
    assert!(image.contains(&format!("COPY --from=build --chown={user} ")), "the state is not the user's");
    let ports = between(image, "EXPOSE ", "\n");
    let wanted: Vec<String> =
        installed_config().listeners.iter().map(|listener| listener.upstream.port.to_string()).collect();
    let exposed: BTreeSet<_> = ports.split(' ').collect();
    assert_eq!(exposed, wanted.iter().map(String::as_str).collect());
}

#[test]
fn the_composed_container_finds_its_secret_and_its_command() {
    let compose = yaml("compose.yaml");
    let service = &compose[0]["services"]["tailwart-edge"];
    let key = service["environment"]["TS_AUTHKEY_FILE"].as_str().expect("a path");
    let secret = key.strip_prefix("/run/secrets/").expect("where Docker puts secrets");
    assert_eq!(strings(&service["secrets"]), [secret]);
    assert!(compose[0]["secrets"][secret]["file"].is_string());
    let command = strings(&service["command"]);
    assert_eq!(edge(&[&["check"], &command[1..]].concat()).expect_success().stderr, "");
}

fn deployment() -> Value {
    let documents = yaml("packaging/kubernetes/tailwart-edge.yaml");
    documents.into_iter().find(|document| document["kind"] == "Deployment").expect("there is one")
}

fn pod_config() -> String {
    let documents = yaml("packaging/kubernetes/tailwart-edge.yaml");
    let map = documents.iter().find(|document| document["kind"] == "ConfigMap").expect("there is one");
    map["data"]["config.toml"].as_str().expect("a text").to_owned()
}

#[test]
fn the_pods_configuration_is_good() {
    let file = common::temp_dir("pod");
    let path = file.path().join("config.toml");
    fs::write(&path, pod_config()).expect("it can be written");
    let pod_name = |name: &str| (name == "POD_NAME").then(|| "tailwart-edge-7d4b9c8f6-x2vqk".to_owned());
    let config = Config::load(&path, None, &pod_name).unwrap_or_else(|mistakes| panic!("{mistakes}"));
    assert!(config.tailnet.ephemeral && config.warnings.is_empty(), "{:?}", config.warnings);
    let patience = Duration::from_secs(deployment()["spec"]["minReadySeconds"].as_u64().expect("a number"));
    // Some seconds to find out why, and to tell those who wait.
    let gone = config.tailnet.join_timeout + Duration::from_secs(10);
    assert!(patience > gone, "a rollout goes on after {patience:?} with pods that end after {gone:?}");
}

/// The program with the variables of the pod, whose configuration is there; but the credential, which
/// goes over https alone.
fn pod_program(config: &Path) -> Builder {
    let edge = Edge::builder(env!("CARGO_BIN_EXE_tailwart-edge")).auth_key("tskey-auth-test");
    let edge = edge.env("POD_NAME", "tailwart-edge-7d4b9c8f6-x2vqk");
    edge.env("TAILWART_CONFIG", &config.display().to_string())
}

/// A host for the pod, with its sysctls; what starts a program in its container, as its user.
fn pod_host(pod: &Value) -> (Namespace, Vec<String>) {
    let host = Namespace::create();
    let context = &pod["securityContext"];
    for sysctl in context["sysctls"].as_sequence().expect("a list") {
        let [name, value] = ["name", "value"].map(|key| sysctl[key].as_str().expect("a text"));
        host.sysctl(name, value);
    }
    let id = |name: &str| context[name].as_u64().expect("a number").to_string();
    let user = ["setpriv", "--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"];
    let mut wrapper: Vec<String> =
        host.wrapper().iter().chain(&user).map(|word| (*word).to_owned()).collect();
    wrapper.extend([format!("--reuid={}", id("runAsUser")), format!("--regid={}", id("runAsGroup"))]);
    (host, wrapper)
}

#[test]
fn the_pod_s_probes_mind_neither_the_mailbox_nor_the_file() {
    let pod = &deployment()["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let (host, wrapper) = pod_host(pod);
    let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
    let tailnet = TestTailnet::start_with(&Options { host: Some(host.outside.into()), ..Options::default() });
    tailnet.add_node("stalwart", &["tag:stalwart"], &[]);
    let dir = common::temp_dir("pod");
    let config = dir.path().join("config.toml");
    fs::write(&config, pod_config()).expect("it can be written");
    let edge = pod_program(&config).env("TS_CONTROL_URL", tailnet.control_url()).wrapped(&wrapper);
    let daemon = edge.spawn_with(&strings(&container["args"]));
    let ask = |check: &[&str]| {
        assert_eq!(check[0], "/tailwart-edge");
        let finished = run(edge.program_alone().args(&check[1..]), b"", LIMIT);
        (finished.status.and_then(|status| status.code()), finished.stderr)
    };
    let probes: Vec<_> = ["startupProbe", "readinessProbe", "livenessProbe"]
        .iter()
        .map(|probe| strings(&container[*probe]["exec"]["command"]))
        .filter(|command| !command.is_empty())
        .collect();
    assert!(probes.len() >= 2, "{container:?}");
    let all_answer = |code: i32, when: &str| {
        for probe in &probes {
            let (found, said) = ask(probe);
            assert_eq!(found, Some(code), "{when}: {probe:?}: {said}\n{}", daemon.log().tail());
        }
    };

    daemon.wait_ready(LIMIT);
    let image = text("Dockerfile");
    let check: Vec<String> = serde_json::from_str(between(&image, " CMD ", "\n")).expect("the exec form");
    let check: Vec<&str> = check.iter().map(String::as_str).collect();
    let knows = || ask(&check).1.contains("no upstream answers: stalwart:25");
    assert!(eventually(LIMIT, knows), "the mailbox is not missed: {:?}", ask(&check));
    assert_eq!(ask(&check).0, Some(1));
    all_answer(0, "without a mailbox");
    fs::write(&config, "[upstream").expect("it can be written");
    all_answer(0, "with a mistake in the file");
    daemon.signal("STOP");
    all_answer(1, "hung");
}

#[test]
fn the_pods_are_this_version_s_and_their_service_leads_to_them() {
    let deployment = deployment();
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    let image = container["image"].as_str().expect("a name");
    assert!(image.ends_with(concat!(":", env!("CARGO_PKG_VERSION"))), "{image} is not this version's");
    let documents = yaml("packaging/kubernetes/tailwart-edge.yaml");
    let kind = |kind: &str| documents.iter().find(|document| document["kind"] == kind).expect("there is one");
    let service = &kind("Service")["spec"];
    assert_eq!(service["externalTrafficPolicy"], "Local", "clients would have a node's address");
    assert_eq!(service["ports"].as_sequence().map(Vec::len), container["ports"].as_sequence().map(Vec::len));
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    assert_eq!(&kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"], labels);
    assert_eq!(&service["selector"], labels);
}

/// The prerequisites of a target of the Makefile.
fn prerequisites(target: &str) -> Vec<String> {
    let makefile = text("Makefile");
    let line = between(&makefile, &format!("\n{target}:"), " ##");
    line.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn the_workflow_runs_what_make_check_runs() {
    let mut steps: BTreeSet<String> = prerequisites("check").into_iter().collect();
    assert!(steps.remove("test"), "`make check` holds `make test`");
    steps.extend(prerequisites("test"));
    assert!(steps.remove("deps"), "each job starts with it");
    let workflow = &yaml(".github/workflows/ci.yml")[0];
    let check = &workflow["jobs"]["check"];
    let matrix = strings(&check["strategy"]["matrix"]["step"]);
    assert_eq!(matrix.iter().map(|step| (*step).to_owned()).collect::<BTreeSet<_>>(), steps);
    let commands: Vec<&str> =
        check["steps"].as_sequence().unwrap().iter().filter_map(|step| step["run"].as_str()).collect();
    assert!(commands.iter().any(|run| run.ends_with("make deps ${{ matrix.step }}")), "{commands:?}");
}

#[test]
fn the_gate_requires_every_job_and_runs_always() {
    let workflow = &yaml(".github/workflows/ci.yml")[0];
    let jobs = workflow["jobs"].as_mapping().expect("jobs");
    let others: Vec<&str> = jobs.keys().filter_map(Value::as_str).filter(|job| *job != "gate").collect();
    let gate = &workflow["jobs"]["gate"];
    assert_eq!(strings(&gate["needs"]), others);
    assert_eq!(gate["if"], "always()");
    let step = &gate["steps"][0];
    assert_eq!(step["run"], "test \"$RESULT\" = success");
    assert_eq!(others, ["check"]);
    assert_eq!(step["env"]["RESULT"], "${{ needs.check.result }}");
}

#[test]
fn every_action_is_pinned_by_its_commit() {
    let mut seen = 0;
    for file in [".github/workflows/ci.yml", ".github/workflows/release.yml"] {
        for line in text(file).lines().filter(|line| line.contains("uses:")) {
            let commit = between(line, "@", " #");
            assert!(commit.len() == 40 && commit.bytes().all(|b| b.is_ascii_hexdigit()), "{line}");
            seen += 1;
        }
    }
    assert!(seen >= 5, "{seen}");
}

#[test]
fn versions_are_the_same_everywhere() {
    let rust = env!("CARGO_PKG_RUST_VERSION");
    let go_mod = text("libtailscale/go.mod");
    let install_deps = text("scripts/install-deps");
    let oldest_go = between(&install_deps, "readonly MIN_GO=", "\n");
    let go = between(&go_mod, "\ngo ", "\n").rsplit_once('.').expect("three numbers").0;
    for (file, wanted) in [
        (
            "README.md",
            format!("Go {oldest_go} or newer (it downloads the version that go.mod names), Rust ≥ {rust}"),
        ),
        ("Dockerfile", format!("FROM golang:{go}-")),
    ] {
        // Wherever its lines are broken.
        let said = text(file).split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(said.contains(&wanted), "{file} does not say {wanted:?}");
    }
    // What it is built with, where that is not the oldest that may.
    let dockerfile = text("Dockerfile");
    let built_with = between(&dockerfile, "FROM rust:", "-");
    for file in [".github/workflows/ci.yml", ".github/workflows/release.yml"] {
        assert!(text(file).contains(&format!("  RUST: \"{built_with}\"\n")), "{file}: not {built_with}");
    }
}

/// The packages that `scripts/install-deps` misses where there are no commands but those it runs itself.
fn missed_for(group: &[&str]) -> BTreeSet<String> {
    let bin = common::temp_dir("bin");
    for command in ["bash", "cut", "dirname", "grep", "id", "sed", "sort", "tail"] {
        let known = ["/usr/bin", "/bin"].map(|dir| Path::new(dir).join(command));
        let place = known.iter().find(|path| path.exists()).unwrap_or_else(|| panic!("no {command}"));
        std::os::unix::fs::symlink(place, bin.path().join(command)).unwrap();
    }
    let mut check = Command::new(common::repo_root().join("scripts/install-deps"));
    let checked = run(check.args(group).arg("--check").env("PATH", bin.path()), b"", LIMIT);
    assert_eq!(checked.status.and_then(|status| status.code()), Some(1), "{}", checked.stderr);
    let lines = checked.stderr.lines().filter_map(|line| line.strip_prefix("  "));
    lines.filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

#[test]
fn the_demo_installs_less_than_the_tests_and_more_than_building() {
    let [build, demo, test] = [&["build"][..], &["demo"], &[]].map(missed_for);
    assert!(build.is_subset(&demo) && demo.is_subset(&test), "{build:?}\n{demo:?}\n{test:?}");
    let all_in =
        |packages: &BTreeSet<String>, wanted: &[&str]| wanted.iter().all(|it| packages.contains(*it));
    assert!(all_in(&build, &["gcc", "make", "cargo"]) && !build.contains("curl"), "{build:?}");
    assert!(
        all_in(&demo, &["curl", "openssl", "swaks", "util-linux"]) && !demo.contains("chromium"),
        "{demo:?}"
    );
    assert!(all_in(&test, &["chromium", "prometheus", "g++"]), "{test:?}");
}

#[test]
fn bash_completes_commands_and_options() {
    let script = edge(&["completions", "bash"]).expect_success().stdout();
    let ask = r#"function=$(complete -p tailwart-edge | sed 's/.* -F \([^ ]*\).*/\1/')
        COMP_WORDS=(tailwart-edge healthcheck --l); COMP_CWORD=2
        "$function" tailwart-edge --l healthcheck; echo "${COMPREPLY[@]}""#;
    let finished = run(Command::new("bash").arg("-c").arg(format!("{script}\n{ask}")), b"", LIMIT);
    assert_eq!(finished.expect_success().stdout(), "--live\n");
    for shell in ["zsh", "fish"] {
        assert!(edge(&["completions", shell]).expect_success().stdout().contains("healthcheck"));
    }
}

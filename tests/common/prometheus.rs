//! Prometheus and promtool (Debian's package `prometheus`): the reader for whom the metrics are made.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use super::http;
use super::net::free_addr;
use super::process::Daemon;
use super::tools::{Finished, run};
use super::wait::wait_for;
use super::{START_LIMIT, temp_dir};

/// How often it scrapes: rates want a few samples soon.
const INTERVAL: &str = "250ms";

const ANSWER_LIMIT: Duration = Duration::from_secs(30);
const PROMTOOL_LIMIT: Duration = Duration::from_secs(20);

/// A running Prometheus that scrapes one target.
pub struct Prometheus {
    addr: SocketAddr,
    daemon: Daemon,
    _dir: TempDir,
}

impl Prometheus {
    /// Scrapes `target` as the job `tailwart-edge`, with these alert rules.
    pub fn start(target: SocketAddr, rules: &Path) -> Prometheus {
        let dir = temp_dir("prometheus");
        let config = dir.path().join("prometheus.yml");
        let settings = format!(
            "global: {{scrape_interval: {INTERVAL}, evaluation_interval: {INTERVAL}}}\n\
             rule_files: [{rules:?}]\n\
             scrape_configs:\n- job_name: tailwart-edge\n  static_configs: [{{targets: [\"{target}\"]}}]\n",
            rules = rules.display().to_string()
        );
        fs::write(&config, settings).expect("a directory of our own takes files");
        let addr = free_addr();
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address={addr}"));
        let daemon = Daemon::spawn("prometheus", &mut command);
        daemon.wait_ready(START_LIMIT, None, || {
            std::net::TcpStream::connect(addr).is_ok() && http::get(addr, "/-/ready").code == 200
        });
        Prometheus { addr, daemon, _dir: dir }
    }

    /// What an expression comes to now: labels and value of each series.
    #[track_caller]
    pub fn query(&self, expression: &str) -> Vec<(Value, f64)> {
        let answer = self.api("query", Some(("query", expression)));
        let series = answer["result"].as_array().unwrap_or_else(|| panic!("{expression}: {answer}"));
        let value = |series: &Value| series["value"][1].as_str().and_then(|value| value.parse().ok());
        let both = |series: &Value| (series["metric"].clone(), value(series).expect("a value"));
        series.iter().map(both).collect()
    }

    /// What an expression comes to as soon as it is `wanted`.
    #[track_caller]
    pub fn wait(
        &self,
        expression: &str,
        deadline: Duration,
        wanted: impl Fn(&[(Value, f64)]) -> bool,
    ) -> Vec<(Value, f64)> {
        let mut last = Vec::new();
        let found = wait_for(deadline, || {
            last = self.query(expression);
            wanted(&last).then(|| last.clone())
        });
        found.unwrap_or_else(|| panic!("{expression} is {last:?}\n{}", self.targets()))
    }

    /// What it knows of its target, and why a scrape has failed.
    #[track_caller]
    pub fn targets(&self) -> Value {
        self.api("targets", None)["activeTargets"].clone()
    }

    /// How a metric was described to it under this name; null if it was not.
    #[track_caller]
    pub fn metadata(&self, metric: &str) -> Value {
        self.api("metadata", Some(("metric", metric)))[metric].clone()
    }

    /// The alert rules, with what they are worth now.
    #[track_caller]
    pub fn rules(&self) -> Vec<Value> {
        let groups = self.api("rules", None)["groups"].clone();
        let groups = groups.as_array().into_iter().flatten();
        groups.filter_map(|group| group["rules"].as_array().cloned()).flatten().collect()
    }

    /// curl, since the answer comes in chunks.
    #[track_caller]
    fn api(&self, path: &str, query: Option<(&str, &str)>) -> Value {
        let mut command = Command::new("curl");
        command.args([
            "-q",
            "--silent",
            "--show-error",
            "--get",
            &format!("http://{}/api/v1/{path}", self.addr),
        ]);
        if let Some((name, value)) = query {
            command.arg("--data-urlencode").arg(format!("{name}={value}"));
        }
        let answer = run(&mut command, b"", ANSWER_LIMIT).stdout();
        match serde_json::from_str::<Value>(&answer) {
            Ok(value) if value["status"] == "success" => value["data"].clone(),
            _ => panic!("{path} {query:?}: {answer}\n{}", self.daemon.output().tail()),
        }
    }
}

/// promtool, with some input.
pub fn promtool(arguments: &[&str], input: &[u8]) -> Finished {
    run(Command::new("promtool").args(arguments), input, PROMTOOL_LIMIT)
}

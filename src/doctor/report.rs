//! The doctor's report: its checks, and the two ways to print them.
//!
//! Invariant: text from the network or from another program is made harmless before it is shown (see `text.rs`).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::support::text::{columns, harmless};

/// Whether somebody has to act on what a check found.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// As it should be.
    Pass,
    /// It works, or may work; somebody should know.
    Warn,
    /// Mail is lost or late until it is changed.
    Fail,
}

/// One thing that was checked.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was checked: a fixed word, and which one if there are several.
    pub name: String,
    /// Whether somebody has to act on it.
    pub outcome: Grade,
    /// What was found, on one line.
    pub finding: String,
    /// What to do, if there is anything.
    pub remedy: Option<String>,
}

impl Check {
    /// As it should be.
    pub fn pass(name: impl Into<String>, finding: impl Into<String>) -> Check {
        Check::new(name, Grade::Pass, finding, None)
    }

    /// It works, or may work; `remedy` says what to look at.
    pub fn warn(name: impl Into<String>, finding: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check::new(name, Grade::Warn, finding, Some(remedy.into()))
    }

    /// Mail is lost or late until `remedy` is done.
    pub fn fail(name: impl Into<String>, finding: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check::new(name, Grade::Fail, finding, Some(remedy.into()))
    }

    /// A check from the text of an error of this program: the finding, then `; ` and the remedy.
    pub fn told(name: impl Into<String>, outcome: Grade, text: &impl ToString) -> Check {
        let text = text.to_string();
        let (finding, remedy) = match text.split_once("; ") {
            Some((finding, remedy)) => (finding.to_owned(), Some(remedy.to_owned())),
            None => (text, None),
        };
        Check::new(name, outcome, finding, remedy)
    }

    fn new(
        name: impl Into<String>,
        outcome: Grade,
        finding: impl Into<String>,
        remedy: Option<String>,
    ) -> Check {
        Check { name: name.into(), outcome, finding: finding.into(), remedy }.made_harmless()
    }

    /// The same check with printable ASCII only, for a check that another program has sent.
    pub fn made_harmless(self) -> Check {
        Check {
            name: harmless(&self.name),
            outcome: self.outcome,
            finding: harmless(&self.finding),
            remedy: self.remedy.as_deref().map(harmless),
        }
    }
}

/// All checks, in the order in which they are shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// In the order of `doctor.rs`.
    pub checks: Vec<Check>,
}

impl Report {
    /// 1 if a check fails, else 0.
    pub fn exit_code(&self) -> u8 {
        u8::from(self.count(Grade::Fail) > 0)
    }

    fn count(&self, outcome: Grade) -> usize {
        self.checks.iter().filter(|check| check.outcome == outcome).count()
    }

    /// `{"checks":[…],"passed":n,"warned":n,"failed":n}`
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "checks": self.checks,
            "passed": self.count(Grade::Pass),
            "warned": self.count(Grade::Warn),
            "failed": self.count(Grade::Fail),
        })
    }
}

impl fmt::Display for Report {
    /// A table: a line for each check, its remedy below, and a line with the counts.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAME_AT_MOST: usize = 32;
        let rows = self.checks.iter().flat_map(|Check { name, outcome, finding, remedy }| {
            let word = match outcome {
                Grade::Pass => "ok  ",
                Grade::Warn => "warn",
                Grade::Fail => "FAIL",
            };
            let remedy =
                remedy.iter().map(|remedy| vec![String::new(), String::new(), format!("-> {remedy}")]);
            std::iter::once(vec![word.to_owned(), name.clone(), finding.clone()]).chain(remedy)
        });
        columns(f, &rows.collect::<Vec<_>>(), NAME_AT_MOST)?;
        let [ok, warned, failed] = [Grade::Pass, Grade::Warn, Grade::Fail].map(|o| self.count(o));
        write!(f, "{ok} ok, {warned} warned, {failed} failed")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let port = Check::fail("port smtp 0.0.0.0:25", "in use", "stop the other program");
        let checks =
            vec![Check::pass("config", "no mistakes"), port, Check::warn("clock", "90 s fast", "ntp")];
        Report { checks }
    }

    #[test]
    fn the_table_is_aligned_and_ends_with_the_counts() {
        let expected = "\
ok    config                no mistakes
FAIL  port smtp 0.0.0.0:25  in use
                            -> stop the other program
warn  clock                 90 s fast
                            -> ntp
1 ok, 1 warned, 1 failed";
        assert_eq!(report().to_string(), expected);
    }

    #[test]
    fn a_long_name_does_not_push_the_others_to_the_right() {
        let long = "x".repeat(40);
        let checks = vec![Check::pass(&*long, "a"), Check::pass("short", "b")];
        let expected = format!("ok    {long}  a\nok    {:32}  b\n2 ok, 0 warned, 0 failed", "short");
        assert_eq!(Report { checks }.to_string(), expected);
    }

    #[test]
    fn json_has_every_check_and_the_counts() {
        let json = report().to_json();
        assert_eq!(json["checks"][1]["outcome"], "fail");
        assert_eq!(json["checks"][0]["remedy"], serde_json::Value::Null);
        assert_eq!((&json["passed"], &json["warned"], &json["failed"]), (&1.into(), &1.into(), &1.into()));
        let back: Vec<Check> = serde_json::from_value(json["checks"].clone()).unwrap();
        assert_eq!(back, report().checks);
    }

    #[test]
    fn only_a_failure_is_one() {
        assert_eq!(report().exit_code(), 1);
        let mut good = report();
        good.checks.remove(1);
        assert_eq!(good.exit_code(), 0);
    }

    #[test]
    fn an_error_is_split_into_finding_and_remedy() {
        let told = Check::told("x", Grade::Fail, &"it is gone; look here; and there");
        assert_eq!((&*told.finding, told.remedy.as_deref()), ("it is gone", Some("look here; and there")));
        assert_eq!(Check::told("x", Grade::Fail, &"it is gone").remedy, None);
    }

    #[test]
    fn what_another_program_has_sent_is_made_harmless() {
        let sent = Check { finding: "\x07".into(), ..Check::pass("n\n", "") }.made_harmless();
        assert_eq!((&*sent.name, &*sent.finding), ("n", "?"));
    }
}

//! Prometheus's classic text format, made of OpenMetrics: the library that encodes the metrics knows
//! the latter alone.
//!
//! The differences: a counter's name ends with `_total` in its description too, infos are gauges, and
//! there are neither units nor an end. Values and labels are written alike.

use std::collections::HashMap;

/// The classic format of a text in OpenMetrics.
pub fn classic(open_metrics: &str) -> String {
    let suffixes = suffixes(open_metrics);
    let mut text = String::with_capacity(open_metrics.len());
    for line in open_metrics.lines().filter(|line| !line.starts_with("# UNIT ") && *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        let described = match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(what), Some(name), Some(rest)) => {
                let suffix = suffixes.get(name).copied().unwrap_or_default();
                let rest = if (what, rest) == ("TYPE", "info") { "gauge" } else { rest };
                format!("# {what} {name}{suffix} {rest}\n")
            }
            _ => format!("{line}\n"),
        };
        text.push_str(&described);
    }
    text
}

/// What each family's samples have at the end of their names and its description has not.
fn suffixes(open_metrics: &str) -> HashMap<&str, &'static str> {
    let types = open_metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let suffix = |(name, kind)| match kind {
        "counter" => Some((name, "_total")),
        "info" => Some((name, "_info")),
        _ => None,
    };
    types.filter_map(suffix).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_formats_differ_in_is_rewritten_and_nothing_else() {
        let open_metrics = "\
# HELP sent_bytes Bytes to the mailbox.
# TYPE sent_bytes counter
# UNIT sent_bytes bytes
sent_bytes_total{listener=\"smtp\"} 7
# HELP build Which version this is.
# TYPE build info
build_info{version=\"0.1.0\"} 1
# HELP sent A gauge, whose name begins like a counter's.
# TYPE sent gauge
sent 2.5
# HELP dial_seconds How long.
# TYPE dial_seconds histogram
# UNIT dial_seconds seconds
dial_seconds_sum 0.0
dial_seconds_count 0
dial_seconds_bucket{le=\"+Inf\"} 0
# EOF
";
        let expected = "\
# HELP sent_bytes_total Bytes to the mailbox.
# TYPE sent_bytes_total counter
sent_bytes_total{listener=\"smtp\"} 7
# HELP build_info Which version this is.
# TYPE build_info gauge
build_info{version=\"0.1.0\"} 1
# HELP sent A gauge, whose name begins like a counter's.
# TYPE sent gauge
sent 2.5
# HELP dial_seconds How long.
# TYPE dial_seconds histogram
dial_seconds_sum 0.0
dial_seconds_count 0
dial_seconds_bucket{le=\"+Inf\"} 0
";
        assert_eq!(classic(open_metrics), expected);
    }
}

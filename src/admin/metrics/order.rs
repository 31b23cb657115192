//! The order of samples: by their labels within a family, so that two scrapes can be compared line by
//! line. The library that encodes them has them in a hash table's order, which is another in each
//! process.
//!
//! Invariant: families stay where they are, and what belongs to one set of labels stays together as it
//! is: a histogram's sum, count and buckets, the latter by `le`.

/// A text in OpenMetrics with the samples of each family in order.
pub fn ordered(open_metrics: &str) -> String {
    let lines: Vec<&str> = open_metrics.lines().collect();
    let mut text = String::with_capacity(open_metrics.len());
    for family in lines.chunk_by(|one, next| is_description(one) == is_description(next)) {
        let mut family = family.to_vec();
        if !is_description(family[0]) {
            // Stable: equal ones stay in their order.
            family.sort_by_cached_key(|&sample| labels(sample));
        }
        for line in family {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

fn is_description(line: &str) -> bool {
    line.starts_with('#')
}

/// A sample's labels, without that of a histogram's bucket, which comes first.
fn labels(sample: &str) -> &str {
    let series = sample.rsplit_once(' ').map_or(sample, |(series, _value)| series);
    let labels = series.split_once('{').map_or("", |(_name, labels)| labels);
    let without_bound = labels.strip_prefix("le=\"").and_then(|rest| rest.split_once('"'));
    without_bound.map_or(labels, |(_bound, rest)| rest.trim_start_matches(',')).trim_end_matches('}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_by_their_labels_and_families_stay() {
        let text = "\
# TYPE z gauge
z{listener=\"smtp\",stage=\"held\"} 1
z{listener=\"imap\",stage=\"relaying\"} 2
z{listener=\"imap\",stage=\"held\"} 10
# TYPE a gauge
# UNIT a seconds
a 1
# EOF
";
        let expected = "\
# TYPE z gauge
z{listener=\"imap\",stage=\"held\"} 10
z{listener=\"imap\",stage=\"relaying\"} 2
z{listener=\"smtp\",stage=\"held\"} 1
# TYPE a gauge
# UNIT a seconds
a 1
# EOF
";
        assert_eq!(ordered(text), expected);
    }

    #[test]
    fn a_histogram_stays_whole_with_its_buckets_by_their_bounds() {
        let of = |listener: &str| {
            format!(
                "dial_sum{{listener=\"{listener}\"}} 3.5\n\
                 dial_count{{listener=\"{listener}\"}} 2\n\
                 dial_bucket{{le=\"0.5\",listener=\"{listener}\"}} 0\n\
                 dial_bucket{{le=\"10.0\",listener=\"{listener}\"}} 2\n\
                 dial_bucket{{le=\"+Inf\",listener=\"{listener}\"}} 2\n"
            )
        };
        let text = |listeners: [&str; 3]| format!("# TYPE dial histogram\n{}", listeners.map(of).concat());
        assert_eq!(ordered(&text(["smtp", "imaps", "imap"])), text(["imap", "imaps", "smtp"]));
        let unlabelled =
            "dial_sum 1.0\ndial_count 1\ndial_bucket{le=\"2.0\"} 1\ndial_bucket{le=\"+Inf\"} 1\n";
        assert_eq!(ordered(unlabelled), unlabelled);
    }

    #[test]
    fn a_label_may_hold_what_separates_others() {
        let text = "a{b=\"le=\\\"1\\\",} 2\"} 1\na{b=\"\"} 1\n";
        assert_eq!(ordered(text), "a{b=\"\"} 1\na{b=\"le=\\\"1\\\",} 2\"} 1\n");
    }
}

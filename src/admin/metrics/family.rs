//! Metrics that are looked up for one scrape: one value, or a value for each set of labels.
//!
//! The library's own `GaugeVec` is not used: it joins the label values to tell series apart, so `a`, `bc` and
//! `ab`, `c` would be one series, and the names of servers and relays may be anything.

use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};

/// A value that goes up and down; it is left out when there is none.
pub fn gauge(name: &str, help: &str, value: impl Into<Option<f64>>) -> MetricFamily {
    gauges::<&str, 0>(name, help, [], value.into().map(|value| ([], value)))
}

/// A value for each set of labels.
pub fn gauges<V: Into<String>, const N: usize>(
    name: &str,
    help: &str,
    labels: [&str; N],
    series: impl IntoIterator<Item = ([V; N], f64)>,
) -> MetricFamily {
    let metric = |(values, value): ([V; N], f64)| {
        let pairs = labels.into_iter().zip(values).map(|(name, value)| {
            let mut pair = LabelPair::default();
            pair.set_name(name.to_owned());
            pair.set_value(value.into());
            pair
        });
        let (mut metric, mut gauge) = (Metric::from_label(pairs.collect()), Gauge::default());
        gauge.set_value(value);
        metric.set_gauge(gauge);
        metric
    };
    family(name, help, MetricType::GAUGE, series.into_iter().map(metric).collect())
}

/// A value that only grows; it is left out when there is none.
pub fn counter(name: &str, help: &str, value: impl Into<Option<f64>>) -> MetricFamily {
    let metric = |value| {
        let (mut metric, mut counter) = (Metric::default(), Counter::default());
        counter.set_value(value);
        metric.set_counter(counter);
        metric
    };
    family(name, help, MetricType::COUNTER, value.into().into_iter().map(metric).collect())
}

fn family(name: &str, help: &str, kind: MetricType, series: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(series);
    family
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;

    use super::*;

    #[test]
    fn labels_stay_as_they_are_given_and_are_escaped() {
        let series = [(["smtp", "a\"b\\c\nd"], 1.5), (["a", "bc"], 2.0), (["ab", "c"], 3.0)];
        let families = [gauges("up", "Whether.", ["z", "b"], series), counter("all_total", "All.", 1e10)];
        let expected = r#"# HELP up Whether.
# TYPE up gauge
up{z="smtp",b="a\"b\\c\nd"} 1.5
up{z="a",b="bc"} 2
up{z="ab",b="c"} 3
# HELP all_total All.
# TYPE all_total counter
all_total 10000000000
"#;
        assert_eq!(TextEncoder.encode_to_string(&families).unwrap(), expected);
    }

    #[test]
    fn without_a_value_there_is_no_series() {
        for family in [gauge("up", "Whether.", None), counter("all_total", "All.", None)] {
            assert!(family.get_metric().is_empty(), "{family:?}");
        }
    }
}

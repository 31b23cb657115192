//! The resources that the process uses, under the names that all Prometheus clients use.
//!
//! The library's own collector reads /proc/stat, which the unit's `ProcSubset=pid` hides.

use procfs::process::{LimitValue, Process};
use prometheus::proto::MetricFamily;
use rustix::time::{ClockId, clock_gettime};

use super::family::{counter, gauge};

/// The figures of this moment. A figure that /proc does not give is left out.
pub fn metrics() -> [MetricFamily; 6] {
    let process = Process::myself().ok();
    let stat = process.as_ref().and_then(|process| process.stat().ok());
    let stat = stat.as_ref();
    let open = process.as_ref().and_then(|process| process.fd_count().ok());
    let limits = process.as_ref().and_then(|process| process.limits().ok());
    let max = limits.and_then(|limits| match limits.max_open_files.soft_limit {
        LimitValue::Value(max) => Some(max as f64),
        LimitValue::Unlimited => None,
    });
    let ticks = procfs::ticks_per_second() as f64;
    let cpu = stat.map(|stat| (stat.utime + stat.stime) as f64 / ticks);
    let resident = stat.map(|stat| (stat.rss * procfs::page_size()) as f64);
    let start = stat.map(|stat| boot_time_secs() as f64 + stat.starttime as f64 / ticks);
    [
        counter("process_cpu_seconds_total", "User and system CPU time used.", cpu),
        gauge("process_resident_memory_bytes", "Memory in use.", resident),
        gauge(
            "process_threads",
            "Threads of the operating system.",
            stat.map(|stat| stat.num_threads as f64),
        ),
        gauge("process_start_time_seconds", "When the process started (Unix time).", start),
        gauge("process_open_fds", "Open file descriptors.", open.map(|open| open as f64)),
        gauge("process_max_fds", "Limit on open file descriptors.", max),
    ]
}

/// When the machine started, in Unix time: `btime` of /proc/stat, which the unit's `ProcSubset=pid`
/// hides. In whole seconds, as in /proc/stat, so that two scrapes give the same time.
fn boot_time_secs() -> i64 {
    let (now, up) = (clock_gettime(ClockId::Realtime), clock_gettime(ClockId::Boottime));
    now.tv_sec - up.tv_sec - i64::from(now.tv_nsec < up.tv_nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_s_start_is_the_one_that_proc_tells() {
        let told = procfs::boot_time_secs().expect("nothing hides /proc/stat here");
        // The clock may be adjusted a little between the two.
        assert!(boot_time_secs().abs_diff(i64::try_from(told).unwrap()) <= 1, "{} {told}", boot_time_secs());
    }
}

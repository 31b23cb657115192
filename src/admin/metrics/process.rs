//! What the process takes of the machine, under the names that all Prometheus clients use.

use std::sync::atomic::AtomicU64;

use procfs::process::{LimitValue, Process};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use rustix::time::{ClockId, clock_gettime};

/// Registers the figures of this moment. What /proc does not tell is absent.
pub fn register(registry: &mut Registry) {
    let Ok(process) = Process::myself() else { return };
    let processes = registry.sub_registry_with_prefix("process");
    if let Ok(stat) = process.stat() {
        let ticks = procfs::ticks_per_second() as f64;
        let cpu: Counter<f64, AtomicU64> = Counter::default();
        cpu.inc_by((stat.utime + stat.stime) as f64 / ticks);
        processes.register_with_unit("cpu", "User and system time taken", Unit::Seconds, cpu);
        let resident = whole(stat.rss * procfs::page_size());
        processes.register_with_unit("resident_memory", "Memory in use", Unit::Bytes, resident);
        let threads = whole(u64::try_from(stat.num_threads).unwrap_or_default());
        processes.register("threads", "Threads of the operating system", threads);
        let start: Gauge<f64, AtomicU64> = Gauge::default();
        start.set(boot_time_secs() as f64 + stat.starttime as f64 / ticks);
        processes.register_with_unit("start_time", "When it started (Unix time)", Unit::Seconds, start);
    }
    if let Ok(open) = process.fd_count() {
        processes.register("open_fds", "Open file descriptors", whole(open as u64));
    }
    if let Ok(limits) = process.limits()
        && let LimitValue::Value(max) = limits.max_open_files.soft_limit
    {
        processes.register("max_fds", "Limit on open file descriptors", whole(max));
    }
}

/// When the machine started, in Unix time: `btime` of /proc/stat, which the unit's `ProcSubset=pid`
/// hides. In whole seconds, as there, so that two scrapes do not differ by the time between two clocks.
fn boot_time_secs() -> i64 {
    let (now, up) = (clock_gettime(ClockId::Realtime), clock_gettime(ClockId::Boottime));
    now.tv_sec - up.tv_sec - i64::from(now.tv_nsec < up.tv_nsec)
}

fn whole(value: u64) -> Gauge {
    let gauge = Gauge::default();
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
    gauge
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_s_start_is_the_one_that_proc_tells() {
        let told = procfs::boot_time_secs().expect("nothing hides /proc/stat here");
        // The clock may be set between the two, by a little.
        assert!(boot_time_secs().abs_diff(i64::try_from(told).unwrap()) <= 1, "{} {told}", boot_time_secs());
    }
}

//! The limit on memory, and how it is divided.
//!
//! The limit is `limits.memory_mib`, or half of what the machine or the control group has, at most 256 MiB. Three
//! quarters of it limit the heap of the tailnet library, whose garbage collector works harder near that limit. A
//! sixteenth is for bytes in flight that all connections share; the minimum of each connection is outside it, and
//! shrinks when there are more connections (see `libtailscale/budget.go`). A thirty-second is for bytes that the
//! relay has read and not yet written.
//!
//! Deliberately not here: how many connections there may be (see `limits.rs`).

use std::fs;
use std::path::Path;

use procfs::process::Process;
use procfs::{ProcessCGroup, ProcessCGroups};

const MIB: u64 = 1024 * 1024;

/// The default is never more than this: more bytes in flight would not be faster.
const DEFAULT_CEILING_MIB: u64 = 256;

/// The default is never less than this: the program itself needs half of it.
const DEFAULT_FLOOR_MIB: u64 = 64;

/// The memory that the edge aims to stay below, and the reason for this figure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// In MiB, as `limits.memory_mib`.
    pub mib: u64,
    /// The reason, for the log.
    pub reason: String,
    /// A warning, if the machine has less than that.
    pub warning: Option<String>,
}

impl MemoryLimit {
    /// As configured, else derived from the machine.
    pub fn new(configured_mib: Option<u32>) -> MemoryLimit {
        MemoryLimit::on(&Machine::look(), configured_mib)
    }

    fn on(machine: &Machine, configured_mib: Option<u32>) -> MemoryLimit {
        let (all, whose) = (machine.bytes / MIB, machine.whose);
        let half = all / 2;
        let (mib, reason) = match (configured_mib, half) {
            (Some(mib), _) => (mib.into(), "limits.memory_mib".to_owned()),
            (None, DEFAULT_CEILING_MIB..) => {
                (DEFAULT_CEILING_MIB, "default; limits.memory_mib changes it".to_owned())
            }
            (None, ..DEFAULT_FLOOR_MIB) => (DEFAULT_FLOOR_MIB, "the least that an edge needs".to_owned()),
            (None, _) => (half, format!("half of the {all} MiB {whose}")),
        };
        let warning = (mib > all).then(|| {
            format!(
                "the limit on memory is {mib} MiB, more than the {all} MiB {whose}: the kernel may kill the edge; give it more memory, or lower limits.memory_mib"
            )
        });
        MemoryLimit { mib, reason, warning }
    }

    /// The whole limit, in bytes.
    pub fn bytes(&self) -> u64 {
        self.mib * MIB
    }

    /// The part for bytes in flight.
    pub fn in_flight_bytes(&self) -> u64 {
        self.bytes() / 16
    }

    /// The part for bytes that were read and not yet written.
    pub fn kept_bytes(&self) -> u64 {
        self.bytes() / 32
    }

    /// The part for the heap of the tailnet library.
    pub fn heap_bytes(&self) -> u64 {
        self.bytes() / 4 * 3
    }
}

/// The resident memory of this process at this moment, if /proc can be read.
pub fn resident_bytes() -> Option<u64> {
    Some(Process::myself().ok()?.stat().ok()?.rss * procfs::page_size())
}

/// How much memory there is for this process.
struct Machine {
    bytes: u64,
    whose: &'static str,
}

impl Machine {
    fn look() -> Machine {
        let system = rustix::system::sysinfo();
        let machine = system.totalram * u64::from(system.mem_unit);
        let groups = Process::myself().and_then(|process| process.cgroups()).ok();
        match groups.and_then(|groups| group_limit(&groups, Path::new("/sys/fs/cgroup"))) {
            Some(bytes) if bytes < machine => Machine { bytes, whose: "of its control group" },
            _ => Machine { bytes: machine, whose: "of this machine" },
        }
    }
}

/// The lowest memory limit of the process's control groups, with cgroups version 1 or 2.
fn group_limit(groups: &ProcessCGroups, root: &Path) -> Option<u64> {
    let limits = groups.into_iter().flat_map(|ProcessCGroup { controllers, pathname, .. }| {
        if controllers.is_empty() {
            lowest(root, pathname, &["memory.max", "memory.high"])
        } else if controllers.iter().any(|controller| controller == "memory") {
            lowest(&root.join("memory"), pathname, &["memory.limit_in_bytes"])
        } else {
            None
        }
    });
    limits.min()
}

/// The lowest number in these files of a group and of the groups above it. In a container the paths may be the
/// host's paths; then only the topmost group exists.
fn lowest(root: &Path, group: &str, files: &[&str]) -> Option<u64> {
    let groups =
        Path::new(group).ancestors().map(|group| root.join(group.strip_prefix("/").unwrap_or(group)));
    let paths = groups.flat_map(|group| files.iter().map(move |file| group.join(file)));
    paths.filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok()).min()
}

#[cfg(test)]
mod tests {
    use procfs::FromBufRead;

    use super::*;

    #[test]
    fn the_default_is_half_of_what_there_is_within_bounds() {
        for (mib, expected, reason) in [
            (64, 64, "the least that an edge needs"),
            (256, 128, "half of the 256 MiB here"),
            (510, 255, "half of the 510 MiB here"),
            (24 * 1024, 256, "default; limits.memory_mib changes it"),
        ] {
            let limit = MemoryLimit::on(&Machine { bytes: mib * MIB, whose: "here" }, None);
            assert_eq!((limit.mib, limit.reason.as_str(), limit.warning), (expected, reason, None));
        }
        assert_eq!(MemoryLimit::new(Some(1000)).mib, 1000);
        let limit = MemoryLimit::new(None);
        assert!((DEFAULT_FLOOR_MIB..=DEFAULT_CEILING_MIB).contains(&limit.mib), "{limit:?}");
    }

    #[test]
    fn a_limit_above_what_there_is_is_warned_of() {
        let machine = Machine { bytes: 40 * MIB, whose: "of its control group" };
        for (configured, mib) in [(None, 64), (Some(512), 512), (Some(41), 41)] {
            let limit = MemoryLimit::on(&machine, configured);
            let expected =
                format!("the limit on memory is {mib} MiB, more than the 40 MiB of its control group");
            assert!(limit.warning.is_some_and(|warning| warning.starts_with(&expected)));
        }
        assert_eq!(MemoryLimit::on(&machine, Some(40)).warning, None);
    }

    #[test]
    fn the_lowest_limit_of_all_control_groups_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let limit = |groups: &str| {
            group_limit(&ProcessCGroups::from_buf_read(groups.as_bytes()).unwrap(), dir.path())
        };
        assert_eq!(limit("0::/system.slice/edge.service\n"), None);
        write("system.slice/edge.service/memory.max", "max\n");
        assert_eq!(limit("0::/system.slice/edge.service\n"), None);
        write("system.slice/memory.max", "536870912\n");
        write("system.slice/edge.service/memory.high", "1073741824\n");
        assert_eq!(limit("0::/system.slice/edge.service\n"), Some(512 * MIB));
        write("system.slice/edge.service/memory.high", "268435456\n");
        assert_eq!(limit("0::/system.slice/edge.service\n"), Some(256 * MIB));

        // Version 1, seen from a container that shows the host's paths.
        let first = "12:cpu,cpuacct:/docker/1\n9:memory:/docker/1\n0::/\n";
        assert_eq!(limit(first), None);
        write("memory/memory.limit_in_bytes", "134217728\n");
        assert_eq!(limit(first), Some(128 * MIB));
    }
}

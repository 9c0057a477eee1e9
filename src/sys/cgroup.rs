//! Memory limits of the control groups that this process belongs to: its own and those of every parent, of version 1
//! and version 2 (cgroups(7)).

use std::fs;
use std::path::{Path, PathBuf};

/// The memory that a control group still allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// The file that holds the limit.
    pub file: PathBuf,
    /// The limit in bytes.
    pub limit_bytes: u64,
    /// Bytes in use that the kernel cannot reclaim by dropping clean file pages.
    pub used_bytes: u64,
}

impl MemoryLimit {
    /// Number of bytes that can still be allocated.
    pub fn available_bytes(&self) -> u64 {
        self.limit_bytes.saturating_sub(self.used_bytes)
    }
}

/// The limit that leaves the least available memory; `None` if there is no limit.
pub fn tightest_memory_limit() -> Option<MemoryLimit> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let limits = groups_of(&groups, &mounts);
    limits.iter().filter_map(|(group, names)| limit_in(group, names)).min_by_key(MemoryLimit::available_bytes)
}

/// The memory.high of the groups that this process belongs to, and the PSI file of its own group (memory.pressure;
/// proc_pressure(5)), if there is one.
pub fn pressure_indicators() -> (Vec<MemoryLimit>, Option<PathBuf>) {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    indicators_of(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"))
}

fn indicators_of(groups: &str, mounts: &str) -> (Vec<MemoryLimit>, Option<PathBuf>) {
    let groups: Vec<PathBuf> =
        groups_of(groups, mounts).into_iter().filter(|(_, names)| names.has_pressure).map(|(group, _)| group).collect();
    let limits = groups.iter().filter_map(|group| limit_in(group, &HIGH)).collect();
    // The first entry is the process's own group.
    let pressure = groups.first().map(|group| group.join("memory.pressure"));
    (limits, pressure.filter(|file| file.exists()))
}

/// The control files of one cgroup version.
struct ControlFiles {
    limit: &'static str,
    used: &'static str,
    /// Keys of `memory.stat` whose sum the kernel can reclaim.
    reclaimable: [&'static str; 2],
    /// Whether its groups have PSI files and a memory.high.
    has_pressure: bool,
}

const V1: ControlFiles = ControlFiles {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    reclaimable: ["total_inactive_file", "total_active_file"],
    has_pressure: false,
};
const V2: ControlFiles = ControlFiles {
    limit: "memory.max",
    used: "memory.current",
    reclaimable: ["inactive_file", "active_file"],
    has_pressure: true,
};
/// The limit above which the kernel throttles a group of version 2.
const HIGH: ControlFiles = ControlFiles { limit: "memory.high", ..V2 };

/// The directories of the groups in `groups` (the text of /proc/self/cgroup) and of their parents, with each group
/// before its parent, found through `mounts` (the text of /proc/self/mountinfo).
fn groups_of(groups: &str, mounts: &str) -> Vec<(PathBuf, &'static ControlFiles)> {
    let mut found = Vec::new();
    for line in groups.lines() {
        // hierarchy-ID:controllers:path
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(group)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let names = match controllers {
            "" => &V2,
            list if list.split(',').any(|controller| controller == "memory") => &V1,
            _ => continue,
        };
        let Some((mount_point, root)) = mount_of(mounts, controllers) else { continue };
        // In a container the mount may start below the hierarchy's root.
        let below = Path::new(group).strip_prefix(&root).unwrap_or(Path::new(""));
        let innermost = mount_point.join(below.strip_prefix("/").unwrap_or(below));
        let groups = innermost.ancestors().take_while(|directory| directory.starts_with(&mount_point));
        found.extend(groups.map(|directory| (directory.to_path_buf(), names)));
    }
    found
}

/// Mount point of the hierarchy with these controllers (of version 2 without any), and the group at its root.
fn mount_of(mounts: &str, controllers: &str) -> Option<(PathBuf, PathBuf)> {
    mounts.lines().find_map(|line| {
        // ID parent device root mount-point options [fields] - type source super-options
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let (kind, options) = (after.next()?, after.nth(1)?);
        let is_wanted = match controllers {
            "" => kind == "cgroup2",
            _ => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
        };
        let mut before = before.split(' ').skip(3);
        let (root, mount_point) = (before.next()?, before.next()?);
        is_wanted.then(|| (PathBuf::from(mount_point), PathBuf::from(root)))
    })
}

/// The limit of the group at `directory`; `None` if it has none.
fn limit_in(directory: &Path, names: &ControlFiles) -> Option<MemoryLimit> {
    let number = |name: &str| fs::read_to_string(directory.join(name)).ok()?.trim().parse::<u64>().ok();
    let file = directory.join(names.limit);
    // "max" is not a number. Version 1 reports a number near 2^63 instead.
    let limit_bytes = number(names.limit).filter(|&limit| limit < 1 << 62)?;
    let stat = fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
    let of_key = |key: &str| {
        let value = stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        value.and_then(|value| value.parse::<u64>().ok()).unwrap_or(0)
    };
    let reclaimable: u64 = names.reclaimable.into_iter().map(of_key).sum();
    let used_bytes = number(names.used).unwrap_or(0).saturating_sub(reclaimable);
    Some(MemoryLimit { file, limit_bytes, used_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory_limits(groups: &str, mounts: &str) -> Vec<MemoryLimit> {
        groups_of(groups, mounts).iter().filter_map(|(group, names)| limit_in(group, names)).collect()
    }

    /// A directory that is removed at the end.
    struct Root(PathBuf);

    impl Root {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("genblk-cgroup-{name}.{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn write(&self, group: &str, files: &[(&str, &str)]) {
            let directory = self.0.join(group);
            fs::create_dir_all(&directory).unwrap();
            for (name, text) in files {
                fs::write(directory.join(name), text).unwrap();
            }
        }

        fn mount(&self, root: &str, kind: &str, options: &str) -> String {
            format!("30 24 0:26 {root} {} rw,nosuid shared:4 - {kind} cgroup {options}\n", self.0.display())
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_cgroup_v2_limit_of_any_ancestor_counts() {
        let root = Root::new("v2");
        root.write("", &[]);
        root.write("a.slice", &[("memory.max", "1000000\n"), ("memory.current", "700000\n")]);
        let stat = "anon 1\ninactive_file 100000\nactive_file 50000\nfile 900000\n";
        root.write("a.slice", &[("memory.stat", stat)]);
        root.write("a.slice/b.service", &[("memory.max", "max\n"), ("memory.current", "5\n")]);
        let limits = memory_limits("0::/a.slice/b.service\n", &root.mount("/", "cgroup2", "rw"));
        let file = root.0.join("a.slice/memory.max");
        assert_eq!(limits, [MemoryLimit { file, limit_bytes: 1_000_000, used_bytes: 550_000 }]);
        assert_eq!(limits[0].available_bytes(), 450_000);
    }

    #[test]
    fn a_cgroup_v1_limit_is_found_at_its_mount_in_the_container() {
        let root = Root::new("v1");
        root.write("", &[("memory.limit_in_bytes", "9223372036854771712\n"), ("memory.usage_in_bytes", "9\n")]);
        root.write("vm", &[("memory.limit_in_bytes", "4096\n"), ("memory.usage_in_bytes", "8192\n")]);
        let groups = "5:cpu,cpuacct:/x\n4:memory:/docker/1234/vm\n";
        let mounts = root.mount("/", "cgroup", "rw,cpu,cpuacct") + &root.mount("/docker/1234", "cgroup", "rw,memory");
        let limits = memory_limits(groups, &mounts);
        assert_eq!(limits.len(), 1, "the root has no limit: {limits:?}");
        assert_eq!((limits[0].limit_bytes, limits[0].available_bytes()), (4096, 0), "more is used than allowed");
        assert_eq!(limits[0].file, root.0.join("vm/memory.limit_in_bytes"));
    }

    #[test]
    fn memory_high_of_any_ancestor_counts_as_a_limit() {
        let root = Root::new("high");
        root.write("", &[("memory.pressure", "")]);
        let high = [("memory.high", "1000\n"), ("memory.current", "900\n"), ("memory.stat", "active_file 200\n")];
        root.write("a.slice", &high);
        let own = "a.slice/b.service";
        root.write(own, &[("memory.high", "max\n"), ("memory.max", "5\n"), ("memory.pressure", "")]);
        let mounts = root.mount("/", "cgroup2", "rw");
        let (limits, pressure) = indicators_of("0::/a.slice/b.service\n", &mounts);
        let file = root.0.join("a.slice/memory.high");
        assert_eq!(limits, [MemoryLimit { file, limit_bytes: 1000, used_bytes: 700 }]);
        assert_eq!(pressure, Some(root.0.join(own).join("memory.pressure")));
        let (limits, pressure) = indicators_of("0::/a.slice\n", &mounts);
        assert_eq!((limits.len(), pressure), (1, None), "a kernel without PSI");
        assert_eq!(indicators_of("", ""), (Vec::new(), None));
    }

    #[test]
    fn a_process_outside_any_limited_cgroup_has_no_limit() {
        let root = Root::new("none");
        assert_eq!(memory_limits("0::/\n1:name=systemd:/x\n", &root.mount("/", "cgroup2", "rw")), []);
        assert_eq!(memory_limits("nonsense\n0::/gone/../..\n", "nonsense\n"), []);
    }
}

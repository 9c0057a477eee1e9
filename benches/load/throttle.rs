//! Slows a device down with the kernel's block throttling (cgroup v1 `blkio`, cgroup v2 `io`).
//!
//! Version 1 can throttle the root cgroup, which contains the benchmark, the servers and the kernel's write-back
//! threads. Version 2 cannot throttle the root: the benchmark and its servers move into their own cgroup.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;

const V1_ROOT: &str = "/sys/fs/cgroup/blkio";
const V2_ROOT: &str = "/sys/fs/cgroup";

/// Limits per second, for reads and for writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub bytes: u64,
    pub operations: u64,
}

/// A throttle in force; dropping it removes it.
#[derive(Debug)]
pub struct Throttle {
    /// "major:minor".
    device: String,
    group: Group,
}

#[derive(Debug)]
enum Group {
    V1,
    /// Our cgroup, and the one to return to.
    V2(PathBuf, PathBuf),
}

impl Throttle {
    /// Throttles `device` ("major:minor").
    ///
    /// # Errors
    /// The system's. Needs root and the controller.
    pub fn new(device: &str, rate: Rate) -> io::Result<Self> {
        let group = if v1_is_there() { Group::V1 } else { own_group()? };
        let throttle = Self { device: device.to_string(), group };
        throttle.set(Some(rate))?;
        Ok(throttle)
    }

    /// Removes a throttle that a killed benchmark left behind: version 1 keeps it under the device number, and applies
    /// it to the next device with that number.
    pub fn remove_stale(device: &str) {
        if v1_is_there() {
            drop(Self { device: device.to_string(), group: Group::V1 });
        }
    }

    fn set(&self, rate: Option<Rate>) -> io::Result<()> {
        let device = &self.device;
        match &self.group {
            Group::V1 => {
                // Zero removes a throttle.
                let Rate { bytes, operations } = rate.unwrap_or(Rate { bytes: 0, operations: 0 });
                for (what, value) in
                    [("read_bps", bytes), ("write_bps", bytes), ("read_iops", operations), ("write_iops", operations)]
                {
                    fs::write(
                        Path::new(V1_ROOT).join(format!("blkio.throttle.{what}_device")),
                        format!("{device} {value}"),
                    )?;
                }
                Ok(())
            }
            Group::V2(group, _) => {
                let value = |number: Option<u64>| number.map_or("max".to_string(), |number| number.to_string());
                let (bytes, operations) = (value(rate.map(|r| r.bytes)), value(rate.map(|r| r.operations)));
                let line = format!("{device} rbps={bytes} wbps={bytes} riops={operations} wiops={operations}");
                fs::write(group.join("io.max"), line)
            }
        }
    }
}

fn v1_is_there() -> bool {
    Path::new(V1_ROOT).join("blkio.throttle.write_bps_device").exists()
}

/// Creates a v2 cgroup and moves this process into it.
fn own_group() -> io::Result<Group> {
    let root = Path::new(V2_ROOT);
    let here = fs::read_to_string("/proc/self/cgroup")?;
    let here = here.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let before = root.join(here);
    fs::write(root.join("cgroup.subtree_control"), "+io")?;
    let group = root.join(format!("genblk-bench-{}", process::id()));
    fs::create_dir(&group)?;
    fs::write(group.join("cgroup.procs"), process::id().to_string())?;
    Ok(Group::V2(group, before))
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // Errors are harmless: the loop device is about to be removed.
        let _ = self.set(None);
        if let Group::V2(group, before) = &self.group {
            let _ = fs::write(before.join("cgroup.procs"), process::id().to_string());
            let _ = fs::remove_dir(group);
        }
    }
}

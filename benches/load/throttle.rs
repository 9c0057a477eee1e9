//! A device made slow for everybody, by the kernel's block throttling (cgroup blkio in version 1, io in version 2).
//!
//! Version 1 can limit the root group, in which everything runs here, write-back of the kernel's page cache included. In
//! version 2 the root can't be limited: the benchmark and its servers move into a group of their own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;

const V1_ROOT: &str = "/sys/fs/cgroup/blkio";
const V2_ROOT: &str = "/sys/fs/cgroup";

/// What a device may do in a second, in each direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub bytes: u64,
    pub operations: u64,
}

/// A limit in force; dropping it lifts it.
#[derive(Debug)]
pub struct Throttle {
    /// "major:minor".
    device: String,
    group: Group,
}

#[derive(Debug)]
enum Group {
    V1,
    /// Our group, and the one we came from.
    V2(PathBuf, PathBuf),
}

impl Throttle {
    /// Limits `device` ("major:minor").
    ///
    /// # Errors
    /// The system's: it takes root, and a controller that is there.
    pub fn new(device: &str, rate: Rate) -> io::Result<Self> {
        let group = if v1_is_there() { Group::V1 } else { own_group()? };
        let throttle = Self { device: device.to_string(), group };
        throttle.set(Some(rate))?;
        Ok(throttle)
    }

    /// Lifts what a benchmark that was killed has left in force: version 1 keeps a limit by the device's number, also for the
    /// next device that gets it.
    pub fn lift_old(device: &str) {
        if v1_is_there() {
            drop(Self { device: device.to_string(), group: Group::V1 });
        }
    }

    fn set(&self, rate: Option<Rate>) -> io::Result<()> {
        let device = &self.device;
        match &self.group {
            Group::V1 => {
                // Zero lifts a limit.
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

/// A new group of version 2 with this process in it.
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
        // Nothing can be done about what the kernel refuses here; the loop device goes away soon anyway.
        let _ = self.set(None);
        if let Group::V2(group, before) = &self.group {
            let _ = fs::write(before.join("cgroup.procs"), process::id().to_string());
            let _ = fs::remove_dir(group);
        }
    }
}

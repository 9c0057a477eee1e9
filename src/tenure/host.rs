//! The identity of this host and of its present boot.

use std::fs;

/// The boot of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// The machine ID (machine-id(5)); 0 if the host has none.
    pub machine: u128,
    /// The boot ID (random(4)); 0 if the kernel does not report it.
    pub boot: u128,
}

/// The relation between the boot in a record and the present one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootRelation {
    /// The same host, not rebooted since: memory that the record names may still exist.
    SameBoot,
    /// The same host before its last boot: its memory is lost.
    EarlierBoot,
    /// Another host, which may still hold a cache.
    OtherHost,
}

impl Boot {
    /// The present boot of this host.
    pub fn current() -> Self {
        let machine = ["/etc/machine-id", "/var/lib/dbus/machine-id"].iter().find_map(|path| read_hex_id(path));
        Self { machine: machine.unwrap_or(0), boot: read_hex_id("/proc/sys/kernel/random/boot_id").unwrap_or(0) }
    }

    /// The relation of `recorded` to this boot.
    ///
    /// => Containers on one host have different machine IDs, but the same boot ID.
    /// => A host without a machine ID cannot be recognized after a reboot.
    pub fn relation_to(self, recorded: Self) -> BootRelation {
        if self.boot != 0 && self.boot == recorded.boot {
            BootRelation::SameBoot
        } else if self.machine != 0 && self.machine == recorded.machine {
            BootRelation::EarlierBoot
        } else {
            BootRelation::OtherHost
        }
    }
}

/// The time of the host's last boot, in seconds since 1970 by the present clock.
pub fn booted_at() -> Option<u64> {
    parse_btime(&fs::read_to_string("/proc/stat").ok()?)
}

fn parse_btime(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

/// The hexadecimal number of 32 digits in a file; dashes are ignored.
fn read_hex_id(path: &str) -> Option<u128> {
    let text = fs::read_to_string(path).ok()?;
    let digits: String = text.trim().chars().filter(|&digit| digit != '-').collect();
    if digits.len() == 32 { u128::from_str_radix(&digits, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_recognized_by_its_boot_or_by_its_machine_id() {
        let here = Boot { machine: 1, boot: 2 };
        let relations = [
            (Boot { machine: 1, boot: 2 }, BootRelation::SameBoot),
            (Boot { machine: 7, boot: 2 }, BootRelation::SameBoot),
            (Boot { machine: 1, boot: 7 }, BootRelation::EarlierBoot),
            (Boot { machine: 7, boot: 7 }, BootRelation::OtherHost),
            (Boot { machine: 0, boot: 0 }, BootRelation::OtherHost),
        ];
        for (recorded, relation) in relations {
            assert_eq!(here.relation_to(recorded), relation, "{recorded:?}");
        }
        let anonymous = Boot { machine: 0, boot: 0 };
        assert_eq!(anonymous.relation_to(anonymous), BootRelation::OtherHost);
    }

    #[test]
    fn the_time_of_the_boot_is_in_the_past() {
        assert_eq!(parse_btime("cpu 1 2 3\nbtime 1764459600\nprocesses 7\n"), Some(1_764_459_600));
        let now = super::super::token::wall_clock_ns() / 1_000_000_000;
        assert!(booted_at().is_some_and(|at| at > 0 && at <= now));
    }

    #[test]
    fn the_boot_id_of_this_host_is_readable() {
        assert_eq!(Boot::current().relation_to(Boot::current()), BootRelation::SameBoot);
    }
}

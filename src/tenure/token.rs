//! Change tokens: the host's information about the last change of an image, and the conclusions from comparing two.
//!
//! A file's modification time changes with every write, its change time also with every change of an attribute; only
//! the latter cannot be set by programs. The daemon records the token whenever none of its own changes is in flight. If
//! it dies at such a time, the next daemon must find the same token. If it dies with changes in flight, these have
//! changed the times again; the heartbeat in the ledger bounds when.
//!
//! For a block device, the host counts the sectors written since the device was attached, and the daemon counts those
//! that it has started to write itself. More than those are writes by another process. No more of them prove nothing:
//! the counter of a partition lacks writes to the whole disk, and that of a shared disk those of other hosts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long after the daemon's last heartbeat the kernel may finish changes that were in flight when the daemon died,
/// and so may set the image's times.
const IN_FLIGHT_SLACK_NS: u64 = 2_000_000_000;
/// Coarsest resolution of file times (FAT). While a file system is mounted, it may report times more precisely than it
/// stores them.
const TIME_UNIT_MAX_NS: u64 = 2_000_000_000;

/// Marks a counter of sectors whose accounting is switched off (`iostats`). Some drivers count even then.
pub const MAY_MISS_WRITES: u64 = 1 << 63;

/// The host's information about the last change of an image. A field that the host does not report is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChangeToken {
    /// Size of the image in bytes.
    pub size_bytes: u64,
    /// The time when its data was last modified, in nanoseconds since 1970.
    pub modified_ns: u64,
    /// The time when its data or attributes were last changed, in nanoseconds since 1970.
    pub changed_ns: u64,
    /// Its allocated space, in units of 512 bytes.
    pub blocks: u64,
    /// The kernel's sequence number of a block device.
    pub disk_sequence: u64,
    /// Sectors written to a block device since it was attached, plus 1; with [`MAY_MISS_WRITES`] if the host may not
    /// count them.
    pub sectors_written: u64,
}

impl ChangeToken {
    /// Number of words of a token.
    pub const WORDS: usize = 6;

    /// The token as words.
    pub fn words(self) -> [u64; Self::WORDS] {
        let Self { size_bytes, modified_ns, changed_ns, blocks, disk_sequence, sectors_written } = self;
        [size_bytes, modified_ns, changed_ns, blocks, disk_sequence, sectors_written]
    }

    /// The token in these words.
    pub fn from_words(words: [u64; Self::WORDS]) -> Self {
        let [size_bytes, modified_ns, changed_ns, blocks, disk_sequence, sectors_written] = words;
        Self { size_bytes, modified_ns, changed_ns, blocks, disk_sequence, sectors_written }
    }

    fn has_times(&self) -> bool {
        self.modified_ns != 0 && self.changed_ns != 0
    }
}

/// The wall clock in nanoseconds since 1970.
pub fn wall_clock_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0))
}

/// The time since a moment of the wall clock.
pub fn age_of(wall_ns: u64) -> Duration {
    Duration::from_nanos(wall_clock_ns().saturating_sub(wall_ns))
}

/// The last daemon's record of its image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastSeen {
    /// The last token that it recorded.
    pub token: ChangeToken,
    /// Whether it has not started a change of the image since.
    pub is_at_rest: bool,
    /// The size up to which it served the image, which may have grown since the token.
    pub served_bytes: u64,
    /// The last time when it is known to have lived while it changed the image, in nanoseconds since 1970; 0 if it
    /// never did.
    pub heartbeat_ns: u64,
    /// Bytes of the changes that it has started since, in whole pages.
    pub changed_bytes: u64,
}

/// The verdict of tokens about changes of an image by other processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangeVerdict {
    /// No other process has changed its data.
    Unchanged,
    /// The evidence is consistent with changes by the last daemon alone.
    Plausible,
    /// The tokens are inconclusive, for this reason.
    Unknown(String),
    /// Another process has changed its data, for this reason.
    Changed(String),
}

impl LastSeen {
    /// Whether another process has changed an image with the token `now`.
    pub fn judge(&self, now: &ChangeToken) -> ChangeVerdict {
        let counted = self.judge_device(now);
        // The times of a loop device's file do not show writes within two seconds after the daemon's death.
        let has_times = self.token.has_times() && now.has_times();
        if has_times && !matches!(counted, ChangeVerdict::Changed(_)) { self.judge_times(now) } else { counted }
    }

    fn judge_times(&self, now: &ChangeToken) -> ChangeVerdict {
        let Self { token, is_at_rest, heartbeat_ns, .. } = *self;
        let same_size = token.size_bytes == now.size_bytes;
        // If the last daemon served the new size, it caused or followed the growth.
        let is_known_size = same_size || !is_at_rest && now.size_bytes == self.served_bytes;
        if is_at_rest && same_size && (token.modified_ns, token.changed_ns) == (now.modified_ns, now.changed_ns) {
            return ChangeVerdict::Unchanged;
        }
        // If the clock was set back during the last tenure, it no longer orders changes.
        let is_clock_monotonic = is_at_rest || heartbeat_ns >= token.modified_ns;
        let modified = round_like(token.modified_ns, now.modified_ns);
        if now.modified_ns < modified && is_clock_monotonic {
            return ChangeVerdict::Changed("its modification time was set back".to_owned());
        }
        let latest = |seen: u64| if is_at_rest { seen } else { seen.max(heartbeat_ns) + IN_FLIGHT_SLACK_NS };
        if now.modified_ns > latest(token.modified_ns) {
            if is_known_size || now.size_bytes == 0 {
                return ChangeVerdict::Changed(self.modified_late(now.modified_ns));
            }
            // Truncation sets both times, and takes no space.
            let only_grown = is_at_rest && now.size_bytes > token.size_bytes && now.blocks == token.blocks;
            return match only_grown && now.modified_ns == now.changed_ns {
                true => ChangeVerdict::Plausible,
                false => ChangeVerdict::Unknown("its size was changed".to_owned()),
            };
        }
        if now.changed_ns > latest(token.changed_ns) {
            // If the modification time is known exactly, it proves that the data was not changed.
            return match is_at_rest && same_size && now.modified_ns == token.modified_ns {
                true => ChangeVerdict::Plausible,
                false => ChangeVerdict::Unknown("its attributes were changed".to_owned()),
            };
        }
        if is_known_size { ChangeVerdict::Plausible } else { ChangeVerdict::Unknown("its size was changed".to_owned()) }
    }

    /// The reason for a modification that is too late to be one by the last daemon.
    fn modified_late(&self, modified_ns: u64) -> String {
        if self.is_at_rest {
            return "it was modified after the daemon's last write".to_owned();
        }
        let late = Duration::from_nanos(modified_ns.saturating_sub(self.heartbeat_ns)).as_secs();
        format!(
            "it was modified {late} s after the last heartbeat of the daemon, which died while it was writing (if no \
             other process has changed it, the daemon's own last write took that long, and the cache is right)"
        )
    }

    fn judge_device(&self, now: &ChangeToken) -> ChangeVerdict {
        let Self { token, changed_bytes, .. } = *self;
        if token.disk_sequence == 0 || token.disk_sequence != now.disk_sequence {
            return ChangeVerdict::Unknown("there is no evidence that it is unchanged".to_owned());
        }
        let no_counter = || ChangeVerdict::Unknown("the device has no write counter".to_owned());
        if token.sectors_written == 0 || now.sectors_written == 0 {
            return no_counter();
        }
        let [before, after] = [token, *now].map(|token| token.sectors_written & !MAY_MISS_WRITES);
        if after < before || after - before > changed_bytes / 512 {
            return ChangeVerdict::Changed("the device counts more writes than that daemon issued".to_owned());
        }
        let may_miss = (token.sectors_written | now.sectors_written) & MAY_MISS_WRITES != 0;
        if may_miss { no_counter() } else { ChangeVerdict::Plausible }
    }
}

/// `now`, if a file system could have rounded `seen` down to it; otherwise `seen`.
fn round_like(seen: u64, now: u64) -> u64 {
    let is_rounded = now.is_multiple_of(1_000_000_000) && now <= seen && seen - now < TIME_UNIT_MAX_NS;
    if is_rounded { now } else { seen }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const TOKEN: ChangeToken = ChangeToken {
        size_bytes: 1 << 20,
        modified_ns: 100 * SECOND + 5,
        changed_ns: 100 * SECOND + 7,
        blocks: 16,
        disk_sequence: 0,
        sectors_written: 0,
    };
    const AT_REST: LastSeen = LastSeen {
        token: TOKEN,
        is_at_rest: true,
        served_bytes: TOKEN.size_bytes,
        heartbeat_ns: 100 * SECOND + 6,
        changed_bytes: 0,
    };
    const IN_FLIGHT: LastSeen = LastSeen { is_at_rest: false, heartbeat_ns: 110 * SECOND, ..AT_REST };

    fn is_unknown(verdict: &ChangeVerdict) -> bool {
        matches!(verdict, ChangeVerdict::Unknown(_))
    }

    fn is_changed(verdict: &ChangeVerdict) -> bool {
        matches!(verdict, ChangeVerdict::Changed(_))
    }

    #[test]
    fn a_token_round_trips_through_its_words() {
        let token = ChangeToken { disk_sequence: 3, sectors_written: 4, ..TOKEN };
        assert_eq!(ChangeToken::from_words(token.words()), token);
    }

    #[test]
    fn an_idle_image_is_unchanged_only_with_an_equal_token() {
        assert_eq!(AT_REST.judge(&TOKEN), ChangeVerdict::Unchanged);
        let written = ChangeToken { modified_ns: TOKEN.modified_ns + 1, changed_ns: TOKEN.changed_ns + 1, ..TOKEN };
        assert!(is_changed(&AT_REST.judge(&written)));
        let attributes = ChangeToken { changed_ns: TOKEN.changed_ns + 1, ..TOKEN };
        assert_eq!(AT_REST.judge(&attributes), ChangeVerdict::Plausible);
        let attributes = ChangeToken { modified_ns: 109 * SECOND, changed_ns: 200 * SECOND, ..TOKEN };
        assert!(is_unknown(&IN_FLIGHT.judge(&attributes)));
    }

    #[test]
    fn timestamps_set_back_are_a_change() {
        let restored = ChangeToken { modified_ns: 50 * SECOND, changed_ns: 200 * SECOND, ..TOKEN };
        assert!(is_changed(&AT_REST.judge(&restored)) && is_changed(&IN_FLIGHT.judge(&restored)));
        let rounded = ChangeToken { modified_ns: 100 * SECOND, changed_ns: 100 * SECOND, ..TOKEN };
        assert_eq!(AT_REST.judge(&rounded), ChangeVerdict::Plausible, "a coarse file system was mounted again");
        let clock_set_back = LastSeen { heartbeat_ns: 40 * SECOND, ..IN_FLIGHT };
        let written = ChangeToken { modified_ns: 40 * SECOND, changed_ns: 40 * SECOND, ..TOKEN };
        assert_eq!(clock_set_back.judge(&written), ChangeVerdict::Plausible);
    }

    #[test]
    fn a_modification_long_after_the_last_heartbeat_is_foreign() {
        let at = |modified_ns| ChangeToken { modified_ns, changed_ns: modified_ns, ..TOKEN };
        assert_eq!(IN_FLIGHT.judge(&at(109 * SECOND)), ChangeVerdict::Plausible);
        assert_eq!(IN_FLIGHT.judge(&at(111 * SECOND)), ChangeVerdict::Plausible);
        assert!(is_changed(&IN_FLIGHT.judge(&at(113 * SECOND))));
    }

    #[test]
    fn only_pure_growth_of_an_image_is_plausible_without_a_sample() {
        let grown = ChangeToken { size_bytes: 2 << 20, modified_ns: 200 * SECOND, changed_ns: 200 * SECOND, ..TOKEN };
        assert_eq!(AT_REST.judge(&grown), ChangeVerdict::Plausible);
        assert!(is_unknown(&IN_FLIGHT.judge(&grown)));
        assert!(is_unknown(&AT_REST.judge(&ChangeToken { blocks: 17, ..grown })));
        // The daemon served the image while it grew.
        let while_served = ChangeToken { modified_ns: 109 * SECOND, changed_ns: 109 * SECOND, ..grown };
        assert!(is_unknown(&IN_FLIGHT.judge(&while_served)));
        let followed = LastSeen { served_bytes: grown.size_bytes, ..IN_FLIGHT };
        assert_eq!(followed.judge(&while_served), ChangeVerdict::Plausible);
        assert!(is_changed(&followed.judge(&grown)), "it was written long after the daemon's death");
        assert!(is_unknown(&AT_REST.judge(&ChangeToken { size_bytes: 4096, ..grown })));
    }

    #[test]
    fn a_foreign_sector_count_of_a_device_is_a_change() {
        let token = ChangeToken { size_bytes: 1 << 20, disk_sequence: 9, sectors_written: 101, ..Default::default() };
        let wrote = LastSeen { token, is_at_rest: false, served_bytes: 0, heartbeat_ns: 5, changed_bytes: 4096 };
        let after = |sectors_written| ChangeToken { sectors_written, ..token };
        assert_eq!(wrote.judge(&after(101)), ChangeVerdict::Plausible);
        assert_eq!(wrote.judge(&after(109)), ChangeVerdict::Plausible);
        assert!(is_changed(&wrote.judge(&after(110))));
        let rest = LastSeen { is_at_rest: true, changed_bytes: 0, ..wrote };
        assert_eq!(rest.judge(&after(101)), ChangeVerdict::Plausible, "it does not count writes of other hosts");
        assert!(is_changed(&rest.judge(&after(102))));
        assert!(is_unknown(&rest.judge(&ChangeToken { disk_sequence: 10, ..token })));
        assert!(is_unknown(&rest.judge(&after(0))));
        assert!(is_unknown(&rest.judge(&after(101 | MAY_MISS_WRITES))));
        assert!(is_changed(&rest.judge(&after(102 | MAY_MISS_WRITES))));
        assert!(is_unknown(&LastSeen::default().judge(&token)), "an older layout has no token");
    }

    #[test]
    fn the_write_counter_of_a_loop_device_reveals_a_change_that_its_times_do_not() {
        let token = ChangeToken { disk_sequence: 9, sectors_written: 101, ..TOKEN };
        let wrote = LastSeen { token, changed_bytes: 4096, ..IN_FLIGHT };
        let after = |sectors_written| ChangeToken { sectors_written, modified_ns: 111 * SECOND, ..token };
        assert_eq!(wrote.judge(&after(109)), ChangeVerdict::Plausible);
        assert!(is_changed(&wrote.judge(&after(110))));
        let attached_again = ChangeToken { disk_sequence: 10, ..after(2) };
        assert_eq!(wrote.judge(&attached_again), ChangeVerdict::Plausible);
        let rest = LastSeen { token, ..AT_REST };
        assert_eq!(rest.judge(&token), ChangeVerdict::Unchanged, "its file was not written by any way");
    }
}

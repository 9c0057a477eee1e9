//! The list of pages that were in memory at a clean stop: page numbers, no data. The next start reads them in.
//!
//! The list is a hint: whatever it says, the guest reads correct data. Its first line names the image's path and the
//! tenure in which it was written ([`TenureKey`]). A list of another image, or of an image that another daemon has
//! served since, is not used, because it would fill the cache with the wrong pages.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::process::Process;
use super::warm_pages::{PageExtent, WarmEnd, page_count, resident_pages, warm_pages};
use crate::config::DeviceConfig;
use crate::image_id::ImageId;
use crate::store::file::LastTenure;
use crate::store::named::{ImageKind, NamedImage};
use crate::sys::process::effective_uid;
use crate::units::{PAGE_BYTES, counted};

/// The first words of a list.
const MAGIC: &str = "genblk warm list 2";
/// How long a clean stop waits for the list in total.
const SAVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest list: that of a cache of 1 TiB in which no two pages are adjacent.
const BYTES_MAX: u64 = 1 << 32;
/// The list of a device; `None` if it has none.
fn path_of(config: &DeviceConfig) -> Option<PathBuf> {
    let directory = Path::new(&config.cache.warm_dir);
    // FNV-1a of the path, which may be longer than a name.
    let bytes = config.image.as_os_str().as_encoded_bytes();
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    (!config.cache.warm_dir.is_empty()).then(|| directory.join(format!("genblk-warm-{hash:016x}")))
}

/// Which tenure of an image a list belongs to, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TenureKey(String);

impl TenureKey {
    /// The last tenure that the image records. An image without records of its own (a block device, a file system
    /// without attributes, an NBD export) has only its identity, and a block device or an export only its path: a
    /// record of this host would not outlive a reboot, as the list does.
    pub fn of(image: &dyn NamedImage) -> Self {
        Self(match image.last_tenure() {
            Ok(LastTenure::Recorded(record)) if !image.is_recorded_on_host() => format!("tenure {}", record.tenure),
            Ok(LastTenure::None) if !image.is_recorded_on_host() => "tenure none".to_owned(),
            _ if image.kind() == ImageKind::File => {
                let ImageId { inode, born_ns, .. } = image.identity();
                format!("inode {inode} born {born_ns}")
            }
            _ => "unrecorded".to_owned(),
        })
    }
}

/// The first line of a list.
fn head_of(image: &Path, TenureKey(key): &TenureKey) -> String {
    format!("{MAGIC} {:?} {key}", image.as_os_str())
}

fn text_of(head: &str, extents: &[PageExtent]) -> String {
    let lines: String = extents.iter().map(|(first, count)| format!("{first}+{count}\n")).collect();
    format!("{head}\n{lines}")
}

/// The extents of a list with this first line; `None` for anything else.
fn parse(text: &str, head: &str) -> Option<Vec<PageExtent>> {
    let mut lines = text.lines();
    let extent = |line: &str| {
        let (first, count) = line.split_once('+')?;
        Some((first.parse().ok()?, count.parse().ok()?))
    };
    lines.next().filter(|line| *line == head)?;
    lines.map(extent).collect()
}

/// Saves the list of the pages in memory, at a clean stop.
///
/// => The device's rings have stopped.
pub(super) fn save(config: &DeviceConfig, tenure: impl FnOnce() -> TenureKey, process: &Process, device: u32) {
    let Some(path) = path_of(config) else { return };
    let name = &config.name;
    let Some(extents) = resident_pages(process, device, Instant::now() + SAVE_TIMEOUT) else {
        return warn!("{name}: cannot save the list of cached pages: timed out");
    };
    let count = counted(page_count(&extents), "cached page");
    match write(&path, &text_of(&head_of(&config.image, &tenure()), &extents)) {
        Ok(()) => info!("{name}: saved a list of {count} in {} for the next start", path.display()),
        Err(e) => warn!("{name}: cannot save the list of cached pages in {}: {e}", path.display()),
    }
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let aside = path.with_extension("new");
    let _ = fs::remove_file(&aside);
    // O_EXCL does not follow links.
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&aside)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&aside, path)
}

fn read(path: &Path) -> io::Result<String> {
    let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    let is_ours = metadata.uid() == 0 || metadata.uid() == effective_uid();
    if !metadata.is_file() || !is_ours || metadata.mode() & 0o022 != 0 {
        return Err(io::Error::other("other users may have written it"));
    }
    let mut text = String::new();
    file.take(BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// Reads in the pages that the last clean stop listed, on a separate thread, which ends with the process. `tenure` is
/// the last one before this daemon opened the image.
pub(super) fn warm(config: &DeviceConfig, tenure: &TenureKey, process: &Arc<Process>, device: u32) {
    let Some(path) = path_of(config) else { return };
    let text = match read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return,
        Err(e) => return warn!("{}: {} is not used: {e}", config.name, path.display()),
    };
    let Some(extents) = parse(&text, &head_of(&config.image, tenure)) else {
        let why = "it is not a list for this image, or the image was served since";
        return warn!("{}: {} is not used: {why}", config.name, path.display());
    };
    let (name, process) = (config.name.clone(), Arc::clone(process));
    let begun = Instant::now();
    let warm = move || {
        let end = warm_pages(&extents, &process, device, None, |_| ControlFlow::Continue(()));
        if matches!(end, WarmEnd::All | WarmEnd::Full) {
            let mib = page_count(&extents).saturating_mul(PAGE_BYTES) >> 20;
            let all = if end == WarmEnd::Full { "the cache is full" } else { "all of it" };
            info!("{name}: warmed after {} ms from a list of {mib} MiB ({all})", begun.elapsed().as_millis());
        }
    };
    if let Err(e) = thread::Builder::new().name("warm".to_owned()).spawn(warm) {
        warn!("{}: cannot start the thread that warms the cache: {e}", config.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warm_list_is_read_only_for_its_own_image_and_tenure() {
        let (image, extents) = (Path::new("/srv/a \"b\".img"), vec![(1, 3), (9, 2)]);
        let key = |key: &str| TenureKey(key.to_owned());
        let head = head_of(image, &key("tenure 7/ab"));
        let text = text_of(&head, &extents);
        assert_eq!(parse(&text, &head), Some(extents));
        assert_eq!(parse(&text, &head_of(Path::new("/srv/b.img"), &key("tenure 7/ab"))), None);
        assert_eq!(parse(&text, &head_of(image, &key("tenure 8/ab"))), None);
        assert_eq!(parse(&text_of(&head, &[]), &head), Some(Vec::new()));
        for wrong in ["", "x", &format!("{text}7"), &format!("{text}7+x\n"), &text.replace('+', "-")] {
            assert_eq!(parse(wrong, &head), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_warm_list_writable_by_others_is_not_read() {
        let path = std::env::temp_dir().join(format!("genblk-warm-test-{}", std::process::id()));
        write(&path, "x").unwrap();
        assert_eq!(read(&path).unwrap(), "x");
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        assert!(read(&path).is_err());
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(read(&path).is_err());
        fs::remove_file(&path).unwrap();
    }
}

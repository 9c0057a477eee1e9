//! The list of pages that were in memory at a clean stop: page numbers, no data. The next start reads them in.
//!
//! The list is a hint. If the image has changed meanwhile, or is another one, the wrong pages are read in, but the
//! guest still reads correct data. The list's name and first line contain the image's path, so that it is not used for
//! another image.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::process::Process;
use crate::config::DeviceConfig;
use crate::disk_protocol::{DeviceReply, DeviceRequest};
use crate::sys::process::effective_uid;
use crate::units::{PAGE_BYTES, counted};

/// The first words of a list.
const MAGIC: &str = "genblk warm list 1";
/// How long a clean stop waits for the list in total.
const SAVE_PATIENCE: Duration = Duration::from_secs(2);
/// Longest list: that of a cache of 1 TiB in which no two pages are adjacent.
const BYTES_MAX: u64 = 1 << 32;
/// Limits of one request: extents, and time. The device may end between two requests.
const EXTENTS_PER_REQUEST: usize = 512;
const REQUEST_MS: u32 = 1000;

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

/// Pages as extents: the first page, and the number of pages.
fn extents_of(mut pages: Vec<u64>) -> Vec<(u64, u64)> {
    pages.sort_unstable();
    pages.dedup();
    let mut extents: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        match extents.last_mut() {
            Some((first, count)) if *first + *count == page => *count += 1,
            _ => extents.push((page, 1)),
        }
    }
    extents
}

fn text_of(image: &Path, extents: &[(u64, u64)]) -> String {
    let lines: String = extents.iter().map(|(first, count)| format!("{first}+{count}\n")).collect();
    format!("{MAGIC} {:?}\n{lines}", image.as_os_str())
}

/// The extents of a list of this image; `None` for anything else.
fn parse(text: &str, image: &Path) -> Option<Vec<(u64, u64)>> {
    let mut lines = text.lines();
    let head = format!("{MAGIC} {:?}", image.as_os_str());
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
pub(super) fn save(config: &DeviceConfig, process: &Process, device: u32) {
    let Some(path) = path_of(config) else { return };
    let (until, mut pages, mut from) = (Instant::now() + SAVE_PATIENCE, Vec::new(), Some(0));
    while let Some(slot) = from {
        let left = until.saturating_duration_since(Instant::now());
        let reply = process.request(device, DeviceRequest::Resident { from: slot });
        let Ok(Ok(DeviceReply::Resident { pages: more, next })) = reply.map(|reply| reply.recv_timeout(left)) else {
            warn!("{}: cannot list the cached pages: timed out", config.name);
            return;
        };
        pages.extend(more);
        from = next;
    }
    let (name, count) = (&config.name, pages.len() as u64);
    match write(&path, &text_of(&config.image, &extents_of(pages))) {
        Ok(()) => info!("{name}: {} listed in {} for the next start", counted(count, "cached page"), path.display()),
        Err(e) => warn!("{name}: cannot list the cached pages in {}: {e}", path.display()),
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

/// Reads in the pages that the last clean stop listed, on a separate thread, which ends with the process.
pub(super) fn warm(config: &DeviceConfig, process: &Arc<Process>, device: u32) {
    let Some(path) = path_of(config) else { return };
    let text = match read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return,
        Err(e) => return warn!("{}: {} is not used: {e}", config.name, path.display()),
    };
    let Some(extents) = parse(&text, &config.image) else {
        return warn!("{}: {} is not used: it is not a list for this image", config.name, path.display());
    };
    let (name, process) = (config.name.clone(), Arc::clone(process));
    let begun = Instant::now();
    let warm = move || {
        let pages = extents.iter().fold(0, |sum: u64, (_, count)| sum.saturating_add(*count));
        if let Some(is_full) = warm_all(&extents, &process, device) {
            let mib = pages.saturating_mul(PAGE_BYTES) >> 20;
            let all = if is_full { "the cache is full" } else { "all" };
            info!("{name}: warmed after {} ms: {mib} MiB were listed ({all})", begun.elapsed().as_millis());
        }
    };
    if let Err(e) = thread::Builder::new().name("warm".to_owned()).spawn(warm) {
        warn!("{}: cannot start a thread: {e}", config.name);
    }
}

/// Returns whether the cache filled up before the end of the list; `None` if the device ended.
fn warm_all(extents: &[(u64, u64)], process: &Process, device: u32) -> Option<bool> {
    for part in extents.chunks(EXTENTS_PER_REQUEST) {
        let mut left = part.to_vec();
        while !left.is_empty() {
            let reply = process.request(device, DeviceRequest::Warm { extents: left, time_ms: REQUEST_MS }).ok()?;
            match reply.recv().ok()? {
                DeviceReply::Warmed { is_full: true, .. } => return Some(true),
                DeviceReply::Warmed { left: rest, .. } => left = rest,
                _ => return None,
            }
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_as_it_was_written_and_only_for_its_image() {
        let extents = extents_of(vec![9, 1, 2, 3, 9, 10]);
        assert_eq!(extents, [(1, 3), (9, 2)]);
        let image = Path::new("/srv/a \"b\".img");
        let text = text_of(image, &extents);
        assert_eq!(parse(&text, image), Some(extents));
        assert_eq!(parse(&text, Path::new("/srv/b.img")), None);
        assert_eq!(parse(&text_of(image, &[]), image), Some(Vec::new()));
        for wrong in ["", "x", &format!("{text}7"), &format!("{text}7+x\n"), &text.replace('+', "-")] {
            assert_eq!(parse(wrong, image), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_list_that_others_may_have_written_is_not_read() {
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

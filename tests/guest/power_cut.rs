//! Power cuts while a guest writes and syncs files, at hundreds of events, each with a random choice of the operations
//! that the disk had not made durable. The test replays the file system's journal; then the file system must be
//! consistent, and every file that the guest had reported as synced must have its bytes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use genblk::config::{CacheMode, DeviceConfig, Socket};
use genblk::service::Service;
use genblk::store::Backing;
use genblk::store::file::{FileImage, OpenOptions};

use crate::host::{Boot, Scratch, guest_slot, tool};
use crate::image;
use crate::prng::{self, Prng};
use crate::recorder::{Log, Recorder, Replay, Syncs};
use crate::vm::Vm;
use crate::{MIB, seed};

const IMAGE_BYTES: u64 = 48 * MIB;

/// Number of power cuts; `make soak` sets a larger one.
fn power_cuts() -> usize {
    std::env::var("GENBLK_CRASH_POINTS").ok().and_then(|n| n.parse().ok()).unwrap_or(200)
}

/// A file that the guest reported as synced, and the number of log events at that time.
#[derive(Debug)]
struct Synced {
    name: String,
    size: usize,
    reported: usize,
}

/// What a guest did to a disk.
struct Recording {
    log: Log,
    /// The image before.
    before: Vec<u8>,
    synced: Vec<Synced>,
    seed: String,
}

/// Records a guest that syncs `files` files on a device served in this process.
fn record(scratch: &Scratch, name: &str, mode: CacheMode, files: usize) -> Recording {
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed(name));
    std::fs::create_dir(scratch.file("empty")).unwrap();
    image::create_ext4(&disk, IMAGE_BYTES, &scratch.file("empty"));
    let before = std::fs::read(&disk).unwrap();

    let recorder = Recorder::default();
    let file: Arc<dyn Backing> = FileImage::open(&disk, &OpenOptions::default()).unwrap();
    let mut config = DeviceConfig::new("recorded", Socket::Path(socket.clone()), disk);
    config.cache.size_bytes = 4 << 20;
    config.cache.mode = mode;
    let running = Service::with_image(&config, recorder.image(file)).and_then(Service::start).unwrap();

    let mut vm = Vm::qemu(Boot::get(), &socket, "crash", &seed);
    let mut synced = Vec::new();
    while synced.len() < files {
        let line = vm.wait_for("synced ");
        let reported = recorder.events();
        let [name, size, _] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        synced.push(Synced { name: name.to_owned(), size: size.parse().unwrap(), reported });
    }
    vm.kill();
    running.shutdown().unwrap();
    Recording { log: recorder.finish(), before, synced, seed }
}

/// Checks `cuts` power cuts at random events; returns a description of each that broke a guarantee.
fn check_power_cuts(recording: &Recording, folder: &Path, cuts: usize, syncs: Syncs) -> Vec<String> {
    let Recording { log, before, synced, seed } = recording;
    // The guest differs from run to run: a seed repeats only the choices of the power cuts.
    let mut prng = Prng::new(prng::seed(u64::from(std::process::id())));
    let events = u64::try_from(log.len()).unwrap();
    let mut positions: Vec<usize> = (0..cuts).map(|_| usize::try_from(prng.between(1, events)).unwrap()).collect();
    positions.sort_unstable();
    let expected: BTreeMap<&str, Vec<u8>> =
        synced.iter().map(|file| (&*file.name, image::contents(seed, &file.name, "1", file.size))).collect();
    let mut replay = Replay::new(log, before.clone(), syncs);
    let mut faults = Vec::new();
    for position in positions {
        replay.advance(position);
        let disk = folder.join("cut.img");
        std::fs::write(&disk, replay.power_cut(|percent| prng.percent(percent))).unwrap();
        let synced_by_then = synced.iter().filter(|file| file.reported <= position).map(|file| &*file.name);
        if let Err(fault) = check(&disk, folder, synced_by_then, &expected) {
            faults.push(format!("event {position} of {}: {fault}", log.len()));
        }
    }
    faults
}

/// How many of the first three synced files the checks find lost on the image as it was before the guest ran.
fn lost_files(recording: &Recording, folder: &Path) -> usize {
    let disk = folder.join("cut.img");
    std::fs::write(&disk, &recording.before).unwrap();
    let expected: BTreeMap<&str, Vec<u8>> = recording
        .synced
        .iter()
        .map(|file| (&*file.name, image::contents(&recording.seed, &file.name, "1", file.size)))
        .collect();
    let lost = |file: &&Synced| {
        let result = check(&disk, folder, std::iter::once(&*file.name), &expected);
        result.is_err_and(|fault| fault.contains("was synced"))
    };
    recording.synced.iter().take(3).filter(lost).count()
}

/// Replays the journal, checks the file system, and compares the files in `synced`.
fn check<'a>(
    disk: &Path,
    folder: &Path,
    synced: impl Iterator<Item = &'a str>,
    expected: &BTreeMap<&str, Vec<u8>>,
) -> Result<(), String> {
    let e2fsck = |options: &[&str]| {
        let output = tool("e2fsck").args(options).arg(disk).output().unwrap();
        let output_text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            Ok(())
        } else {
            Err(format!("e2fsck {options:?}: {}\n{output_text}", output.status))
        }
    };
    e2fsck(&["-y", "-E", "journal_only"])?;
    e2fsck(&["-fn"])?;
    let tree: PathBuf = folder.join("tree");
    // Files of an earlier power cut must not pass for this one's.
    let _ = std::fs::remove_dir_all(&tree);
    image::extract(disk, &tree);
    for name in synced {
        match std::fs::read(tree.join(name)) {
            Ok(found) if found == expected[name] => {}
            Ok(_) => return Err(format!("{name} was synced, but has other bytes")),
            Err(error) => return Err(format!("{name} was synced, but cannot be read: {error}")),
        }
    }
    Ok(())
}

#[test]
fn synced_files_survive_a_power_cut_at_any_moment() {
    let _slot = guest_slot();
    let scratch = Scratch::new("cut");
    let recording = record(&scratch, "cut", CacheMode::Writeback, 40);
    let folder = scratch.memory();
    std::fs::create_dir_all(&folder).unwrap();
    let faults = check_power_cuts(&recording, &folder, power_cuts(), Syncs::MakeDurable);
    assert!(faults.is_empty(), "{} of {} power cuts: {}", faults.len(), power_cuts(), faults.join("\n"));
    // The checks must fail on a disk whose Syncs do nothing.
    let faults = check_power_cuts(&recording, &folder, 20, Syncs::DoNothing);
    assert!(faults.len() > 10, "the checks miss Syncs that do nothing: {faults:?}");
    // Such a disk already breaks the file system. The check of the files must work, too.
    let lost = lost_files(&recording, &folder);
    assert!(lost > 0, "the checks miss files that are not on the disk");
}

#[test]
fn written_files_survive_a_power_cut_in_writethrough_mode() {
    let _slot = guest_slot();
    let scratch = Scratch::new("cut-through");
    let recording = record(&scratch, "cut-through", CacheMode::Writethrough, 20);
    let folder = scratch.memory();
    std::fs::create_dir_all(&folder).unwrap();
    let faults = check_power_cuts(&recording, &folder, power_cuts() / 4, Syncs::MakeDurable);
    assert!(faults.is_empty(), "{} power cuts: {}", faults.len(), faults.join("\n"));
}

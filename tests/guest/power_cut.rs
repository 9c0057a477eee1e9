//! The power goes while a guest writes and syncs files: at hundreds of moments, each with another choice of what the disk
//! had not yet made durable. The file system's journal is replayed, the file system must be in order, and every file
//! whose sync the guest had reported must have its bytes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use genblk::config::{CacheMode, DeviceConfig, Socket};
use genblk::service::Service;
use genblk::store::Backing;
use genblk::store::file::{FileImage, OpenOptions};

use crate::host::{Boot, Scratch, place, tool};
use crate::image;
use crate::prng::{self, Prng};
use crate::recorder::{Log, Recorder, Replay};
use crate::vm::Vm;
use crate::{MIB, seed};

const IMAGE_BYTES: u64 = 48 * MIB;

/// How often the power is cut; `make soak` asks for more.
fn points() -> usize {
    std::env::var("GENBLK_CRASH_POINTS").ok().and_then(|n| n.parse().ok()).unwrap_or(200)
}

/// A file whose sync the guest reported, and how far the log was when it did.
#[derive(Debug)]
struct Synced {
    name: String,
    size: usize,
    reported: usize,
}

/// What a guest did to a disk.
struct Story {
    log: Log,
    before: Vec<u8>,
    synced: Vec<Synced>,
    seed: String,
}

/// Lets a guest sync `files` files on a disk of genblk's in this process.
fn record(scratch: &Scratch, name: &str, mode: CacheMode, files: usize) -> Story {
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
        let reported = recorder.now();
        let [name, size, _] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        synced.push(Synced { name: name.to_owned(), size: size.parse().unwrap(), reported });
    }
    vm.kill();
    running.shutdown().unwrap();
    Story { log: recorder.finish(), before, synced, seed }
}

/// Cuts the power at `points` moments; says at which something was wrong, and what.
fn cut_power(story: &Story, folder: &Path, points: usize, syncs_count: bool) -> Vec<String> {
    let Story { log, before, synced, seed } = story;
    // What a guest does differs from run to run: a seed repeats the choices of the cuts alone.
    let mut prng = Prng::new(prng::seed(u64::from(std::process::id())));
    let operations = u64::try_from(log.len()).unwrap();
    let mut moments: Vec<usize> = (0..points).map(|_| usize::try_from(prng.between(1, operations)).unwrap()).collect();
    moments.sort_unstable();
    let expected: BTreeMap<&str, Vec<u8>> =
        synced.iter().map(|file| (&*file.name, image::contents(seed, &file.name, "1", file.size))).collect();
    let mut replay = Replay::new(log, before.clone(), syncs_count);
    let mut wrong = Vec::new();
    for moment in moments {
        replay.advance(moment);
        let disk = folder.join("cut.img");
        std::fs::write(&disk, replay.power_cut(|percent| prng.percent(percent))).unwrap();
        let promised = synced.iter().filter(|file| file.reported <= moment).map(|file| &*file.name);
        if let Err(why) = check(&disk, folder, promised, &expected) {
            wrong.push(format!("moment {moment} of {}: {why}", log.len()));
        }
    }
    wrong
}

/// How many of the files that were promised are not on the disk as it was at first.
fn lost_files(story: &Story, folder: &Path) -> usize {
    let disk = folder.join("cut.img");
    std::fs::write(&disk, &story.before).unwrap();
    let expected: BTreeMap<&str, Vec<u8>> = story
        .synced
        .iter()
        .map(|file| (&*file.name, image::contents(&story.seed, &file.name, "1", file.size)))
        .collect();
    let lost = |file: &&Synced| {
        let why = check(&disk, folder, std::iter::once(&*file.name), &expected);
        why.is_err_and(|why| why.contains("was synced"))
    };
    story.synced.iter().take(3).filter(lost).count()
}

/// Replays the journal, looks at the file system, and compares the files that were promised.
fn check<'a>(
    disk: &Path,
    folder: &Path,
    promised: impl Iterator<Item = &'a str>,
    expected: &BTreeMap<&str, Vec<u8>>,
) -> Result<(), String> {
    let e2fsck = |options: &[&str]| {
        let output = tool("e2fsck").args(options).arg(disk).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() { Ok(()) } else { Err(format!("e2fsck {options:?}: {}\n{said}", output.status)) }
    };
    e2fsck(&["-y", "-E", "journal_only"])?;
    e2fsck(&["-fn"])?;
    let tree: PathBuf = folder.join("tree");
    // The last point's files must not pass for this one's.
    let _ = std::fs::remove_dir_all(&tree);
    image::extract(disk, &tree);
    for name in promised {
        match std::fs::read(tree.join(name)) {
            Ok(found) if found == expected[name] => {}
            Ok(_) => return Err(format!("{name} was synced, and has other bytes")),
            Err(error) => return Err(format!("{name} was synced, and is not there: {error}")),
        }
    }
    Ok(())
}

#[test]
fn synced_files_survive_a_power_cut_at_any_moment() {
    let _place = place();
    let scratch = Scratch::new("cut");
    let story = record(&scratch, "cut", CacheMode::Writeback, 40);
    let folder = scratch.memory();
    std::fs::create_dir_all(&folder).unwrap();
    let wrong = cut_power(&story, &folder, points(), true);
    assert!(wrong.is_empty(), "{} of {} points: {}", wrong.len(), points(), wrong.join("\n"));
    // The same story told of a disk on which a Sync does nothing: whoever believes that has not looked.
    let wrong = cut_power(&story, &folder, 20, false);
    assert!(wrong.len() > 10, "a file system breaks where Syncs lie: {wrong:?}");
    // Without a journal to replay the file system would show it first: the files themselves must be looked at, too.
    let lost = lost_files(&story, &folder);
    assert!(lost > 0, "files are lost where the disk is as it was before");
}

#[test]
fn written_files_survive_a_power_cut_when_writing_through() {
    let _place = place();
    let scratch = Scratch::new("cut-through");
    let story = record(&scratch, "cut-through", CacheMode::Writethrough, 20);
    let folder = scratch.memory();
    std::fs::create_dir_all(&folder).unwrap();
    let wrong = cut_power(&story, &folder, points() / 4, true);
    assert!(wrong.is_empty(), "{} points: {}", wrong.len(), wrong.join("\n"));
}

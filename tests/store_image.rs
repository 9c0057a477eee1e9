//! Opening images: which are refused and with what message, the lock (against genblk itself and against QEMU), and the
//! limits of each kind of image.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod store_kit;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use genblk::error::ErrorKind;
use genblk::store::Backing;
use genblk::store::file::{FileImage, IoEngine, NbdOptions, OpenOptions};
use genblk::store::named::NamedImage;
use genblk::tenure::TenureId;
use genblk::tenure::host::Boot;
use genblk::tenure::record::{CacheLocation, Record, TenureState};
use genblk::units::ImageHoles;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use store_kit::{Buffer, Driver, Image, MIB, pattern};

const NBD: NbdOptions = NbdOptions { trusts_without_flush: false, give_up: None, quarantine: Duration::ZERO };
const READ_ONLY: OpenOptions =
    OpenOptions { read_only: true, engine: IoEngine::Auto, direct: true, lock_timeout: Duration::ZERO, nbd: NBD };
const WRITABLE: OpenOptions =
    OpenOptions { read_only: false, engine: IoEngine::Auto, direct: true, lock_timeout: Duration::ZERO, nbd: NBD };

/// Kind of the error with which an image is refused; its message must name the image.
#[track_caller]
fn refusal(path: &Path, options: &OpenOptions) -> ErrorKind {
    let error = FileImage::open(path, options).expect_err("this image must not open");
    let message = error.to_string();
    println!("{message}");
    assert!(message.contains(path.to_str().unwrap()), "the message does not name the image: {message}");
    error.kind()
}

#[test]
fn a_path_that_is_not_an_image_is_refused_with_its_type() {
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let fifo = Image::file("fifo", 512);
    std::fs::remove_file(&fifo.path).unwrap();
    assert!(Command::new("mkfifo").arg(&fifo.path).status().unwrap().success());
    for options in [READ_ONLY, WRITABLE] {
        for path in [directory.join("no-such-image"), directory.clone(), fifo.path.clone(), PathBuf::from("/dev/null")]
        {
            assert_eq!(refusal(&path, &options), ErrorKind::Image);
        }
        for size in [0, 511, 513, MIB + 1] {
            assert_eq!(refusal(&Image::file("size", size).path, &options), ErrorKind::Image, "{size} bytes");
        }
    }
}

#[test]
fn a_writer_excludes_every_other_opener_and_readers_share() {
    let image = Image::file("lock", MIB);
    let writer = FileImage::open(&image.path, &WRITABLE).unwrap();
    assert_eq!(refusal(&image.path, &WRITABLE), ErrorKind::Locked);
    assert_eq!(refusal(&image.path, &READ_ONLY), ErrorKind::Locked);
    drop(writer);
    let first = FileImage::open(&image.path, &READ_ONLY).unwrap();
    let second = FileImage::open(&image.path, &READ_ONLY).unwrap();
    assert_eq!(refusal(&image.path, &WRITABLE), ErrorKind::Locked);
    drop(first);
    assert_eq!(refusal(&image.path, &WRITABLE), ErrorKind::Locked);
    drop(second);
    FileImage::open(&image.path, &WRITABLE).unwrap();
}

#[test]
fn the_lock_lasts_until_the_last_queue_is_dropped() {
    for engine in [IoEngine::Uring, IoEngine::Threads] {
        let image = Image::file("last", MIB);
        let options = OpenOptions { engine, ..WRITABLE };
        // Many rounds, because a late release of the file (a ring's teardown, another test's child process) is a race.
        for round in 0u64..50 {
            let backing: Arc<dyn Backing> = FileImage::open(&image.path, &options).unwrap_or_else(|error| {
                panic!("{engine:?}, round {round}: {error}");
            });
            let mut driver = Driver::new(&backing);
            drop(backing);
            assert_eq!(refusal(&image.path, &READ_ONLY), ErrorKind::Locked);
            driver.write(0, &mut Buffer::copy_of(&pattern(4096, round)));
        }
    }
}

#[test]
fn two_names_of_an_image_have_the_same_identity() {
    let (image, other) = (Image::file("identity", MIB), Image::file("other", MIB));
    let link = Image::file("link", MIB);
    std::fs::remove_file(&link.path).unwrap();
    symlink(&image.path, &link.path).unwrap();
    let identity = |path: &Path| FileImage::open(path, &READ_ONLY).unwrap().identity();
    assert_eq!(identity(&image.path), identity(&link.path));
    assert_ne!(identity(&image.path), identity(&other.path));
    // A writer under one name conflicts with one under the other.
    let _writer = FileImage::open(&image.path, &WRITABLE).unwrap();
    assert_eq!(refusal(&link.path, &WRITABLE), ErrorKind::Locked);
}

#[test]
fn the_limits_describe_the_image() {
    let image = Image::file("limits", MIB);
    let opened = FileImage::open(&image.path, &WRITABLE).unwrap();
    let limits = opened.limits();
    assert_eq!(limits.size_bytes.get(), MIB);
    assert_eq!(limits.holes, ImageHoles::Possible, "a new file is a single hole");
    assert!(limits.writable && limits.can_zero);
    assert!(limits.block_bytes.is_power_of_two() && (512..=4096).contains(&limits.block_bytes));
    assert!(limits.physical_block_bytes >= limits.block_bytes);
    drop(opened);

    std::fs::write(&image.path, pattern(65536, 1)).unwrap();
    let options = OpenOptions { direct: false, ..WRITABLE };
    let opened = FileImage::open(&image.path, &options).unwrap();
    assert_eq!(opened.limits().holes, ImageHoles::NoneYet, "a file without holes");
    assert_eq!((opened.limits().block_bytes, opened.limits().memory_align, opened.direct()), (512, 1, false));
}

#[test]
fn the_limits_of_a_device_are_those_of_its_request_queue() {
    let Some(image) = Image::loop_device("blocks", MIB, 4096) else {
        return;
    };
    let opened = FileImage::open(&image.path, &WRITABLE).unwrap();
    let limits = opened.limits();
    assert_eq!((limits.size_bytes.get(), limits.block_bytes, limits.holes), (MIB, 4096, ImageHoles::Unmappable));
    assert!(limits.physical_block_bytes >= 4096);
    let queue = Path::new("/sys/block").join(image.path.file_name().unwrap()).join("queue");
    let number = |name| std::fs::read_to_string(queue.join(name)).unwrap().trim().parse::<u32>().unwrap();
    assert!(limits.io_max_bytes <= number("max_sectors_kb") << 10, "the device takes a transfer in one piece");
    assert!(u32::from(limits.segments_max) <= number("max_segments"));
    assert_eq!(refusal(&image.path, &WRITABLE), ErrorKind::Locked);
    drop(opened);
    let opened = FileImage::open(&image.path, &OpenOptions { direct: false, ..WRITABLE }).unwrap();
    assert_eq!(opened.limits().block_bytes, 512, "the host's page cache has no larger block");
}

/// A qemu-storage-daemon that exports an image over a socket without clients; killed with the value.
#[derive(Debug)]
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Starts QEMU's daemon on an image: `Ok` when it serves, else its error output. `None` if QEMU is not installed.
fn qemu(image: &Image, writable: bool) -> Option<Result<Qemu, String>> {
    let path = image.path.to_str().unwrap();
    let on = |yes| if yes { "on" } else { "off" };
    let read_only = on(!writable);
    let (socket, pid_file) = (format!("{path}.sock"), format!("{path}.pid"));
    for stale in [&socket, &pid_file] {
        drop(std::fs::remove_file(stale));
    }
    let child = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &format!("driver=file,filename={path},node-name=file,read-only={read_only}")])
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={socket}")])
        .args(["--export", &format!("type=nbd,id=export,node-name=file,writable={}", on(writable))])
        .args(["--pidfile", &pid_file])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(child) = child else {
        println!("skipped: no qemu-storage-daemon");
        return None;
    };
    let mut daemon = Qemu(child);
    // QEMU writes the PID file when its set-up is complete.
    let deadline = Instant::now() + Duration::from_secs(30);
    let result = loop {
        if daemon.0.try_wait().unwrap().is_some() {
            let stderr = daemon.0.stderr.take().unwrap();
            break Err(std::io::read_to_string(stderr).unwrap());
        }
        if Path::new(&pid_file).exists() {
            break Ok(daemon);
        }
        assert!(Instant::now() < deadline, "qemu-storage-daemon neither serves nor exits");
        std::thread::sleep(Duration::from_millis(10));
    };
    for file in [&socket, &pid_file] {
        drop(std::fs::remove_file(file));
    }
    Some(result)
}

#[test]
fn qemu_refuses_to_write_to_an_image_that_genblk_has_open() {
    let image = Image::file("ours", MIB);
    for options in [WRITABLE, READ_ONLY] {
        let opened = FileImage::open(&image.path, &options).unwrap();
        let Some(result) = qemu(&image, true) else { return };
        let refusal = result.expect_err("QEMU opened an image that is in use");
        assert!(refusal.contains("lock"), "refused for another reason than the lock: {refusal}");
        drop(opened);
        qemu(&image, true).unwrap().expect("the image is no longer in use");
    }
}

#[test]
fn genblk_refuses_an_image_that_qemu_writes_to() {
    let image = Image::file("theirs", MIB);
    let Some(result) = qemu(&image, true) else { return };
    let daemon = result.expect("the image is not in use");
    assert_eq!(refusal(&image.path, &WRITABLE), ErrorKind::Locked);
    assert_eq!(refusal(&image.path, &READ_ONLY), ErrorKind::Locked);
    drop(daemon);
    FileImage::open(&image.path, &WRITABLE).unwrap();
}

#[test]
fn readers_in_genblk_and_in_qemu_share_an_image() {
    let image = Image::file("readers", MIB);
    let opened = FileImage::open(&image.path, &READ_ONLY).unwrap();
    let Some(result) = qemu(&image, false) else { return };
    let _daemon = result.expect("QEMU may read an image that genblk reads");
    drop(opened);
    FileImage::open(&image.path, &READ_ONLY).expect("genblk may read an image that QEMU reads");
}

/// On tmpfs, because it takes files of any length.
#[test]
fn an_image_too_large_for_page_numbers_is_refused() {
    let Some(image) = Image::tmpfs("beyond", 512) else { return };
    let file = std::fs::File::options().write(true).open(&image.path).unwrap();
    file.set_len((1 << 59) - 512).unwrap();
    let opened = FileImage::open(&image.path, &WRITABLE).unwrap();
    assert_eq!(opened.limits().size_bytes.get(), (1 << 59) - 512);
    drop(opened);
    file.set_len(1 << 59).unwrap();
    assert_eq!(refusal(&image.path, &WRITABLE), ErrorKind::Image);
}

/// Makes the syncs of this thread fail from now on.
fn fail_syncs() {
    let calls = [libc::SYS_fsync, libc::SYS_fdatasync].map(|call| (call, Vec::new()));
    let error = SeccompAction::Errno(u32::try_from(libc::EIO).unwrap());
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(calls.into_iter().collect(), SeccompAction::Allow, error, architecture).unwrap();
    apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

/// After a power cut the image must carry the record of the daemon that had it: otherwise an older cache looks like the
/// newest one.
#[test]
fn failing_to_make_a_tenure_record_durable_is_an_error() {
    let image = Image::file("record", MIB);
    let record = Record {
        tenure: TenureId::new(1).unwrap(),
        state: TenureState::Open,
        since: 0,
        boot: Boot::current(),
        inode: 1,
        born_ns: 0,
        cache: CacheLocation::Memory,
    };
    let opened = FileImage::open(&image.path, &WRITABLE).unwrap();
    if !opened.begin_tenure(record.clone()).unwrap() {
        return println!("skipped: this file system has no extended attributes");
    }
    let other = Record { since: 1, ..record };
    std::thread::spawn(move || {
        fail_syncs();
        assert!(opened.begin_tenure(other.clone()).is_err());
        assert!(opened.write_record(&other).is_err());
        assert!(opened.lose_cache().is_err());
        assert!(opened.end_tenure().is_err());
    })
    .join()
    .unwrap();
}

/// No process may use an image beyond its end.
#[test]
fn an_image_that_was_cut_is_used_up_to_its_end_although_its_sync_failed() {
    let image = Image::file("cut", MIB);
    let opened = FileImage::open(&image.path, &WRITABLE).unwrap();
    let shrunk = std::thread::spawn(move || {
        fail_syncs();
        (opened.truncate(MIB / 2), opened.limits().size_bytes.get())
    });
    assert_eq!(shrunk.join().unwrap(), (Ok(()), MIB / 2));
    assert_eq!(std::fs::metadata(&image.path).unwrap().len(), MIB / 2);
}

//! The space that an image takes on the host's file system (`st_blocks`), compared with the data that the guest wrote.

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use common::SECTOR_BYTES;
use common::daemon::{Daemon, DaemonOptions, TempDir};
use common::prng::{Prng, seed};
use common::request::pattern;
use common::workload::{Client, ClientOptions};

const MIB: u64 = 1 << 20;
const MIB_SECTORS: u64 = MIB / SECTOR_BYTES as u64;
const PAGE_SECTORS: u64 = 8;

fn start(name: &str, image_bytes: u64) -> (Daemon, Client) {
    let daemon = Daemon::start(name, image_bytes, &DaemonOptions::default());
    let client = Client::connect(&daemon.socket(), &ClientOptions::default());
    (daemon, client)
}

/// Bytes that the image takes, after a FLUSH.
fn space_of(daemon: &Daemon, client: &mut Client) -> u64 {
    assert!(client.flush(), "the FLUSH succeeds");
    std::fs::metadata(daemon.image()).expect("the image exists").blocks() * 512
}

#[test]
fn random_4_kib_writes_into_a_sparse_image_take_at_most_16_times_their_size() {
    const WRITES: u64 = 1000;
    let mut prng = Prng::new(seed(1));
    for image_mib in [100 << 10, 64] {
        let (daemon, mut client) = start("space-random", image_mib * MIB);
        let mut pages = std::collections::BTreeSet::new();
        for _ in 0..WRITES {
            let page = prng.below(image_mib * 256);
            client.write(page * PAGE_SECTORS, &pattern(page, 0, 4096));
            pages.insert(page);
        }
        let (space, data) = (space_of(&daemon, &mut client), pages.len() as u64 * 4096);
        assert!((data..=16 * data).contains(&space), "{image_mib} MiB: {data} bytes of data take {space}");
    }
}

#[test]
fn a_stream_into_a_sparse_image_takes_at_most_a_tenth_more_than_its_size() {
    for request in [4096, 128 << 10] {
        let (daemon, mut client) = start("space-stream", 1 << 40);
        let data = 24 * MIB;
        for at in (0..data).step_by(request) {
            client.write((1 << 30) + at / SECTOR_BYTES as u64, &pattern(at, 0, request));
        }
        let space = space_of(&daemon, &mut client);
        assert!(space >= data && space * 10 <= data * 11, "{request} bytes a request: {data} bytes take {space}");
    }
}

#[test]
fn trimmed_space_stays_free_until_it_is_written() {
    let (daemon, mut client) = start("space-trim", 64 * MIB);
    for at in 0..64 {
        client.write(at * MIB_SECTORS, &pattern(at, 0, 1 << 20));
    }
    let full = space_of(&daemon, &mut client);
    assert!(full >= 64 * MIB, "{full}");
    // 64 KiB of each MiB stay.
    (0..64).for_each(|at| client.discard(at * MIB_SECTORS + 128, MIB_SECTORS - 128));
    let trimmed = space_of(&daemon, &mut client);
    assert!(trimmed <= full / 16 + MIB, "{trimmed} bytes after the discards");
    // Where data is, and where it was trimmed.
    for at in 0..64 {
        client.write(at * MIB_SECTORS, &pattern(at + 1000, 0, 4096));
        client.write(at * MIB_SECTORS + 1024, &pattern(at + 2000, 0, 4096));
    }
    let space = space_of(&daemon, &mut client);
    assert!(space <= trimmed + 64 * 4096 + MIB / 4, "{trimmed} bytes became {space} by 64 pages");
    for at in 0..64 {
        assert_eq!(client.read(at * MIB_SECTORS, 4096), pattern(at + 1000, 0, 4096));
        assert_eq!(client.read(at * MIB_SECTORS + 1024, 4096), pattern(at + 2000, 0, 4096));
    }
}

#[test]
fn a_preallocated_image_keeps_its_space_with_discard_ignore() {
    for (setting, keeps) in [("discard = \"ignore\"", true), ("discard = \"unmap\"", false)] {
        let directory = TempDir::new("space-preallocated");
        let image = File::create(directory.path().join("image")).expect("an image can be created");
        let bytes = 32 * MIB;
        // SAFETY: a plain system call on an open descriptor.
        let result = unsafe { libc::posix_fallocate(image.as_raw_fd(), 0, bytes.cast_signed()) };
        assert_eq!(result, 0, "the image is preallocated");
        let daemon = Daemon::start_configured(directory, &[setting]);
        let mut client = Client::connect(&daemon.socket(), &ClientOptions::default());
        client.write(0, &pattern(1, 0, 4096));
        client.discard(MIB_SECTORS, 16 * MIB_SECTORS);
        let space = space_of(&daemon, &mut client);
        assert_eq!(space >= bytes, keeps, "{setting}: {space} of {bytes} bytes");
        assert_eq!(client.read(0, 4096), pattern(1, 0, 4096));
    }
}

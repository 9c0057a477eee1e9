//! A cache in huge pages outlives its daemon as any other does, and a want of them is told before a guest is served.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::common::daemon::{TempDir, run_to_end, server_binary};
use super::guest::FrontEnd;
use super::{start_in, survives, write_and_die};

/// The host's huge pages of 2 MiB, how many there are and how many of them nobody uses.
const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// Huge pages of a test's own, mounted where the daemons in a directory keep their caches.
struct HugePages {
    mounted: PathBuf,
    before: u64,
}

fn number(path: &str) -> u64 {
    fs::read_to_string(path).ok().and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

fn run(program: &str, arguments: &[&str], path: &Path) -> bool {
    Command::new(program).args(arguments).arg(path).status().is_ok_and(|status| status.success())
}

impl HugePages {
    /// `None` where the host has no such pages, or they are not ours to reserve.
    fn new(directory: &TempDir, pages: u64) -> Option<Self> {
        let mounted = directory.memory();
        fs::create_dir_all(&mounted).expect("a directory can be made");
        run("mount", &["-t", "hugetlbfs", "-o", "pagesize=2M", "none"], &mounted).then_some(())?;
        let reserved = Self { mounted, before: number(COUNT) };
        fs::write(COUNT, (reserved.before + pages).to_string()).ok()?;
        (number(FREE) == pages).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        run("umount", &["--lazy"], &self.mounted);
        // Nobody could remove it while it was mounted.
        let _ = fs::remove_dir(&self.mounted);
        let _ = fs::write(COUNT, self.before.to_string());
    }
}

#[test]
fn a_cache_in_huge_pages_survives_and_ends_as_any_other() {
    let directory = TempDir::new("huge");
    let Some(pages) = HugePages::new(&directory, 8) else {
        println!("SKIPPED: this host gives no huge pages of 2 MiB to this user");
        return;
    };
    let device = "num_queues = 4\ncache.size = \"6M\"\ncache.survive = \"always\"";
    let mut daemon = survives(start_in(directory, device), FrontEnd::Qemu, (libc::SIGKILL, 3), 205, |_| {});
    assert_eq!(number(FREE), 8, "an orderly end gives the pages back");

    // Another shape needs the pages of the first: they must be free when its contents are on the image.
    daemon.restart();
    let (session, bytes) = write_and_die(&mut daemon);
    daemon.reconfigure("cache.size = \"14M\"\ncache.survive = \"always\"");
    drop(session);
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "what had another shape was written to the image");
    daemon.stop();

    daemon.configure("cache.size = \"32M\"\ncache.survive = \"always\"");
    let refused = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(refused.stderr.contains("no memory for a cache of 33554432 bytes in "), "{refused:?}");
    assert_eq!(number(FREE), 8, "nothing is left of the attempt");
    drop(daemon);
    drop(pages);
}

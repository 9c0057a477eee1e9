//! "genblk recover": what it lists, writes, throws away and refuses. What a daemon tells of caches that no daemon uses.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::common::daemon::{Daemon, Ended, TempDir, run_to_end, server_binary};
use super::common::request::pattern;
use super::common::session::{Session, SessionOptions};
use super::{make_image, start, start_in, write_and_kill};

const WRITER: &str = "cache.size = \"8M\"\ncache.dirty_age_max_ms = 600000";
/// A user who is not root.
const OTHER_USER: u32 = 54_321;

fn genblk_recover(arguments: &[&str]) -> Ended {
    run_to_end(Command::new(server_binary()).arg("recover").args(arguments))
}

#[track_caller]
fn assert_refused(ended: &Ended, words: &[&str]) {
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    for word in words {
        assert!(ended.stderr.contains(word), "{word:?} is not in {ended:?}");
    }
    assert!(!ended.stderr.contains("memory for") && !ended.stderr.contains("no memory"), "{ended:?}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A daemon that was killed with four dirty pages in its cache, and that cache.
fn dirty_cache() -> (Daemon, PathBuf, Vec<u8>) {
    let mut daemon = start(WRITER);
    let (_, bytes) = write_and_kill(&mut daemon);
    let cache = daemon.directory().left().remove(0);
    (daemon, cache, bytes)
}

/// A daemon that has handed over four clean pages, and that cache.
fn clean_cache() -> (Daemon, PathBuf) {
    let mut daemon = start(WRITER);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(3, 80, 16 << 10));
    session.flush();
    drop(session);
    daemon.signal(libc::SIGUSR1);
    assert!(daemon.wait().success(), "{}", daemon.log());
    let cache = daemon.directory().left().remove(0);
    (daemon, cache)
}

/// The columns of the only row of a list.
#[track_caller]
fn only_row(listed: &Ended) -> Vec<String> {
    assert!(listed.status.success(), "{listed:?}");
    let mut lines = listed.stdout.lines();
    assert!(lines.next().is_some_and(|line| line.starts_with("CACHE ") && line.ends_with(" STATE")), "{listed:?}");
    let row = lines.next().expect("a row");
    assert!(lines.next().is_none_or(|line| line.starts_with("To ")), "one row: {listed:?}");
    row.split("  ").filter(|cell| !cell.is_empty()).map(|cell| cell.trim().to_owned()).collect()
}

#[test]
fn the_list_shows_image_memory_dirty_pages_and_state() {
    let (mut daemon, cache, _) = dirty_cache();
    let (memory, image) = (daemon.directory().memory(), daemon.image().display().to_string());
    let folder = memory.join("genblk");
    for arguments in [&["--memory-dir", text(&memory)][..], &["--memory-dir", text(&folder)], &[text(&folder)]] {
        let listed = genblk_recover(arguments);
        let row = only_row(&listed);
        assert_eq!((row[0].as_str(), row[1].as_str(), row[3].as_str()), (text(&cache), image.as_str(), "4"));
        assert!((8..=9).contains(&row[2].parse::<u32>().expect("MiB")), "{row:?}");
        assert!(row[4].ends_with(" s") && row[5] == "ready to be written", "{row:?}");
        assert!(listed.stdout.contains("genblk recover --discard CACHE"), "{listed:?}");
    }
    daemon.restart();
    let row = only_row(&genblk_recover(&[text(&folder)]));
    assert!(row[5].starts_with("in use by a daemon (pid "), "{row:?}");
    daemon.kill();
    fs::remove_file(daemon.image()).expect("the image can be removed");
    assert_eq!(only_row(&genblk_recover(&[text(&folder)]))[5], "image no longer exists");
    make_image(daemon.directory());
    assert_eq!(only_row(&genblk_recover(&[text(&folder)]))[5], "image was replaced");
    let path = daemon.directory().path().to_path_buf();
    fs::rename(&path, path.with_extension("away")).expect("a directory can be renamed");
    let row = only_row(&genblk_recover(&[text(&folder)]));
    fs::rename(path.with_extension("away"), &path).expect("a directory can be renamed");
    assert_eq!(row[5], "image is not mounted");
}

#[test]
fn listing_caches_fails_only_for_a_missing_directory() {
    let directory = TempDir::new("list");
    let missing = directory.path().join("missing");
    for arguments in [["--memory-dir", text(&missing)], ["--prune", "--memory-dir=/no-such-directory"]] {
        assert_refused(&genblk_recover(&arguments), &["No such file or directory"]);
    }
    let listed = genblk_recover(&["--memory-dir", text(directory.path())]);
    assert!(listed.status.success() && listed.stdout.starts_with("no cache in "), "{listed:?}");
}

#[test]
fn dirty_pages_are_discarded_only_with_force() {
    let (daemon, cache, _) = dirty_cache();
    let refused = genblk_recover(&["--discard", text(&cache)]);
    assert_refused(&refused, &["holds 4 dirty pages, not yet written to image ", "; to delete it, add --force"]);
    assert_eq!(daemon.directory().left(), std::slice::from_ref(&cache), "the cache stays");
    assert!(genblk_recover(&["--discard", "--force", text(&cache)]).status.success());
    assert!(daemon.directory().left().is_empty());

    let (daemon, clean) = clean_cache();
    assert!(genblk_recover(&["--discard", text(&clean)]).status.success(), "nothing is lost, so nothing is asked");
    assert!(daemon.directory().left().is_empty());
}

#[test]
fn prune_removes_clean_caches() {
    let (daemon, clean) = clean_cache();
    let memory = daemon.directory().memory();
    let prune = || genblk_recover(&["--prune", "--memory-dir", text(&memory)]);
    let pruned = prune();
    assert!(pruned.status.success() && pruned.stdout.contains(&format!("removed {}", clean.display())), "{pruned:?}");
    assert!(daemon.directory().left().is_empty());

    let (daemon, dirty, _) = dirty_cache();
    fs::remove_file(daemon.image()).expect("the image can be removed");
    let memory = daemon.directory().memory();
    let pruned = genblk_recover(&["--prune", "--memory-dir", text(&memory)]);
    assert!(pruned.stdout.ends_with("removed 0 caches (0 MiB), kept 1\n"), "{pruned:?}");
    assert_eq!(daemon.directory().left(), [dirty], "dirty pages stay, even if their image is gone");
}

#[test]
fn a_pruned_or_discarded_cache_is_not_reported_missing() {
    for arguments in [&["--prune", "--memory-dir"][..], &["--discard"]] {
        let (mut daemon, clean) = clean_cache();
        let memory = daemon.directory().memory();
        let place = if arguments[0] == "--prune" { memory.as_path() } else { clean.as_path() };
        assert!(genblk_recover(&[arguments, &[text(place)]].concat()).status.success());
        daemon.restart();
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        assert_eq!(session.read(80, 4096), pattern(3, 80, 4096));
    }
}

#[test]
fn the_list_shows_that_an_image_was_changed_since() {
    let (daemon, cache, _) = dirty_cache();
    let image = File::options().write(true).open(daemon.image()).expect("the image can be opened");
    // Later than what may have been in flight when the daemon died.
    std::thread::sleep(Duration::from_millis(2500));
    image.write_all_at(&[9; 512], 1 << 20).expect("the image can be written");
    let folder = cache.parent().expect("a file has a folder");
    assert_eq!(only_row(&genblk_recover(&[text(folder)]))[5], "image was changed since");
    assert_refused(&genblk_recover(&[text(&cache)]), &["genblk recover --discard"]);
}

#[test]
fn one_failed_recovery_does_not_stop_the_others() {
    let (daemon, cache, bytes) = dirty_cache();
    let missing = cache.with_file_name("1-2-3-4");
    let ended = genblk_recover(&[text(&missing), text(&cache), "/dev/null"]);
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(ended.stdout.starts_with("wrote 4 pages to "), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 2, "{ended:?}");
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes);
}

#[test]
fn prune_leaves_a_cache_that_a_daemon_uses() {
    let daemon = start(WRITER);
    let memory = daemon.directory().memory();
    let pruned = genblk_recover(&["--prune", "--memory-dir", text(&memory)]);
    assert!(pruned.stdout.ends_with("removed 0 caches (0 MiB), kept 1\n"), "{pruned:?}");
    assert_eq!(daemon.directory().left().len(), 1);
}

#[test]
fn genblk_recover_takes_the_path_of_a_moved_image() {
    let (daemon, cache, bytes) = dirty_cache();
    let moved = daemon.directory().path().join("moved");
    fs::rename(daemon.image(), &moved).expect("the image can be moved");
    assert_refused(&genblk_recover(&[text(&cache)]), &["No such file", "name it with --image PATH"]);
    let recovered = genblk_recover(&[text(&cache), "--image", text(&moved)]);
    assert!(recovered.status.success() && recovered.stdout.starts_with("wrote 4 pages to "), "{recovered:?}");
    fs::rename(&moved, daemon.image()).expect("the image can be moved back");
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "the completed write is on the image");
}

#[test]
fn an_image_that_replaced_another_is_written_only_by_force() {
    let (daemon, cache, bytes) = dirty_cache();
    fs::rename(daemon.image(), daemon.directory().path().join("old")).expect("the image can be moved");
    make_image(daemon.directory());
    let image = daemon.image();
    for arguments in [vec![text(&cache)], vec![text(&cache), "--image", text(&image)]] {
        assert_refused(&genblk_recover(&arguments), &["has replaced", "genblk recover --discard", "recover --force"]);
        assert!(daemon.image_bytes(80 * 512, bytes.len()) != bytes, "the other image is unchanged");
    }
    let forced = genblk_recover(&["--force", "--image", text(&image), text(&cache)]);
    assert!(forced.status.success(), "{forced:?}");
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes);
}

/// Whether this is root, who can give files to other users.
fn is_root() -> bool {
    // SAFETY: geteuid() has no preconditions and cannot fail.
    let is_root = unsafe { libc::geteuid() } == 0;
    if !is_root {
        println!("skipped: only root can give files to another user");
    }
    is_root
}

/// Moves a cache to a folder of another user, as if that user had forged it.
fn forge(cache: &Path, memory: &Path) -> PathBuf {
    let folder = memory.join(format!("genblk-{OTHER_USER}"));
    fs::create_dir(&folder).expect("a directory can be created");
    let forged = folder.join(cache.file_name().expect("a file has a name"));
    fs::rename(cache, &forged).expect("a file can be moved");
    for path in [&folder, &forged] {
        chown(path, Some(OTHER_USER), Some(OTHER_USER)).expect("root gives files to others");
    }
    forged
}

#[test]
fn root_may_list_and_discard_but_not_recover_another_users_cache() {
    if !is_root() {
        return;
    }
    let (daemon, cache, bytes) = dirty_cache();
    let memory = daemon.directory().memory();
    let forged = forge(&cache, &memory);
    let row = only_row(&genblk_recover(&["--memory-dir", text(&memory)]));
    assert_eq!((row[0].as_str(), row[3].as_str()), (text(&forged), "4"), "root sees all users' folders");
    for extra in [&[][..], &["--force"], &["--image", text(&daemon.image())]] {
        let refused = genblk_recover(&[&[text(&forged)], extra].concat());
        let sudo = format!("sudo -u '#{OTHER_USER}' genblk recover {}", forged.display());
        assert_refused(&refused, &[&format!("belongs to user {OTHER_USER}"), &sudo]);
        assert!(daemon.image_bytes(80 * 512, bytes.len()) != bytes, "nothing is written");
    }
    assert!(genblk_recover(&["--discard", "--force", text(&forged)]).status.success());
    assert!(!forged.exists());
}

/// Each way in which another user could have made a file or can change it.
#[test]
fn files_that_another_user_could_have_created_or_changed_are_refused() {
    if !is_root() {
        return;
    }
    let (daemon, cache, bytes) = dirty_cache();
    let memory = daemon.directory().memory();
    let folder = cache.parent().expect("a file has a folder").to_path_buf();
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("permissions can be changed");
    };
    let give = |path: &Path, user| chown(path, Some(user), None).expect("root gives files to others");
    let refused = |word: &str| {
        assert_refused(&genblk_recover(&[text(&cache)]), &["cannot be trusted", word]);
        assert_refused(&genblk_recover(&["--discard", "--force", text(&cache)]), &["cannot be trusted", word]);
        assert!(daemon.image_bytes(80 * 512, bytes.len()) != bytes, "{word}: nothing is written");
        assert!(fs::symlink_metadata(&cache).is_ok(), "{word}: nothing is removed");
    };
    mode(&folder, 0o777);
    refused("other users can write to it (mode 777)");
    mode(&folder, 0o700);
    mode(&memory, 0o777);
    refused("the directory above it is not sticky");
    mode(&memory, 0o700);
    give(&cache, OTHER_USER);
    refused("it belongs to user 54321, and its directory to 0");
    give(&cache, 0);
    mode(&cache, 0o666);
    refused("other users can write to it (mode 666)");
    mode(&cache, 0o600);
    let second = folder.join("second");
    fs::hard_link(&cache, &second).expect("a file can get a second name");
    refused("it has more than one hard link");
    fs::remove_file(&cache).expect("a name can be removed");
    symlink(&second, &cache).expect("a link can be made");
    refused("it is a symbolic link");
    fs::rename(&second, &cache).expect("a file can be renamed");
    let recovered = genblk_recover(&[text(&cache)]);
    assert!(recovered.status.success(), "as it was, it is recovered: {recovered:?}");
}

#[test]
fn a_cache_directory_created_by_another_user_is_refused() {
    if !is_root() {
        return;
    }
    let directory = TempDir::new("forged");
    make_image(&directory);
    let folder = directory.memory().join("genblk");
    fs::create_dir_all(&folder).expect("a directory can be created");
    // It may be what a daemon of this user kept. Without it the daemon would keep no cache there, and serve.
    fs::write(folder.join("1-2-3-4"), "a cache").expect("a file can be written");
    chown(&folder, Some(OTHER_USER), None).expect("root gives files to others");
    let mut command = Command::new(server_binary());
    command.arg("--socket-path").arg(directory.path().join("socket"));
    command.arg("--blk-file").arg(directory.path().join("image")).arg("--memory-dir").arg(directory.memory());
    let ended = run_to_end(&mut command);
    assert_refused(&ended, &["cannot be trusted: it belongs to user 54321, not to user 0"]);
}

#[test]
fn a_ledger_with_impossible_values_is_refused_as_damaged() {
    // Offset of a word, and a value that cannot be: the number of frames, a page of the image, a range of zeros.
    let cases = [(24, 1 << 40), (12_288, 1 << 30 | 0xff << 40), (4096 + 8, 1 << 60)];
    for (at, word) in cases {
        let (daemon, cache, bytes) = dirty_cache();
        let file = File::options().write(true).open(&cache).expect("the file can be opened");
        file.write_all_at(&u64::to_le_bytes(word), at).expect("the file can be written");
        drop(file);
        assert_refused(&genblk_recover(&[text(&cache)]), &[text(&cache), "is damaged or forged"]);
        assert_refused(&genblk_recover(&["--discard", text(&cache)]), &["data that cannot be read", "--force"]);
        assert!(daemon.image_bytes(80 * 512, bytes.len()) != bytes, "nothing is written");
        let listed = genblk_recover(&["--memory-dir", text(&daemon.directory().memory())]);
        assert!(listed.stdout.contains("is damaged or forged"), "{listed:?}");
        let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
        assert_eq!(ended.status.code(), Some(1), "a daemon does not start beside it: {ended:?}");
        assert!(!ended.stderr.contains("does not survive"), "{ended:?}");
    }
}

/// A ledger can name any path. A FIFO that is opened lets its other end go on, a device may do more.
#[test]
fn the_image_that_a_ledger_names_is_not_opened_for_inspection() {
    let (daemon, cache, _) = dirty_cache();
    let fifo = daemon.directory().path().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status();
    assert!(made.is_ok_and(|status| status.success()), "mkfifo");
    let (name, file) = (text(&fifo).as_bytes(), File::options().write(true).open(&cache).expect("the cache"));
    file.write_all_at(name, 96)
        .and_then(|()| file.write_all_at(&(name.len() as u64).to_le_bytes(), 80))
        .expect("a write");
    let is_open = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _writer = File::options().write(true).open(&fifo);
            is_open.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        std::thread::sleep(Duration::from_millis(200));
        let row = only_row(&genblk_recover(&["--memory-dir", text(&daemon.directory().memory())]));
        assert_eq!((row[1].as_str(), row[5].as_str()), (text(&fifo), "image was replaced"));
        std::thread::sleep(Duration::from_millis(100));
        let was_opened = is_open.load(std::sync::atomic::Ordering::SeqCst);
        // Lets the thread go on.
        let _reader = File::open(&fifo);
        assert!(!was_opened, "the FIFO was opened");
    });
    let refused = genblk_recover(&["--force", text(&cache)]);
    assert_refused(&refused, &["is neither a regular file nor a block device"]);
}

/// A forced recovery writes to the cache's own image, however much that has changed, and not to what its path leads to.
#[test]
fn force_alone_does_not_write_to_a_replaced_image_path() {
    let (daemon, cache, bytes) = dirty_cache();
    let (image, victim) = (daemon.image(), daemon.directory().path().join("victim"));
    fs::copy(&image, &victim).expect("a file can be copied");
    fs::rename(&image, image.with_extension("away")).expect("the image can be renamed");
    symlink(&victim, &image).expect("a link can be made");
    assert_refused(&genblk_recover(&["--force", text(&cache)]), &["has replaced", "--force --image"]);
    assert!(daemon.image_bytes(80 * 512, bytes.len()) != bytes, "the other file is unchanged");
}

#[test]
fn a_daemon_removes_clean_unused_caches_and_logs_the_others() {
    let (daemon, dirty, _) = dirty_cache();
    let memory = daemon.directory().memory();
    // Another image with the same memory directory.
    let directory = TempDir::new("other");
    let device = format!("{WRITER}\ncache.memory_dir = {memory:?}");
    let mut other = start_in(directory, &device);
    let told = format!("{}: 1 cache in use by no daemon (1 dirty, 8 MiB); list with ", memory.display());
    other.await_log(&told);
    // Handed over clean, and then its image is removed.
    other.signal(libc::SIGUSR1);
    assert!(other.wait().success());
    let left = || fs::read_dir(memory.join("genblk")).expect("a directory").count();
    assert_eq!(left(), 2);
    fs::remove_file(other.image()).expect("the image can be removed");
    let mut third = start_in(TempDir::new("third"), &device);
    third.await_log("its image no longer exists, and it held no unwritten data");
    third.stop();
    assert!(dirty.exists() && left() == 1, "dirty pages stay");
    make_image(other.directory());
    // A lack of memory names them.
    other.configure(&format!("cache.survive = \"always\"\ncache.size = \"900G\"\ncache.memory_dir = {memory:?}"));
    let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(other.config()));
    assert!(
        ended.stderr.contains("cannot allocate a cache of ") && ended.stderr.contains("1 cache in use by no daemon")
    );
}

/// Runs "genblk recover" with a terminal, on which the operator answers.
fn on_terminal(arguments: &str, answer: &str) -> Option<Ended> {
    let has_script = Command::new("script").arg("--version").output().is_ok_and(|output| output.status.success());
    if !has_script {
        println!("skipped: script(1) is not installed");
        return None;
    }
    let genblk = format!("{} recover {arguments}", server_binary());
    let line = format!("(sleep 0.5; printf '{answer}\\n'; sleep 0.5) | script -qec '{genblk}' /dev/null");
    Some(run_to_end(Command::new("sh").args(["-c", &line])))
}

#[test]
fn discarding_dirty_pages_on_a_terminal_asks_for_confirmation() {
    for (answer, is_removed) in [("n", false), ("", false), ("y", true)] {
        let (daemon, cache, _) = dirty_cache();
        let Some(ended) = on_terminal(&format!("--discard {}", cache.display()), answer) else { return };
        assert!(ended.stdout.contains(". Delete it? [y/N]"), "{ended:?}");
        assert_eq!(ended.status.success(), is_removed, "{ended:?}");
        assert_eq!(daemon.directory().left().is_empty(), is_removed, "{answer:?}");
    }
}

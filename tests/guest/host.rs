//! What the host does around a guest: scratch directories, command-line tools, the initramfs, and the question whether
//! KVM really works here.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, OnceLock, TryLockError};
use std::thread;
use std::time::Duration;

use crate::vm::Vm;

/// A command that is also looked for where distributions keep e2fsprogs from ordinary users.
pub fn tool(program: impl AsRef<Path>) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program.as_ref());
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("LC_ALL", "C");
    command
}

/// Runs a command to its end and shows everything it said if it fails.
pub fn run(command: &mut Command) -> Output {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{:?}: {error}; `make setup` installs it", command.get_program()));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// The files of one test, removed at its end unless it failed.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    sockets: PathBuf,
}

impl Scratch {
    pub fn new(name: &str) -> Self {
        let unique = format!("genblk-{name}-{}", std::process::id());
        let scratch = Self {
            // Images go under target/: /tmp may be a tmpfs, where O_DIRECT is refused.
            dir: Path::new(env!("CARGO_TARGET_TMPDIR")).join(&unique),
            // A socket's path has room for 107 bytes, so sockets can't.
            sockets: std::env::temp_dir().join(&unique),
        };
        for dir in [&scratch.dir, &scratch.sockets] {
            std::fs::create_dir_all(dir).unwrap();
        }
        scratch
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.sockets.join("blk.sock")
    }

    /// A folder in shared memory.
    pub fn memory(&self) -> PathBuf {
        memory_of(&self.socket())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Errors are of no interest here: the next `cargo clean` takes what stays.
        let _ = std::fs::remove_dir_all(self.memory());
        let _ = std::fs::remove_dir_all(&self.sockets);
        if thread::panicking() {
            eprintln!("the files of the failed test are in {}", self.dir.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// Shared memory for the cache of the daemon that listens on `socket`; it outlives the daemon.
pub fn memory_of(socket: &Path) -> PathBuf {
    let test = socket.parent().and_then(Path::file_name).unwrap();
    Path::new("/dev/shm").join(test)
}

/// One of two places for tests that run a guest: more at a time only make each other miss their deadlines.
pub fn place() -> MutexGuard<'static, ()> {
    static PLACES: [Mutex<()>; 2] = [Mutex::new(()), Mutex::new(())];
    loop {
        for place in &PLACES {
            match place.try_lock() {
                Ok(guard) => return guard,
                // A test that failed left nothing behind that this lock protects.
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {}
            }
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// The kernel, the initramfs and the accelerator that every guest of this run uses.
#[derive(Debug)]
pub struct Boot {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub kvm: bool,
}

impl Boot {
    pub fn get() -> &'static Self {
        static BOOT: OnceLock<Boot> = OnceLock::new();
        BOOT.get_or_init(|| {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/mkinitramfs.sh");
            let initramfs = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest.cpio");
            let output = run(tool(script).arg(&initramfs));
            let kernel = String::from_utf8(output.stdout).unwrap();
            let mut boot = Self { kernel: PathBuf::from(kernel.trim()), initramfs, kvm: false };
            boot.kvm = kvm_works(&boot);
            eprintln!("guests run {} under {}", boot.kernel.display(), if boot.kvm { "KVM" } else { "TCG" });
            boot
        })
    }
}

/// A /dev/kvm that can be opened proves nothing (nested virtualization may be broken or hang), so boot something on it.
fn kvm_works(boot: &Boot) -> bool {
    let opens = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    opens && Vm::probe_kvm(boot, Duration::from_secs(8))
}

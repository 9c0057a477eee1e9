//! The host's side of a guest test: scratch directories, command-line tools, the initramfs, and a probe for KVM.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, OnceLock, TryLockError};
use std::thread;
use std::time::Duration;

use crate::vm::Vm;

/// A command. It is also searched in the sbin directories, where some distributions have e2fsprogs.
pub fn tool(program: impl AsRef<Path>) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program.as_ref());
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("LC_ALL", "C");
    command
}

/// Runs a command; panics with its output if it fails.
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

/// The files of one test; removed on drop, unless the test failed.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    sockets: PathBuf,
}

impl Scratch {
    pub fn new(name: &str) -> Self {
        let unique = format!("genblk-{name}-{}", std::process::id());
        let scratch = Self {
            // Images are under target/: /tmp may be a tmpfs, where O_DIRECT fails.
            dir: Path::new(env!("CARGO_TARGET_TMPDIR")).join(&unique),
            // Sockets are not: their paths have at most 107 bytes.
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

    /// A directory in shared memory.
    pub fn memory(&self) -> PathBuf {
        memory_of(&self.socket())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Errors do not matter: `cargo clean` removes the rest.
        let _ = std::fs::remove_dir_all(self.memory());
        let _ = std::fs::remove_dir_all(&self.sockets);
        if thread::panicking() {
            eprintln!("the files of the failed test are in {}", self.dir.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// The directory in shared memory for the cache of the daemon that listens on `socket`.
pub fn memory_of(socket: &Path) -> PathBuf {
    let test = socket.parent().and_then(Path::file_name).unwrap();
    Path::new("/dev/shm").join(test)
}

/// Waits for one of two slots for tests that run a guest. More guests at a time would miss their deadlines.
pub fn guest_slot() -> MutexGuard<'static, ()> {
    static SLOTS: [Mutex<()>; 2] = [Mutex::new(()), Mutex::new(())];
    loop {
        for slot in &SLOTS {
            match slot.try_lock() {
                Ok(guard) => return guard,
                // The lock protects no data that a failed test could have broken.
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

/// Boots a guest to find out: with broken nested virtualization /dev/kvm can be opened, but guests hang.
fn kvm_works(boot: &Boot) -> bool {
    let opens = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    opens && Vm::probe_kvm(boot, Duration::from_secs(8))
}

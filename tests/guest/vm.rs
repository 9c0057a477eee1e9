//! A virtual machine as a process. It reads the serial console line by line; every wait has a deadline.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::host::{Boot, tool};

/// Long enough for the slowest job on an emulated processor that has to share a busy core.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The guest's messages to the test start with this.
pub const MARK: &str = "GENBLK-GUEST: ";

#[derive(Debug)]
pub struct Vm {
    job: String,
    child: Child,
    lines: Receiver<String>,
    transcript: Vec<String>,
    deadline: Instant,
}

impl Vm {
    /// Boots QEMU with the disk behind `socket` and a job for the guest.
    pub fn qemu(boot: &Boot, socket: &Path, job: &str, seed: &str) -> Self {
        Self::qemu_on(boot, &format!("path={}", socket.display()), job, seed)
    }

    /// As [`Vm::qemu`]; when the daemon disconnects, QEMU tries to reconnect every second.
    pub fn qemu_that_reconnects(boot: &Boot, socket: &Path, job: &str, seed: &str) -> Self {
        Self::qemu_on(boot, &format!("path={},reconnect=1", socket.display()), job, seed)
    }

    fn qemu_on(boot: &Boot, socket: &str, job: &str, seed: &str) -> Self {
        let mut command = qemu(boot, boot.kvm, job, seed, &Machine::default());
        command.arg("-chardev").arg(format!("socket,id=blk,{socket}")).args(["-device", DISK]);
        Self::spawn(command, job)
    }

    /// As [`Vm::qemu_that_reconnects`], on a machine that other tests do not use.
    pub fn qemu_with(boot: &Boot, machine: &Machine, socket: &Path, job: &str, seed: &str) -> Self {
        let mut command = qemu(boot, boot.kvm, job, seed, machine);
        command
            .arg("-chardev")
            .arg(format!("socket,id=blk,path={},reconnect=1", socket.display()))
            .args(["-device", machine.disk]);
        if let Some(monitor) = &machine.monitor {
            // The disk is below a port that devices can be plugged into.
            command.arg("-monitor").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        }
        Self::spawn(command, job)
    }

    /// The same guest under cloud-hypervisor, which needs KVM.
    pub fn cloud_hypervisor(boot: &Boot, socket: &Path, job: &str, seed: &str) -> Self {
        let mut command = tool("cloud-hypervisor");
        command
            .arg("--kernel")
            .arg(&boot.kernel)
            .arg("--initramfs")
            .arg(&boot.initramfs)
            .args(["--cmdline", &command_line(job, seed)])
            .args(["--cpus", "boot=2", "--memory", "size=256M,shared=on"])
            .args(["--console", "off", "--serial", "tty"])
            .arg("--disk")
            .arg(format!("vhost_user=on,socket={},num_queues=2,queue_size=256", socket.display()));
        Self::spawn(command, job)
    }

    /// Whether a kernel starts our init under KVM within `timeout`.
    pub fn probe_kvm(boot: &Boot, timeout: Duration) -> bool {
        let mut vm = Self::spawn(qemu(boot, true, "probe", "0", &Machine::default()), "probe");
        vm.deadline = Instant::now() + timeout;
        loop {
            match vm.next_line() {
                Ok(line) if line.ends_with("GENBLK-GUEST: ok probe") => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }

    fn spawn(mut command: Command, job: &str) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{:?}: {error}; `make setup` installs it", command.get_program()));
        // The transcript holds stderr too. Each thread ends when its pipe closes.
        let (sender, lines) = channel();
        let (console, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let other_sender = sender.clone();
        thread::spawn(move || forward(BufReader::new(console), &sender));
        thread::spawn(move || forward(BufReader::new(stderr), &other_sender));
        let deadline = Instant::now() + TIMEOUT;
        Self { job: job.to_owned(), child, lines, transcript: Vec::new(), deadline }
    }

    fn next_line(&mut self) -> Result<String, RecvTimeoutError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let line = self.lines.recv_timeout(left)?;
        self.transcript.push(line.clone());
        Ok(line)
    }

    /// Waits for a message that starts with `what`; returns its rest.
    pub fn wait_for(&mut self, what: &str) -> String {
        loop {
            let line = match self.next_line() {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("no \"{what}\" within {TIMEOUT:?}\n{}", self.text())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("the machine exited without \"{what}\"\n{}", self.text())
                }
            };
            // A kernel message may precede ours on the same line.
            let Some((_, message)) = line.split_once(MARK) else {
                continue;
            };
            assert!(!message.starts_with("FAILED"), "the guest failed\n{}", self.text());
            if let Some(rest) = message.strip_prefix(what) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Waits until the guest reports that its job is done, and powers off; returns all its messages.
    pub fn finish(mut self) -> Vec<String> {
        let done = format!("ok {}", self.job);
        self.wait_for(&done);
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < self.deadline, "the guest does not power off\n{}", self.text());
            thread::sleep(Duration::from_millis(10));
        }
        self.messages()
    }

    /// Kills the machine; returns the guest's messages so far.
    pub fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // Lines that are still in the pipe count: the guest has sent them.
        while let Ok(line) = self.lines.recv() {
            self.transcript.push(line);
        }
        self.messages()
    }

    /// The guest's complete messages. A kill may have cut the last one.
    fn messages(&self) -> Vec<String> {
        let messages = self.transcript.iter().filter_map(|line| line.split_once(MARK));
        messages.map(|(_, message)| message.to_owned()).collect()
    }

    fn text(&self) -> String {
        self.transcript.join("\n")
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Both fail if the process has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Forwards complete lines only.
fn forward(mut from: impl BufRead, to: &Sender<String>) {
    let mut line = Vec::new();
    while matches!(from.read_until(b'\n', &mut line), Ok(1..)) && line.ends_with(b"\n") {
        if to.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
            return;
        }
        line.clear();
    }
}

pub fn command_line(job: &str, seed: &str) -> String {
    // The kernel's tests of its cryptography prove nothing here, and one of them has been seen to hang under TCG.
    let options = "console=ttyS0 quiet panic=-1 cryptomgr.notests random.trust_cpu=on";
    format!("{options} genblk.job={job} genblk.seed={seed}")
}

/// The disk of most machines.
const DISK: &str = "vhost-user-blk-pci,chardev=blk,num-queues=2";

/// The parts of the QEMU command line in which machines differ.
#[derive(Debug)]
pub struct Machine {
    /// The memory: options of `-object` for a backend called `ram`; empty for memory without a backend.
    pub memory: &'static str,
    /// The value of `-smp`.
    pub processors: &'static str,
    /// The value of `-device` for the disk.
    pub disk: &'static str,
    /// Where QEMU's monitor listens.
    pub monitor: Option<PathBuf>,
}

impl Default for Machine {
    fn default() -> Self {
        Self { memory: "memory-backend-memfd,id=ram,size=256M,share=on", processors: "2", disk: DISK, monitor: None }
    }
}

fn qemu(boot: &Boot, kvm: bool, job: &str, seed: &str, machine: &Machine) -> Command {
    let mut command = tool("qemu-system-x86_64");
    // With RDRAND the guest has random numbers at once: without, mkfs waits for them for seconds.
    let (accelerator, processor) = if kvm { ("kvm", "host") } else { ("tcg,thread=multi", "qemu64,+rdrand") };
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        .args(["-accel", accelerator, "-cpu", processor, "-smp", machine.processors, "-m", "256M"])
        .arg("-kernel")
        .arg(&boot.kernel)
        .arg("-initrd")
        .arg(&boot.initramfs)
        .args(["-append", &command_line(job, seed)]);
    match machine.memory {
        "" => command.args(["-machine", "q35"]),
        memory => command.args(["-object", memory, "-machine", "q35,memory-backend=ram"]),
    };
    command
}

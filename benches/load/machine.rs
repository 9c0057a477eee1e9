//! The machine that a report describes, without its host name.

use std::fs;
use std::process::Command;
use std::time::Duration;

/// Hardware, kernel and versions, one per line.
pub fn describe() -> Vec<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = value(&cpuinfo, "model name").unwrap_or("unknown processor").to_string();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory_kib: u64 =
        value(&meminfo, "MemTotal").and_then(|text| text.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    let guest = if cpuinfo.contains(" hypervisor") { ", a virtual machine" } else { "" };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    // Drop the distribution's suffix, which follows the first dash.
    let kernel = kernel.trim().split('-').next().unwrap_or_default();
    let commit = first_line("git", &["rev-parse", "--short=12", "HEAD"]);
    let dirty = if first_line("git", &["status", "--porcelain"]).is_empty() { "" } else { ", modified" };
    let memory_gib = memory_kib.div_ceil(1 << 20);
    let (version, rustc) = (env!("CARGO_PKG_VERSION"), first_line("rustc", &["--version"]));
    vec![
        format!("Processor: {model}, {cores} cores{guest}; memory {memory_gib} GiB; Linux {kernel}"),
        format!("genblk {version} ({commit}{dirty}), {rustc}"),
        first_line("qemu-storage-daemon", &["--version"]),
    ]
}

/// Pins the calling thread to the `nth` CPU from the end; 1 is the last. CPU 0 is never used: it is left to the server.
///
/// => Well-run guests have pinned vCPUs, too. Without pinning the scheduler sometimes puts the client on the server's
///    CPU, and a wake-up takes between 5 and 25 us, depending on that.
pub fn pin_to_processor(nth: usize) {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    if nth >= count {
        return;
    }
    // SAFETY: all zeros are an empty set of processors, and the kernel reads as many bytes as it has.
    unsafe {
        let mut processors: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(count - nth, &mut processors);
        // An error changes nothing but the spread of the rounds.
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const processors);
    }
}

/// The share of CPU time that other processes use, sampled while the benchmark is idle.
pub fn busy_fraction() -> f64 {
    let times = || {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let first = stat.lines().next().unwrap_or_default();
        // user nice system idle iowait irq softirq steal; the fields that follow are included in these.
        let ticks: Vec<f64> = first.split_whitespace().skip(1).take(8).filter_map(|word| word.parse().ok()).collect();
        (ticks.iter().sum::<f64>(), ticks.iter().skip(3).take(2).sum::<f64>())
    };
    let before = times();
    std::thread::sleep(Duration::from_millis(300));
    let after = times();
    1.0 - (after.1 - before.1) / (after.0 - before.0).max(1.0)
}

fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix(':')).map(str::trim)
}

fn first_line(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_string()
}

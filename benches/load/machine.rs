//! The machine that a report comes from, without its name.

use std::fs;
use std::process::Command;

/// What matters of it, as lines of Markdown.
pub fn describe() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = value(&cpuinfo, "model name").unwrap_or("unknown processor").to_string();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory_kib: u64 =
        value(&meminfo, "MemTotal").and_then(|text| text.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    let guest = if cpuinfo.contains(" hypervisor") { ", a virtual machine" } else { "" };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    // Up to the first dash: what follows is the distribution's.
    let kernel = kernel.trim().split('-').next().unwrap_or_default();
    let commit = first_line("git", &["rev-parse", "--short=12", "HEAD"]);
    let dirty = if first_line("git", &["status", "--porcelain"]).is_empty() { "" } else { ", changed" };
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    format!(
        "- Processor: {model}, {cores} cores{guest}; memory {} GiB; Linux {kernel}\n\
         - genblk {} ({commit}{dirty}), {}\n\
         - {}\n\
         - Load average before the run: {load}\n",
        memory_kib.div_ceil(1 << 20),
        env!("CARGO_PKG_VERSION"),
        first_line("rustc", &["--version"]),
        first_line("qemu-storage-daemon", &["--version"]),
    )
}

fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix(':')).map(str::trim)
}

fn first_line(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_string()
}

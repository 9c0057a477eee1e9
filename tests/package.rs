//! The Debian package: built, checked by lintian, installed, used and removed in a clean Debian. Needs root, cargo-deb,
//! lintian and debootstrap, and takes a minute: `make package-test` runs it.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::daemon::{TempDir, server_binary};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = text_of(&output);
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

fn text_of(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Builds the package of the binary under test; `None` without cargo-deb.
fn build() -> Option<PathBuf> {
    let profile = if server_binary().contains("/release/") { "release" } else { "dev" };
    let output = Command::new(root().join("scripts/deb.sh")).arg(profile).output().expect("the script runs");
    if output.status.code() == Some(3) {
        eprintln!("skipped: {}", text_of(&output).trim());
        return None;
    }
    assert!(output.status.success(), "{}", text_of(&output));
    let path = String::from_utf8_lossy(&output.stdout).lines().last().map(PathBuf::from);
    Some(path.filter(|path| path.exists()).unwrap_or_else(|| panic!("no package: {}", text_of(&output))))
}

fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("skipped a part: there is no {program}");
    }
    found
}

#[test]
#[ignore = "needs root, cargo-deb, lintian and debootstrap; make package-test"]
fn the_package_can_be_installed_used_and_purged_in_a_clean_root() {
    let Some(package) = build() else { return };
    let listed = run(Command::new("dpkg-deb").arg("--contents").arg(&package));
    for path in [
        "usr/bin/genblk",
        "usr/lib/systemd/system/genblk.service",
        "usr/lib/systemd/system/genblk@.service",
        "usr/lib/systemd/system/genblk-exporter.socket",
        "usr/lib/sysusers.d/genblk.conf",
        "usr/lib/tmpfiles.d/genblk.conf",
        "usr/share/qemu/vhost-user/50-genblk.json",
        "etc/apparmor.d/usr.bin.genblk",
        "usr/share/man/man1/genblk-stat.1.gz",
        "usr/share/man/man5/genblk.toml.5.gz",
        "usr/share/bash-completion/completions/genblk",
        "usr/share/zsh/vendor-completions/_genblk",
        "usr/share/fish/vendor_completions.d/genblk.fish",
        "usr/share/doc/genblk/prometheus/genblk.rules.yml",
        "usr/share/doc/genblk/operating.md",
        "usr/share/doc/genblk/SECURITY.md",
        "usr/share/doc/genblk/io.genblk.Control.varlink",
    ] {
        assert!(listed.lines().any(|line| line.ends_with(&format!("./{path}"))), "{path} is not in\n{listed}");
    }
    if has("lintian") {
        run(Command::new("lintian")
            .args(["--fail-on", "error", "--tag-display-limit", "0", "--allow-root"])
            .arg(&package));
    }
    if has("debootstrap") {
        install(&package);
    }
}

/// A program: a shell script.
fn fake(directory: &Path, name: &str, script: &str) {
    let path = directory.join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("a script can be written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("it can be made executable");
}

/// The script that runs before a removal, with its paths in a directory and the programs of another one there.
struct BeforeRemoval {
    directory: TempDir,
    programs: PathBuf,
}

impl BeforeRemoval {
    fn new() -> Self {
        let directory = TempDir::new("prerm");
        let programs = directory.path().join("programs");
        for made in ["programs", "etc/genblk", "run/systemd/system", "dev/shm", "caches"] {
            fs::create_dir_all(directory.path().join(made)).expect("a directory can be made");
        }
        fake(&programs, "deb-systemd-invoke", "exit 1");
        fake(&programs, "systemctl", "exit 0");
        fake(&programs, "genblk", "echo no cache in \"$2\"");
        Self { directory, programs }
    }

    fn run(&self, action: &str) -> Output {
        let script = fs::read_to_string(root().join("packaging/deb/scripts/prerm")).expect("the script");
        let below = self.directory.path().display();
        let script = ["/dev/shm", "/etc/genblk", "/run/genblk", "/run/systemd"]
            .iter()
            .fold(script, |script, path| script.replace(&format!(" {path}"), &format!(" {below}{path}")));
        let path = format!("{}:{}", self.programs.display(), std::env::var("PATH").expect("a path"));
        Command::new("sh").args(["-c", &script, "prerm", action]).env("PATH", path).output().expect("sh runs")
    }

    #[track_caller]
    fn assert_refused(&self, why: &str) {
        let refused = self.run("remove");
        let text = text_of(&refused);
        assert!(text.contains("genblk: not removed: ") && text.contains(why), "{text}");
        assert_eq!(refused.status.code(), Some(1), "{text}");
        assert!(self.run("upgrade").status.success(), "the next version restores the caches");
    }
}

#[test]
fn a_removal_is_refused_while_a_cache_holds_completed_writes() {
    let advice = "To write a cache to its image: genblk recover CACHE";
    let list = fs::read_to_string(root().join("src/recover/operator/list.rs")).expect("the source");
    assert!(list.contains(advice), "the script looks for this text in the list");
    let before = BeforeRemoval::new();
    assert!(before.run("remove").status.success(), "{:?}", before.run("remove"));
    fake(&before.programs, "genblk", &format!("echo '{advice}'"));
    before.assert_refused(advice);
    fake(&before.programs, "genblk", "echo 'it is broken' >&2; exit 1");
    before.assert_refused("it is broken");
}

#[test]
fn a_removal_is_refused_while_a_cache_in_any_memory_dir_holds_completed_writes() {
    let before = BeforeRemoval::new();
    let caches = before.directory.path().join("caches").display().to_string();
    fake(
        &before.programs,
        "genblk",
        &format!("[ \"$2\" != {caches} ] || echo 'To write a cache to its image: genblk recover CACHE'"),
    );
    for (file, line) in [
        ("etc/genblk.toml", format!("cache.memory_dir = \"{caches}\" # a comment")),
        ("etc/genblk/vm1.toml", format!("memory_dir='{caches}'")),
        ("etc/genblk/vm2.toml", format!("cache = {{ size = \"8M\", memory_dir = \"{caches}\" }}")),
    ] {
        let file = before.directory.path().join(file);
        fs::write(&file, format!("[[device]]\n{line}\n")).expect("it can be written");
        before.assert_refused("write these caches to their images first");
        fs::write(&file, format!("# {line}\nmemory_dir = \"/nonexistent\"\n")).expect("it can be written");
        assert!(before.run("remove").status.success(), "{:?}", before.run("remove"));
    }
}

#[test]
fn a_removal_is_refused_while_a_unit_runs_or_has_failed() {
    let before = BeforeRemoval::new();
    fake(&before.programs, "systemctl", "echo 'genblk.service loaded failed failed Disks'");
    before.assert_refused("genblk.service loaded failed");
    fake(&before.programs, "systemctl", "exit 1");
    before.assert_refused("does not list");
}

#[test]
fn the_packaged_units_match_the_source_units() {
    let script = fs::read_to_string(root().join("scripts/deb.sh")).expect("the script");
    let unit = fs::read_to_string(root().join("configs/genblk.service")).expect("the unit");
    // What the script replaces is in the unit.
    for line in [
        "ExecStart=/usr/local/bin/genblk --config /etc/genblk.toml",
        // "systemctl reload" fails if the file has an error.
        "ExecReload=/usr/local/bin/genblk reload",
        "RuntimeDirectory=genblk",
        "Description=",
    ] {
        assert!(unit.lines().any(|found| found.starts_with(line)), "{line}");
    }
    assert!(script.contains("reload$|& --socket /run/genblk-%i/control.sock|"), "{script}");
    // The example's socket_group.
    let example = fs::read_to_string(root().join("packaging/deb/genblk.toml")).expect("the example");
    let users = fs::read_to_string(root().join("packaging/sysusers/genblk.conf")).expect("the users");
    let group = example.lines().find_map(|line| line.strip_prefix("# socket_group = ")).expect("a group");
    assert!(users.lines().any(|line| line == format!("m genblk {}", group.trim_matches('"'))), "{users}");
    assert!(script.contains("s|/usr/local/bin/|/usr/bin/|"), "{script}");
    // The profile confines what the units start, and no command of an operator.
    let profile = fs::read_to_string(root().join("packaging/apparmor/usr.bin.genblk")).expect("the profile");
    assert!(profile.lines().any(|line| line.starts_with("profile genblk flags=")), "{profile}");
    assert!(unit.lines().any(|line| line == "AppArmorProfile=-genblk"), "{unit}");
    if has("apparmor_parser") {
        // Parsed and compiled, and not loaded into the kernel.
        let path = root().join("packaging/apparmor/usr.bin.genblk");
        let parsed = run(Command::new("apparmor_parser").args(["-Q", "-K"]).arg(path));
        assert!(!parsed.to_lowercase().contains("error"), "{parsed}");
    }
    // The exporter is in the group that may read images.
    let exporter = fs::read_to_string(root().join("packaging/systemd/genblk-exporter.service")).expect("the unit");
    let hidden = exporter.lines().find_map(|line| line.strip_prefix("InaccessiblePaths=")).expect("paths");
    let writable = unit.lines().find_map(|line| line.strip_prefix("ReadWritePaths=")).expect("paths");
    for path in writable.split(' ').chain(["-/var/lib/genblk", "-/dev/shm"]) {
        assert!(hidden.split(' ').any(|other| other == path), "{path} of {hidden}");
    }
    let json = fs::read_to_string(root().join("packaging/qemu/50-genblk.json")).expect("the description");
    let described: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let capabilities = run(Command::new(server_binary()).arg("--print-capabilities"));
    let printed: serde_json::Value = serde_json::from_str(&capabilities).expect("JSON");
    assert_eq!((&described["type"], &described["features"]), (&printed["type"], &printed["features"]));
}

/// Installs the package in a new Debian, uses it and purges it.
fn install(package: &Path) {
    let directory = TempDir::new("package");
    let debian = directory.path().join("debian");
    run(Command::new("debootstrap").args(["--variant=minbase", "bookworm"]).arg(&debian));
    fs::copy(package, debian.join("genblk.deb")).expect("the package can be copied");
    let within = |line: &str| -> Output {
        let mut chroot = Command::new("chroot");
        chroot.arg(&debian).args(["sh", "-c", line]).env("DEBIAN_FRONTEND", "noninteractive");
        chroot.output().expect("chroot runs")
    };
    let succeeds = |line: &str| {
        let output = within(line);
        assert!(output.status.success(), "{line}: {}", text_of(&output));
        text_of(&output)
    };
    succeeds("dpkg --install /genblk.deb");
    assert_eq!(succeeds("genblk --version"), concat!("genblk ", env!("CARGO_PKG_VERSION"), "\n"));
    assert!(succeeds("getent passwd genblk").contains(":/var/lib/genblk:"), "the package makes the user");
    let empty = within("genblk --check --config /etc/genblk.toml");
    assert!(empty.status.success(), "the shipped configuration waits for disks: {}", text_of(&empty));
    succeeds(
        "install -d -o genblk -g genblk /run/genblk /var/lib/genblk && truncate -s 8M /var/lib/genblk/vm1.img && \
         printf '[[device]]\\nname = \"vm1\"\\nsocket = \"/run/genblk/vm1.sock\"\\n' >>/etc/genblk.toml && \
         printf 'image = \"/var/lib/genblk/vm1.img\"\\ncache.survive = \"never\"\\n' >>/etc/genblk.toml && \
         genblk --check --config /etc/genblk.toml",
    );
    let capabilities = succeeds(
        "$(sed -n 's/.*\"binary\": \"\\(.*\\)\",/\\1/p' /usr/share/qemu/vhost-user/50-genblk.json) \
                                 --print-capabilities",
    );
    assert!(capabilities.contains("blk-file"), "{capabilities}");
    // What "systemctl enable" of a unit and of an instance makes; a purge removes it.
    succeeds(
        "cd /etc/systemd/system && mkdir -p multi-user.target.wants && cd multi-user.target.wants && \
         ln -s /lib/systemd/system/genblk.service && ln -s /lib/systemd/system/genblk@.service genblk@vm1.service",
    );
    succeeds("dpkg --remove genblk && test -e /etc/genblk.toml && ! test -e /usr/bin/genblk");
    succeeds("dpkg --purge genblk && ! test -e /etc/genblk.toml && test -e /var/lib/genblk/vm1.img");
    let left = succeeds("find / -xdev -path /proc -prune -o -name '*genblk*' -print");
    let left: Vec<&str> =
        left.lines().filter(|path| !path.starts_with("/var/lib/genblk") && *path != "/genblk.deb").collect();
    assert!(left.iter().all(|path| ["/run/genblk", "/var/log"].iter().any(|kept| path.starts_with(kept))), "{left:?}");
}

//! Rules for the code itself: which module may import which, where `unsafe` is allowed, how long files and functions
//! may be, and what names in the documentation must exist.
//!
//! The rules search the text, with comments and literals blanked out, and parse only as much Rust as they need. To
//! change a rule, change its table and give the reason in the commit.

#[path = "tidy/circles.rs"]
mod circles;
#[path = "tidy/paths.rs"]
mod paths;
#[path = "tidy/rust.rs"]
mod rust;
#[path = "tidy/tree.rs"]
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use circles::circles;
use paths::named_paths;
use rust::{code_lines, item_end, line, word, words};
use tree::{Source, files, read, root, sources, sources_of_src};

/// The allowed imports: each top-level module may use itself and the modules in its row. The absent ones keep the
/// layers apart: the cache imports no store, the store no virtio, and neither the configuration.
const ALLOWED_IMPORTS: &[(&str, &[&str])] = &[
    ("main", &["check", "cli", "client", "config", "disk_process", "error", "logging", "recover", "supervisor"]),
    ("lib", &[]),
    ("check", &["recover", "listener", "store", "arena", "systemd", "sys", "config", "error", "units"]),
    ("cli", &["client", "config", "error", "units"]),
    // The commands that ask a running daemon, and the interface by which they do.
    ("client", &["control", "counters", "sys", "error", "units"]),
    ("control", &["counters", "sys"]),
    ("config", &["nbd_uri", "error", "units"]),
    ("logging", &["sandbox", "sys", "units"]),
    // Everything that takes a path; never guest memory, a front-end's messages, or serving an image. It runs the disk's
    // side in a thread where there is one process.
    (
        "supervisor",
        &[
            "disk_process",
            "disk_protocol",
            "disk_stats",
            "control",
            "counters",
            "recover",
            "listener",
            "store",
            "arena",
            "image_id",
            "systemd",
            "logging",
            "broker",
            "sys",
            "config",
            "error",
            "units",
        ],
    ),
    // No path and no configuration file: neither the configuration nor recovery.
    (
        "disk_process",
        &[
            "disk_protocol",
            "disk_stats",
            "service",
            "device",
            "cached_image",
            "store",
            "arena",
            "waker",
            "broker",
            "sandbox",
            "sys",
            "error",
        ],
    ),
    ("disk_protocol", &["arena", "store", "sys", "config", "error"]),
    ("disk_stats", &["cache", "counters", "sys", "units"]),
    ("listener", &["sys", "error"]),
    (
        "service",
        &[
            "disk_protocol",
            "disk_stats",
            "listener",
            "vhost",
            "device",
            "virtio",
            "cached_image",
            "cache",
            "counters",
            "store",
            "arena",
            "broker",
            "sandbox",
            "config",
            "sys",
            "error",
            "units",
        ],
    ),
    (
        "recover",
        &["arena", "store", "systemd", "tenure", "image_id", "fault_injection", "sys", "config", "error", "units"],
    ),
    ("vhost", &["device", "cached_image", "virtio", "broker", "sys", "config", "error", "units"]),
    (
        "device",
        &[
            "virtio",
            "cached_image",
            "cache",
            "arena",
            "waker",
            "counters",
            "shared_memory",
            "fault_injection",
            "sandbox",
            "sys",
            "error",
            "units",
        ],
    ),
    ("virtio", &["sys", "sync", "shared_memory", "fault_injection", "error", "units"]),
    (
        "cached_image",
        &[
            "cache",
            "store",
            "arena",
            "counters",
            "tenure",
            "waker",
            "fault_injection",
            "sys",
            "config",
            "error",
            "units",
        ],
    ),
    ("cache", &["fault_injection", "units"]),
    ("store", &["image_id", "nbd_uri", "tenure", "fault_injection", "sandbox", "sys", "error", "units"]),
    (
        "arena",
        &["systemd", "image_id", "tenure", "shared_memory", "fault_injection", "sandbox", "sys", "error", "units"],
    ),
    ("shared_memory", &["fault_injection"]),
    ("waker", &["sync"]),
    ("sync", &[]),
    ("counters", &["sys", "units"]),
    ("broker", &["sys"]),
    ("sandbox", &["sys", "error"]),
    ("systemd", &["sys", "error"]),
    ("image_id", &[]),
    ("nbd_uri", &[]),
    ("tenure", &["sys", "error"]),
    ("fault_injection", &[]),
    (
        "fuzzing",
        &[
            "disk_protocol",
            "disk_stats",
            "counters",
            "sim",
            "service",
            "device",
            "virtio",
            "store",
            "arena",
            "image_id",
            "config",
            "sys",
            "prng",
            "units",
        ],
    ),
    ("sys", &[]),
    (
        "sim",
        &[
            "recover",
            "tenure",
            "sys",
            "device",
            "virtio",
            "counters",
            "cached_image",
            "cache",
            "store",
            "arena",
            "systemd",
            "fault_injection",
            "config",
            "error",
            "prng",
            "units",
        ],
    ),
    ("prng", &[]),
    ("error", &["units"]),
    ("units", &[]),
];

/// Where `unsafe` is allowed, and why: a file, or a directory (with a slash) and everything in it.
const UNSAFE_ALLOWED: &[&str] = &[
    // System calls that std does not wrap.
    "sys/",
    // The mapping of the frames: its addresses, its header and ledger, and bulk copies within it.
    "arena/mapping.rs",
    // I/O into frames: the kernel reads and writes them by address.
    "store/blocking.rs",
    "store/nbd/memory.rs",
    "store/nbd/queue.rs",
    "store/registered_buffers.rs",
    "store/uring.rs",
    // Guest memory and its rings: the guest may change them at any time, so no reference to them may exist.
    "virtio/ram.rs",
    "virtio/guest_copy.rs",
    "virtio/split.rs",
    // Copies between guest memory and frames.
    "device/copy.rs",
];

/// Names of types that two modules share.
const SHARED_TYPE_NAMES: &[&str] = &[
    // The simulators of the cache and of the daemon have the same parts.
    "Oracle", "Scenario", "Sector", "World",
];

/// Markers of unfinished work. They are split here, so that this file passes too.
const BANNED: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
    concat!("HA", "CK"),
    concat!("todo", "!"),
    concat!("unimplemented", "!"),
    concat!("dbg", "!"),
];

/// Maximum lines of code in a file, without comments, blank lines and tests.
const FILE_LINES_MAX: usize = 500;
/// Maximum lines of code in a function, from `fn` to its closing brace.
const FUNCTION_LINES_MAX: usize = 70;
/// Maximum columns of a line. rustfmt wraps code; stable versions wrap neither comments nor strings.
const COLUMNS_MAX: usize = 120;

// The rules.

#[test]
fn modules_import_only_what_the_table_allows() {
    check(|source| import_faults(&source.path, &source.module, &source.code));
}

#[test]
fn no_modules_import_each_other_in_a_cycle() {
    let bench_roots: Vec<String> = files(&root().join("benches"), "rs")
        .iter()
        .filter_map(|file| file.strip_prefix(root().join("benches")).ok()?.to_str().map(str::to_string))
        .filter(|file| !file.contains('/') || file.ends_with("/main.rs"))
        .collect();
    assert!(bench_roots.len() > 2, "only these benchmarks are found: {bench_roots:?}");
    let crates = bench_roots.iter().map(|root| ("benches", root.as_str())).chain([("src", "lib.rs")]);
    let mut faults = Vec::new();
    for (folder, crate_root) in crates {
        let sources: Vec<_> = sources(folder, crate_root).into_iter().filter(|source| !source.is_test).collect();
        faults.extend(circles(&sources).into_iter().map(|circle| format!("{folder}/{crate_root}: {circle}")));
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn the_table_of_imports_has_a_row_for_every_module() {
    let modules: Vec<&str> = ALLOWED_IMPORTS.iter().map(|(module, _)| *module).collect();
    for (module, used) in ALLOWED_IMPORTS {
        for name in *used {
            assert!(modules.contains(name), "{module} may import {name}, which has no row");
        }
    }
    for source in sources_of_src() {
        assert!(modules.contains(&top(&source.path, &source.module)), "{} has no row in ALLOWED_IMPORTS", source.path);
    }
}

#[test]
fn no_file_is_too_long() {
    check(|source| {
        let lines = code_lines(&source.code);
        let fault = format!("{lines} lines of code; at most {FILE_LINES_MAX}");
        if lines > FILE_LINES_MAX { vec![fault] } else { Vec::new() }
    });
}

#[test]
fn no_function_is_too_long() {
    check(|source| long_functions(&source.code));
}

#[test]
fn unsafe_is_used_only_in_the_listed_files() {
    check(|source| {
        let path = source.path.as_str();
        let covers = |place: &str| path == place || place.ends_with('/') && path.starts_with(place);
        if UNSAFE_ALLOWED.iter().any(|place| covers(place)) {
            return Vec::new();
        }
        words(&source.code, "unsafe").map(|at| format!("line {}: unsafe", line(&source.code, at))).collect()
    });
}

#[test]
fn every_source_file_is_part_of_the_crate() {
    let folder = root().join("src");
    let reached: Vec<PathBuf> = sources_of_src().into_iter().map(|source| folder.join(source.path)).collect();
    let dead: Vec<PathBuf> = files(&folder, "rs").into_iter().filter(|file| !reached.contains(file)).collect();
    assert!(dead.is_empty(), "no mod leads to {dead:?}");
}

#[test]
fn every_source_file_follows_the_text_rules() {
    let mut faults = Vec::new();
    for file in ["src", "tests", "benches", "fuzz"].iter().flat_map(|folder| files(&root().join(folder), "rs")) {
        faults.extend(text_faults(&read(&file)).into_iter().map(|fault| format!("{}: {fault}", file.display())));
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn a_type_name_means_one_thing() {
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources("src", "lib.rs").into_iter().filter(|source| !source.is_test) {
        for name in types_in(&source.code) {
            places.entry(name).or_default().push(source.path.clone());
        }
    }
    assert!(places.len() > 300, "only {} types are found", places.len());
    places.retain(|name, files| files.len() > 1 && !SHARED_TYPE_NAMES.contains(&name.as_str()));
    assert!(places.is_empty(), "types of different modules have one name: {places:#?}");
}

#[test]
fn every_relative_link_in_the_documentation_resolves() {
    let mut faults = Vec::new();
    for file in files(&root(), "md") {
        let folder = file.parent().expect("a file has a folder");
        let broken = links(&read(&file)).into_iter().filter(|link| !folder.join(link).exists());
        faults.extend(broken.map(|link| format!("{}: {link}", file.display())));
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn every_test_named_in_the_guarantees_and_in_the_trust_model_exists() {
    for (file, proofs_min) in [("docs/guarantees.md", 40), ("SECURITY.md", 20)] {
        let proofs = proofs(&read(&root().join(file)));
        assert!(proofs.len() > proofs_min, "only {} proofs are found in {file}", proofs.len());
        let faults: Vec<_> = proofs.iter().filter(|(path, name)| !declares(&texts(&root().join(path)), name)).collect();
        assert!(faults.is_empty(), "{file} names tests that do not exist: {faults:#?}");
    }
}

#[test]
fn every_function_named_in_the_architecture_is_in_its_file() {
    let mut places = proofs(&read(&root().join("ARCHITECTURE.md")));
    places.retain(|(path, _)| path.ends_with(".rs"));
    assert!(places.len() > 10, "only {} places are found", places.len());
    let exists = |path: &str, name: &str| {
        let last = name.rsplit("::").next().expect("a name has a last part");
        texts(&root().join("src").join(path)).contains(last)
    };
    let faults: Vec<_> = places.iter().filter(|(path, name)| !exists(path, name)).collect();
    assert!(faults.is_empty(), "ARCHITECTURE.md names functions that do not exist: {faults:#?}");
}

/// The text of a file, or of all sources in a directory; empty if there is neither.
fn texts(path: &Path) -> String {
    if path.is_dir() {
        files(path, "rs").iter().map(|file| read(file)).collect()
    } else {
        fs::read_to_string(path).unwrap_or_default()
    }
}

/// Applies `rule` to every source file under src/ that is not test code; panics with all faults.
fn check(rule: impl Fn(&Source) -> Vec<String>) {
    let mut faults = Vec::new();
    for source in sources_of_src().iter().filter(|source| !source.is_test) {
        faults.extend(rule(source).into_iter().map(|fault| format!("src/{}: {fault}", source.path)));
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

// The rules for one file.

/// The row of ALLOWED_IMPORTS for the file at `path` with `module` in it.
fn top<'a>(path: &'a str, module: &'a [String]) -> &'a str {
    module.first().map_or(path.trim_end_matches(".rs"), String::as_str)
}

fn import_faults(path: &str, module: &[String], code: &str) -> Vec<String> {
    let top = top(path, module);
    let allowed = ALLOWED_IMPORTS.iter().find(|(name, _)| *name == top).map_or(&[][..], |(_, used)| used);
    // main.rs is a crate of its own, which sees the library by its name.
    let roots = if path == "main.rs" { &["crate", "genblk"][..] } else { &["crate"] };
    let used: BTreeSet<(usize, String)> = named_paths(module, code, roots)
        .into_iter()
        .filter_map(|named| Some((named.line, named.path.into_iter().next()?)))
        .collect();
    used.into_iter()
        .filter(|(_, used)| used != top && !allowed.contains(&used.as_str()))
        .map(|(line, used)| format!("line {line}: {top} must not import {used}"))
        .collect()
}

fn long_functions(code: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for at in words(code, "fn") {
        // Without a name it is the type of a function pointer, without a brace at the end a declaration in a trait.
        let name = word(code[at + 2..].trim_start());
        let end = item_end(code, at).filter(|end| !name.is_empty() && code[..*end].ends_with('}'));
        let lines = end.map_or(0, |end| code_lines(&code[at..end]));
        if lines > FUNCTION_LINES_MAX {
            faults.push(format!("line {}: {name} has {lines} lines; at most {FUNCTION_LINES_MAX}", line(code, at)));
        }
    }
    faults
}

/// The types that `code` declares; associated types of traits are no types of their own.
fn types_in(code: &str) -> Vec<String> {
    let declarations = ["struct", "enum", "union", "trait"]
        .into_iter()
        .flat_map(|keyword| words(code, keyword).map(move |at| word(code[at + keyword.len()..].trim_start())));
    let is_at_start_of_item = |at: usize| !code[..at].rsplit('\n').next().unwrap_or_default().starts_with(' ');
    let aliases = words(code, "type").filter(|at| is_at_start_of_item(*at)).map(|at| word(code[at + 4..].trim_start()));
    declarations.chain(aliases).filter(|name| !name.is_empty()).collect()
}

fn text_faults(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if !text.starts_with("//!") {
        faults.push("does not begin with its //! doc".to_string());
    }
    for (i, content) in text.lines().enumerate() {
        if !content.is_ascii() {
            faults.push(format!("line {}: not ASCII", i + 1));
        }
        let columns = content.chars().count();
        if columns > COLUMNS_MAX {
            faults.push(format!("line {}: {columns} columns; at most {COLUMNS_MAX}", i + 1));
        }
        for banned in BANNED {
            faults.extend(words(content, banned).map(|_| format!("line {}: {banned}", i + 1)));
        }
    }
    faults
}

/// The relative targets of a Markdown text's links, without anchors. Code blocks and code spans hold no links.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut in_block = false;
    for content in text.lines() {
        if content.trim_start().starts_with("```") {
            in_block = !in_block;
        }
        if in_block {
            continue;
        }
        let prose = content.split('`').step_by(2).collect::<Vec<_>>().join("`");
        for rest in prose.split("](").skip(1) {
            let file = rest.split(['#', ' ', ')']).next().unwrap_or_default();
            if !file.is_empty() && !file.contains("://") && !file.starts_with("mailto:") {
                found.push(file.to_string());
            }
        }
    }
    found
}

/// The names in code spans of the last column of a Markdown text's tables, each with the path before it.
fn proofs(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for row in text.lines().filter_map(|line| line.strip_suffix(" |")) {
        let mut path = "";
        for code in row.rsplit(" | ").next().unwrap_or_default().split('`').skip(1).step_by(2) {
            if code.contains('/') {
                path = code;
            } else {
                found.push((path.to_string(), code.to_string()));
            }
        }
    }
    found
}

/// Whether `text` declares a function of this name; a `*` at its end matches any suffix.
fn declares(text: &str, name: &str) -> bool {
    match name.strip_suffix('*') {
        Some(start) => text.contains(&format!("fn {start}")),
        None => text.contains(&format!("fn {name}(")),
    }
}

// Tests of the rules.

#[test]
fn a_forbidden_import_is_found_in_every_syntax() {
    let code =
        "use crate::units::X;\nuse crate::{\n    store::{Op, Store},\n    cache,\n};\nfn f() { crate::device::g(); }";
    let faults = ["line 2: cache must not import store", "line 6: cache must not import device"];
    let faults_of = |path: &str, code: &str| import_faults(path, &paths::module_of(path), code);
    assert_eq!(faults_of("cache/page.rs", code), faults);
    assert_eq!(faults_of("cache/page.rs", "use super::super::arena::A;").len(), 1);
    assert_eq!(faults_of("cache/mod.rs", "use super::arena::A;").len(), 1);
    assert_eq!(faults_of("cache/policy/lru.rs", "use super::super::page::P;").len(), 0);
    assert_eq!(faults_of("main.rs", "use genblk::cache::P;").len(), 1);
}

#[test]
fn a_long_function_is_found() {
    let body = |lines: usize| format!("impl A {{\n    fn long(a: [u8; 4]) {{\n{}    }}\n}}\n", "x();\n".repeat(lines));
    assert_eq!(long_functions(&body(68)), [""; 0]);
    assert_eq!(long_functions(&body(69)), ["line 2: long has 71 lines; at most 70"]);
    assert_eq!(long_functions(&format!("trait T {{ fn short(&self); }}\n{}", body(68))), [""; 0]);
}

#[test]
fn the_types_of_a_file_are_found() {
    let code =
        "pub struct A<T>(T);\nenum B {}\nimpl C for A {\n    type D = u8;\n}\ntype E = u8;\nfn f() { struct G; }";
    assert_eq!(types_in(code), ["A", "G", "B", "E"]);
}

#[test]
fn violations_of_the_text_rules_are_found() {
    let word = BANNED[0];
    let text = format!("// {word}: all\nlet a = \"\u{e9}\";\nlet {word}S = 1; // {word}_LIST\n");
    let faults =
        ["does not begin with its //! doc".to_string(), format!("line 1: {word}"), "line 2: not ASCII".to_string()];
    assert_eq!(text_faults(&text), faults);
    assert_eq!(text_faults(&format!("//! A.\n{}(x);\n", BANNED[6])), [format!("line 2: {}", BANNED[6])]);
    assert_eq!(text_faults(&format!("//! {}\n", "a".repeat(116))), [""; 0]);
    assert_eq!(text_faults(&format!("//! {}\n", "a".repeat(117))), ["line 1: 121 columns; at most 120"]);
}

#[test]
fn relative_links_are_found() {
    let text = "[a](b.md#c) and [d](https://e) [f](#g)\n`[h](i)`\n```\n[j](k)\n```\n[l](../m/n.toml \"title\")";
    assert_eq!(links(text), ["b.md", "../m/n.toml"]);
}

#[test]
fn test_names_in_tables_are_found() {
    let text = "| a | `b` | c |\n| d | `e_*` of | `src/f`: `g`, `h_*`; `i/j.rs`: `k` |\n`src/l`: `m`";
    let found = [("src/f", "g"), ("src/f", "h_*"), ("i/j.rs", "k")];
    assert_eq!(proofs(text), found.map(|(path, name)| (path.to_string(), name.to_string())));
    assert!(declares("fn h_1() {}", "h_*") && declares("fn g() {}", "g") && !declares("fn g2() {}", "g"));
}

//! Tests about the code itself: who may use whom, how long things are, what no source may hold.
//!
//! The rules read the text, with comments and literals blanked out; they know as much Rust as they need and no more. To
//! change a rule, change its table and say why in the commit.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The arrows between modules: each may use itself and those in its row. What keeps the parts apart is what is absent:
/// the cache knows no store, the store no guest, and neither a configuration.
const ARROWS: &[(&str, &[&str])] = &[
    ("main", &["cli", "config", "daemon", "error", "logging", "recover"]),
    ("lib", &[]),
    ("cli", &["config", "error", "units"]),
    ("config", &["error", "units"]),
    ("logging", &["error"]),
    ("daemon", &["recover", "service", "systemd", "config", "error"]),
    (
        "service",
        &[
            "recover",
            "vhost",
            "device",
            "virtio",
            "cached_image",
            "cache",
            "store",
            "arena",
            "systemd",
            "image_id",
            "config",
            "error",
            "units",
        ],
    ),
    ("recover", &["arena", "store", "systemd", "config", "error", "units"]),
    ("vhost", &["device", "cached_image", "virtio", "config", "error", "units"]),
    ("device", &["virtio", "cached_image", "cache", "arena", "waker", "error", "units"]),
    ("virtio", &["error", "units"]),
    ("cached_image", &["cache", "store", "arena", "waker", "config", "error", "units"]),
    ("cache", &["units"]),
    ("store", &["image_id", "sys", "error", "units"]),
    ("arena", &["systemd", "image_id", "error", "units"]),
    ("waker", &[]),
    ("systemd", &["error"]),
    ("image_id", &[]),
    ("sys", &[]),
    ("sim", &["cache", "prng", "units"]),
    ("prng", &[]),
    ("error", &["units"]),
    ("units", &[]),
];

/// Where `unsafe` may stand: a file, or a directory with all that is in it. The rest needs no proof of memory safety.
const UNSAFE_ALLOWED: &[&str] = &[
    "sys/",
    "arena/",
    "store/blocking.rs",
    "store/registered_buffers.rs",
    "store/uring.rs",
    "virtio/ram.rs",
    "virtio/guest_copy.rs",
    "virtio/split.rs",
    "device/interrupt.rs",
    "device/copy.rs",
    "vhost/",
    "service.rs",
    "daemon.rs",
    "systemd.rs",
];

/// Words that promise work instead of doing it. (Cut in two, so that this file may hold them.)
const BANNED: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
    concat!("HA", "CK"),
    concat!("todo", "!"),
    concat!("unimplemented", "!"),
    concat!("dbg", "!"),
];

/// Lines of code of a file, without comments, blank lines and tests.
const FILE_LINES_MAX: usize = 500;
/// Lines of code of a function, from `fn` to its closing brace.
const FUNCTION_LINES_MAX: usize = 70;

// The rules on the tree.

#[test]
fn modules_use_only_what_their_row_allows() {
    check(|source| arrow_faults(&source.path, &source.code));
}

#[test]
fn every_module_has_a_row_and_every_row_names_modules_with_rows() {
    let modules: Vec<&str> = ARROWS.iter().map(|(module, _)| *module).collect();
    for (module, used) in ARROWS {
        for name in *used {
            assert!(modules.contains(name), "{module} may use {name}, which has no row");
        }
    }
    for source in sources() {
        assert!(modules.contains(&top(&source.path)), "{} has no row in ARROWS", source.path);
    }
}

#[test]
fn files_are_short() {
    check(|source| {
        let lines = code_lines(&source.code);
        let fault = format!("{lines} lines of code; at most {FILE_LINES_MAX}");
        if lines > FILE_LINES_MAX { vec![fault] } else { Vec::new() }
    });
}

#[test]
fn functions_are_short() {
    check(|source| long_functions(&source.code));
}

#[test]
fn unsafe_stands_only_where_it_is_allowed() {
    check(|source| {
        let path = source.path.as_str();
        let holds = |place: &str| path == place || place.ends_with('/') && path.starts_with(place);
        if UNSAFE_ALLOWED.iter().any(|place| holds(place)) {
            return Vec::new();
        }
        words(&source.code, "unsafe").map(|at| format!("line {}: unsafe", line(&source.code, at))).collect()
    });
}

#[test]
fn every_source_is_reached_by_a_mod() {
    let folder = root().join("src");
    let reached: Vec<PathBuf> = sources().into_iter().map(|source| folder.join(source.path)).collect();
    let dead: Vec<PathBuf> = files(&folder, "rs").into_iter().filter(|file| !reached.contains(file)).collect();
    assert!(dead.is_empty(), "no mod leads to {dead:?}");
}

#[test]
fn every_source_begins_with_its_doc_is_ascii_and_holds_no_banned_word() {
    let mut faults = Vec::new();
    for file in ["src", "tests", "benches", "fuzz"].iter().flat_map(|folder| files(&root().join(folder), "rs")) {
        faults.extend(text_faults(&read(&file)).into_iter().map(|fault| format!("{}: {fault}", file.display())));
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
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
fn every_test_named_in_the_guarantees_exists() {
    let sources = |path: &str| match root().join(path) {
        folder if folder.is_dir() => files(&folder, "rs").iter().map(|file| read(file)).collect(),
        file => fs::read_to_string(file).unwrap_or_default(),
    };
    let proofs = proofs(&read(&root().join("docs/guarantees.md")));
    assert!(proofs.len() > 40, "the tables name their proofs: {}", proofs.len());
    let faults: Vec<_> = proofs.iter().filter(|(path, name)| !declares(&sources(path), name)).collect();
    assert!(faults.is_empty(), "docs/guarantees.md names tests that are not there: {faults:#?}");
}

// The tree.

/// A source under src/.
struct Source {
    /// Path from src/, with forward slashes.
    path: String,
    /// The text without comments, literals and tests; each line is where it was.
    code: String,
    /// Whether it is compiled for tests only.
    is_test: bool,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every source that a `mod` leads to, from lib.rs and main.rs.
fn sources() -> Vec<Source> {
    let mut found = BTreeMap::new();
    let mut open = vec![(PathBuf::from("lib.rs"), false), (PathBuf::from("main.rs"), false)];
    while let Some((path, is_test)) = open.pop() {
        let masked = mask(&read(&root().join("src").join(&path)));
        let code = without_tests(&masked);
        let live = modules(&code);
        for name in modules(&masked) {
            let child_is_test = is_test || !live.contains(&name);
            open.push((child(&path, &name), child_is_test));
        }
        let name = path.to_str().expect("sources have plain names").to_string();
        found.insert(name.clone(), Source { path: name, code, is_test });
    }
    found.into_values().collect()
}

/// Names of the modules that `code` keeps in files of their own under src/.
fn modules(code: &str) -> Vec<String> {
    let name_of = |at: usize| {
        let rest = code[at + 3..].trim_start();
        let name = word(rest);
        let in_a_file = rest[name.len()..].trim_start().starts_with(';');
        (in_a_file && !has_path_attribute(&code[..at])).then_some(name)
    };
    words(code, "mod").filter_map(name_of).collect()
}

/// Whether the item that begins behind `before` has a `#[path]`, which leads to a file outside src/.
fn has_path_attribute(before: &str) -> bool {
    let item = &before[before.rfind([';', '}']).map_or(0, |end| end + 1)..];
    item.contains("#[path")
}

/// The file of module `name`, declared in `parent`; both from src/.
fn child(parent: &Path, name: &str) -> PathBuf {
    let folder = match parent.file_name().and_then(|name| name.to_str()) {
        Some("lib.rs" | "main.rs" | "mod.rs") => parent.with_file_name(""),
        _ => parent.with_extension(""),
    };
    let plain = folder.join(format!("{name}.rs"));
    if root().join("src").join(&plain).exists() { plain } else { folder.join(name).join("mod.rs") }
}

/// Files with `extension` under `folder`, except what is built, fetched or hidden.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.expect("a folder can be listed").path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or(".");
            if path.is_dir() && !name.starts_with('.') && !["target", "corpus", "artifacts"].contains(&name) {
                open.push(path);
            } else if path.is_file() && path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Applies `rule` to every source that isn't for tests alone.
fn check(rule: impl Fn(&Source) -> Vec<String>) {
    let mut faults = Vec::new();
    for source in sources().iter().filter(|source| !source.is_test) {
        faults.extend(rule(source).into_iter().map(|fault| format!("src/{}: {fault}", source.path)));
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

// The rules on one text.

/// The module right under the crate that `path` belongs to.
fn top(path: &str) -> &str {
    path.split('/').next().unwrap_or(path).trim_end_matches(".rs")
}

fn arrow_faults(path: &str, code: &str) -> Vec<String> {
    let module = top(path);
    let allowed = ARROWS.iter().find(|(name, _)| *name == module).map_or(&[][..], |(_, used)| used);
    uses(path, code)
        .into_iter()
        .filter(|(_, used)| used != module && !allowed.contains(&used.as_str()))
        .map(|(line, used)| format!("line {line}: {module} must not use {used}"))
        .collect()
}

/// Lines and modules of the crate that `code` names: by `crate::`, by enough `super::`, and in main.rs by the crate's
/// own name.
fn uses(path: &str, code: &str) -> Vec<(usize, String)> {
    let depth = path.split('/').count() - usize::from(path.ends_with("/mod.rs"));
    let up = "super::".repeat(depth);
    let prefixes = match path {
        // main.rs is a crate of its own, which sees the library by its name.
        "main.rs" => ["crate::", "genblk::"],
        _ => ["crate::", &up],
    };
    let mut found = Vec::new();
    for prefix in prefixes {
        for (at, _) in code.match_indices(prefix) {
            let begins_a_path = !code[..at].ends_with(|c| is_word(c) || c == ':');
            if begins_a_path {
                found.extend(heads(&code[at + prefix.len()..]).into_iter().map(|head| (line(code, at), head)));
            }
        }
    }
    found
}

/// First words of what follows a `crate::`: one, or those of a group in braces.
fn heads(rest: &str) -> Vec<String> {
    let Some(group) = rest.strip_prefix('{') else {
        return vec![word(rest)];
    };
    let mut depth = 0;
    let mut heads = vec![word(group.trim_start())];
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => heads.push(word(group[i + 1..].trim_start())),
            _ => {}
        }
    }
    heads.retain(|head| !head.is_empty());
    heads
}

fn long_functions(code: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for at in words(code, "fn") {
        // No name: the type of a function pointer. No brace at the end: the declaration in a trait.
        let name = word(code[at + 2..].trim_start());
        let end = item_end(code, at).filter(|end| !name.is_empty() && code[..*end].ends_with('}'));
        let lines = end.map_or(0, |end| code_lines(&code[at..end]));
        if lines > FUNCTION_LINES_MAX {
            faults.push(format!("line {}: {name} has {lines} lines; at most {FUNCTION_LINES_MAX}", line(code, at)));
        }
    }
    faults
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
        for banned in BANNED {
            faults.extend(words(content, banned).map(|_| format!("line {}: {banned}", i + 1)));
        }
    }
    faults
}

/// Relative targets of a Markdown text's links, without their anchors; code holds no links.
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

/// The tests that the last column of a Markdown text's tables names, each with the path that stands before it.
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

/// Whether `text` has a function of this name; a `*` at the end stands for any letters.
fn declares(text: &str, name: &str) -> bool {
    match name.strip_suffix('*') {
        Some(start) => text.contains(&format!("fn {start}")),
        None => text.contains(&format!("fn {name}(")),
    }
}

// As much Rust as the rules need.

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The word that `text` begins with.
fn word(text: &str) -> String {
    text.chars().take_while(|c| is_word(*c)).collect()
}

/// Where `word` stands in `text` with no letter, digit or underscore beside it.
fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(word).map(|(at, _)| at).filter(move |at| {
        let ends = word.ends_with('!') || !text[at + word.len()..].starts_with(is_word);
        ends && !text[..*at].ends_with(is_word)
    })
}

/// The line, from 1, of the byte at `at`.
fn line(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

fn code_lines(code: &str) -> usize {
    code.lines().filter(|line| !line.trim().is_empty()).count()
}

/// The end of the item that begins at `from`: behind its closing brace, or behind its semicolon.
fn item_end(code: &str, from: usize) -> Option<usize> {
    let mut braces = 0usize;
    let mut others = 0usize;
    for (i, c) in code[from..].char_indices() {
        match c {
            '(' | '[' => others += 1,
            ')' | ']' => others = others.saturating_sub(1),
            '{' => braces += 1,
            '}' if braces <= 1 => return Some(from + i + 1),
            '}' => braces -= 1,
            ';' if braces == 0 && others == 0 => return Some(from + i + 1),
            _ => {}
        }
    }
    None
}

/// `code` with everything under a `#[cfg(test)]` blanked.
fn without_tests(code: &str) -> String {
    let marker = "#[cfg(test)]";
    let mut rest = code.to_string();
    while let Some(at) = rest.find(marker) {
        let end = marked_end(&rest, at + marker.len());
        let blank: String = rest[at..end].chars().map(|c| if c == '\n' { c } else { ' ' }).collect();
        rest.replace_range(at..end, &blank);
    }
    rest
}

/// The end of what an attribute that ends at `from` stands on: an item, a statement, or one field among others, which
/// ends with its comma or before the brace that closes them all.
fn marked_end(code: &str, from: usize) -> usize {
    let end = item_end(code, from).unwrap_or(code.len());
    let mut open = 0usize;
    let mut before = ' ';
    for (i, c) in code[from..end].char_indices() {
        match c {
            '(' | '[' | '{' | '<' => open += 1,
            '}' if open == 0 => return from + i,
            '>' if before == '-' || before == '=' => {}
            ')' | ']' | '}' | '>' => open = open.saturating_sub(1),
            ',' if open == 0 => return from + i + 1,
            _ => {}
        }
        before = c;
    }
    end
}

/// `text` with comments and literals blanked, so that what is left is code, each byte in its place.
fn mask(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut masked = String::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let skipped = skipped_bytes(bytes, at);
        masked.extend(bytes[at..at + skipped].iter().map(|byte| if *byte == b'\n' { '\n' } else { ' ' }));
        at += skipped;
        if skipped == 0 {
            masked.push(if bytes[at].is_ascii() { char::from(bytes[at]) } else { ' ' });
            at += 1;
        }
    }
    masked
}

/// Length of the comment or literal that begins at `at`; 0 if none does.
fn skipped_bytes(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    match rest {
        [b'/', b'/', ..] => rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => block_comment(rest),
        [b'r', b'#' | b'"', ..] => {
            let before = if at == 0 { ' ' } else { char::from(bytes[at - 1]) };
            if is_word(before) && !matches!(before, 'b' | 'c') { 0 } else { raw_string(rest) }
        }
        [b'"', ..] => quoted(rest, b'"'),
        [b'\'', b'\\', ..] => quoted(rest, b'\''),
        // Otherwise a quote begins a lifetime, unless one character (of `width` bytes in UTF-8) and a quote follow.
        [b'\'', first, ..] => {
            let width = match first.leading_ones() {
                0 => 1,
                2 => 2,
                3 => 3,
                _ => 4,
            };
            if rest.get(1 + width) == Some(&b'\'') { width + 2 } else { 0 }
        }
        _ => 0,
    }
}

fn quoted(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != quote {
        at += if rest[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

fn raw_string(rest: &[u8]) -> usize {
    let hashes = rest[1..].iter().take_while(|b| **b == b'#').count();
    // `r#name` is a name.
    if rest.get(1 + hashes) != Some(&b'"') {
        return 0;
    }
    let close: Vec<u8> = [b'"'].into_iter().chain(vec![b'#'; hashes]).collect();
    let inside = &rest[hashes + 2..];
    let end = inside.windows(close.len()).position(|window| window == close);
    end.map_or(rest.len(), |end| hashes + 2 + end + close.len())
}

fn block_comment(rest: &[u8]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        match &rest[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at.min(rest.len())
}

// The rules find what they are for.

#[test]
fn masking_leaves_only_code() {
    let text = "a // fn b\n/* x /* y */ { */ c \"}\\\"{\" r#\"\"}\"# '{' '\\'' b'}' &'a d '\u{e9}' e\n\"\n\"";
    let masked = mask(text);
    assert_eq!(masked.split_whitespace().collect::<Vec<_>>(), ["a", "c", "b", "&'a", "d", "e"]);
    assert_eq!((masked.len(), masked.matches('\n').count()), (text.len(), text.matches('\n').count()));
}

#[test]
fn a_forbidden_arrow_is_found_in_every_spelling() {
    let code =
        "use crate::units::X;\nuse crate::{\n    store::{Op, Store},\n    cache,\n};\nfn f() { crate::device::g(); }";
    let faults = ["line 2: cache must not use store", "line 6: cache must not use device"];
    assert_eq!(arrow_faults("cache/page.rs", code), faults);
    assert_eq!(arrow_faults("cache/page.rs", "use super::super::arena::A;").len(), 1);
    assert_eq!(arrow_faults("cache/mod.rs", "use super::arena::A;").len(), 1);
    assert_eq!(arrow_faults("cache/policy/lru.rs", "use super::super::page::P;").len(), 0);
    assert_eq!(arrow_faults("main.rs", "use genblk::cache::P;").len(), 1);
}

#[test]
fn tests_are_left_out_and_nothing_else() {
    let code = "use a;\n#[cfg(test)]\n#[allow(b)]\nmod tests {\n    fn f() {}\n}\nfn g() {}\n#[cfg(test)]\nmod far;\nmod near;";
    assert_eq!(without_tests(code).split_whitespace().collect::<Vec<_>>().join(" "), "use a; fn g() {} mod near;");
    assert_eq!(modules(code), ["far", "near"]);
    assert_eq!(modules("mod a;\n#[path = \"../b.rs\"]\n#[allow(x)]\nmod b;\nmod c;"), ["a", "c"]);
    let fields = "fn f() { A { #[cfg(test)] a: B::<C, D>::new(1, 2), c, #[cfg(test)] b: 2 } } fn g() {}";
    let left = without_tests(fields).split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(left, "fn f() { A { c, } } fn g() {}");
    let generic = "#[cfg(test)]\nimpl<A, B> Fn for C<A, B> { fn f() -> A {} }\nfn g() {}";
    assert_eq!(without_tests(generic).trim(), "fn g() {}");
}

#[test]
fn a_long_function_is_found_wherever_it_is() {
    let body = |lines: usize| format!("impl A {{\n    fn long(a: [u8; 4]) {{\n{}    }}\n}}\n", "x();\n".repeat(lines));
    assert_eq!(long_functions(&body(68)), [""; 0]);
    assert_eq!(long_functions(&body(69)), ["line 2: long has 71 lines; at most 70"]);
    assert_eq!(long_functions(&format!("trait T {{ fn short(&self); }}\n{}", body(68))), [""; 0]);
}

#[test]
fn faults_of_a_text_are_found() {
    let word = BANNED[0];
    let text = format!("// {word}: all\nlet a = \"\u{e9}\";\nlet {word}S = 1; // {word}_LIST\n");
    let faults =
        ["does not begin with its //! doc".to_string(), format!("line 1: {word}"), "line 2: not ASCII".to_string()];
    assert_eq!(text_faults(&text), faults);
    assert_eq!(text_faults(&format!("//! A.\n{}(x);\n", BANNED[6])), [format!("line 2: {}", BANNED[6])]);
}

#[test]
fn relative_links_are_found() {
    let text = "[a](b.md#c) and [d](https://e) [f](#g)\n`[h](i)`\n```\n[j](k)\n```\n[l](../m/n.toml \"title\")";
    assert_eq!(links(text), ["b.md", "../m/n.toml"]);
}

#[test]
fn proofs_are_found_in_tables() {
    let text = "| a | `b` | c |\n| d | `e_*` of | `src/f`: `g`, `h_*`; `i/j.rs`: `k` |\n`src/l`: `m`";
    let found = [("src/f", "g"), ("src/f", "h_*"), ("i/j.rs", "k")];
    assert_eq!(proofs(text), found.map(|(path, name)| (path.to_string(), name.to_string())));
    assert!(declares("fn h_1() {}", "h_*") && declares("fn g() {}", "g") && !declares("fn g2() {}", "g"));
}

//! The files of this repository and the modules of its crates.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::paths::ModulePath;
use crate::rust::{mask, without_tests, word, words};

/// A source file of a crate.
#[derive(Debug)]
pub struct Source {
    /// Path relative to the crate's directory, with forward slashes.
    pub path: String,
    /// The module that the file holds; empty for the crate's root.
    pub module: ModulePath,
    /// The text with comments, literals and tests blanked; line numbers are unchanged.
    pub code: String,
    /// Whether it is compiled only for tests.
    pub is_test: bool,
}

/// The repository's root.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

pub fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The files with `extension` under `folder`, without build output, fuzzing data and hidden directories.
pub fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.expect("a directory can be listed").path();
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

/// The source files of a crate: `crate_root`, a path in the directory `folder`, and all modules from there.
pub fn sources(folder: &str, crate_root: &str) -> Vec<Source> {
    let folder = root().join(folder);
    let mut found = BTreeMap::new();
    let mut open = vec![(PathBuf::from(crate_root), ModulePath::new(), false)];
    while let Some((path, module, is_test)) = open.pop() {
        let text = read(&folder.join(&path));
        let masked = mask(&text);
        let code = without_tests(&masked);
        let live = child_modules(&text, &code);
        for child in child_modules(&text, &masked) {
            let child_is_test = is_test || !live.contains(&child);
            let child_path = file_of(&folder, &path, module.is_empty(), &child);
            let child_module = [module.clone(), vec![child.name]].concat();
            open.push((child_path, child_module, child_is_test));
        }
        let name = path.to_str().expect("paths of source files are UTF-8").to_string();
        found.insert(name.clone(), Source { path: name, module, code, is_test });
    }
    found.into_values().collect()
}

/// The source files of the library and of the program.
pub fn sources_of_src() -> Vec<Source> {
    [sources("src", "lib.rs"), sources("src", "main.rs")].into_iter().flatten().collect()
}

/// The declaration of a module in a file of its own.
#[derive(Debug, PartialEq, Eq)]
pub struct ChildModule {
    pub name: String,
    /// Its file relative to the directory of the declaring file, if a `#[path]` gives it.
    pub path: Option<String>,
}

/// The modules that `text` declares in files of their own; `code` is the masked `text`.
pub fn child_modules(text: &str, code: &str) -> Vec<ChildModule> {
    let declared = |at: usize| {
        let rest = code[at + "mod".len()..].trim_start();
        let name = word(rest);
        let has_a_file = rest[name.len()..].trim_start().starts_with(';');
        has_a_file.then(|| ChildModule { name, path: path_attribute(text, code, at) })
    };
    words(code, "mod").filter_map(declared).collect()
}

/// The value of `#[path]` on the item with its keyword at `at`.
fn path_attribute(text: &str, code: &str, at: usize) -> Option<String> {
    let item = code[..at].rfind([';', '}']).map_or(0, |end| end + 1);
    let attribute = item + code[item..at].find("#[path")?;
    text[attribute..at].split('"').nth(1).map(str::to_string)
}

/// The file of a module that `parent` declares; both paths are relative to `folder`.
fn file_of(folder: &Path, parent: &Path, parent_is_root: bool, child: &ChildModule) -> PathBuf {
    if let Some(path) = &child.path {
        return parent.with_file_name(path);
    }
    let parent_is_mod_rs = parent.file_name().is_some_and(|name| name == "mod.rs");
    let beside = if parent_is_root || parent_is_mod_rs { parent.with_file_name("") } else { parent.with_extension("") };
    let plain = beside.join(format!("{}.rs", child.name));
    if folder.join(&plain).exists() { plain } else { beside.join(&child.name).join("mod.rs") }
}

#[test]
fn declarations_of_modules_are_found() {
    let text = "mod a;\n#[path = \"../b.rs\"]\n#[allow(x)]\nmod b;\nmod c { mod d; }\nmod e { }";
    let found = child_modules(text, &mask(text));
    let found: Vec<_> = found.iter().map(|child| (child.name.as_str(), child.path.as_deref())).collect();
    assert_eq!(found, [("a", None), ("b", Some("../b.rs")), ("d", None)]);
}

//! The paths by which modules name each other: in imports and elsewhere in the code.

use std::collections::BTreeMap;

use crate::rust::{is_word, item_end, line, word, words};

/// A path from the crate's root: `["cache", "page", "Page"]`.
pub type ModulePath = Vec<String>;

/// A path that code names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The line, from 1.
    pub line: usize,
    /// From the crate's root. A last part `*` means all names of a module.
    pub path: ModulePath,
}

/// Every path of the crate that the code of `module` names, in imports and elsewhere: by `super::`, by `self::`, and by
/// one of `roots`, the names of the crate's root.
pub fn named_paths(module: &[String], code: &str, roots: &[&str]) -> Vec<Named> {
    let mut found = Vec::new();
    for first in ["super", "self"].iter().chain(roots) {
        for at in words(code, first) {
            let begins_a_path = !code[..at].ends_with(':') && code[at + first.len()..].starts_with("::");
            if begins_a_path {
                let paths = expand(&code[at..]).into_iter().filter_map(|path| absolute(module, &path, roots));
                found.extend(paths.map(|path| Named { line: line(code, at), path }));
            }
        }
    }
    found
}

/// The names that `code` imports from its crate, each with its path from the crate's root. `children` are the modules
/// directly under `module`: imports may name them without `self::`.
pub fn imports(module: &[String], code: &str, children: &[String], roots: &[&str]) -> BTreeMap<String, ModulePath> {
    let mut found = BTreeMap::new();
    for at in words(code, "use") {
        let end = item_end(code, at).unwrap_or(code.len());
        let tree = code[at + "use".len()..end].trim_start();
        for (mut path, name) in expand_with_names(tree) {
            if children.contains(&path[0]) {
                path.insert(0, "self".to_string());
            }
            if let Some(path) = absolute(module, &path, roots) {
                found.insert(name, path);
            }
        }
    }
    found
}

/// Converts a path as written in `module` to one from the crate's root; `None` if it leads out of the crate.
fn absolute(module: &[String], path: &[String], roots: &[&str]) -> Option<ModulePath> {
    let (first, rest) = path.split_first()?;
    let mut from_root = match first.as_str() {
        "super" => module[..module.len().checked_sub(1)?].to_vec(),
        "self" => module.to_vec(),
        root if roots.contains(&root) => Vec::new(),
        _ => return None,
    };
    for name in rest {
        match name.as_str() {
            "super" => {
                from_root.pop()?;
            }
            "self" => {}
            name => from_root.push(name.to_string()),
        }
    }
    Some(from_root)
}

/// The paths of the use tree, or the single path, at the start of `text`.
fn expand(text: &str) -> Vec<ModulePath> {
    expand_with_names(text).into_iter().map(|(path, _)| path).collect()
}

/// The paths of a use tree, each with the name that it imports: `a::{b, c as d}` gives `a::b` as `b` and `a::c` as `d`.
fn expand_with_names(text: &str) -> Vec<(ModulePath, String)> {
    let mut path = Vec::new();
    let mut rest = text.trim_start();
    loop {
        if let Some(group) = rest.strip_prefix('{') {
            let branches = branches(group).into_iter().flat_map(expand_with_names);
            return branches.map(|(branch, name)| ([path.clone(), branch].concat(), name)).collect();
        }
        let name = if rest.starts_with('*') { "*".to_string() } else { word(rest) };
        if name.is_empty() {
            break;
        }
        rest = &rest[name.len()..];
        path.push(name);
        match rest.strip_prefix("::") {
            Some(next) => rest = next.trim_start(),
            None => break,
        }
    }
    let alias = rest.trim_start().strip_prefix("as ").map(|name| word(name.trim_start()));
    // `a::{self}` imports `a`.
    let own = path.iter().rev().find(|name| *name != "self").cloned();
    match alias.or(own) {
        Some(name) => vec![(path, name)],
        None => Vec::new(),
    }
}

/// The parts of a group, from after its opening brace to its closing one.
fn branches(group: &str) -> Vec<&str> {
    let (mut depth, mut from) = (0usize, 0);
    let mut found = Vec::new();
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                found.push(group[from..i].trim());
                from = i + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    found.retain(|branch| branch.starts_with(|c| is_word(c) || c == '*'));
    found
}

#[test]
fn use_trees_are_expanded() {
    let paths = |text| expand(text).iter().map(|path| path.join("::")).collect::<Vec<_>>();
    assert_eq!(paths("a::b::C"), ["a::b::C"]);
    assert_eq!(paths("a::{\n    b::{C, D as E},\n    f,\n    *,\n};"), ["a::b::C", "a::b::D", "a::f", "a::*"]);
    assert_eq!(paths("crate::a::f(crate::b::C)"), ["crate::a::f"]);
    assert_eq!(paths("crate::a::B::<u8>::new()"), ["crate::a::B"]);
}

#[test]
fn imported_paths_are_found_in_every_syntax() {
    let module = module_of("cache/policy/lru.rs");
    let code =
        "use crate::a::{b, c};\nuse super::super::page::P;\npub(super) use super::D;\nlet e = self::f(genblk::g);";
    let found = named_paths(&module, code, &["crate", "genblk"]);
    let mut found: Vec<_> = found.iter().map(|named| format!("{} {}", named.line, named.path.join("::"))).collect();
    found.sort();
    assert_eq!(found, ["1 a::b", "1 a::c", "2 cache::page::P", "3 cache::policy::D", "4 cache::policy::lru::f", "4 g"]);
    assert_eq!(named_paths(&module, "use genblk::a;", &["crate"]), []);
}

/// The module in a file that no `#[path]` names: `cache/page.rs` holds `["cache", "page"]`, and lib.rs `[]`.
#[cfg(test)]
pub fn module_of(file: &str) -> ModulePath {
    let names = file.trim_end_matches(".rs").split('/');
    names.filter(|name| !["mod", "lib", "main"].contains(name)).map(str::to_string).collect()
}

//! Finds circles of modules that import each other.
//!
//! What counts:
//!
//! - A module imports what its code names by `crate::`, `super::` or `self::`, in a `use` or elsewhere. A `mod`
//!   declares, and imports nothing.
//! - A name that a module re-exports or imports itself counts as the module that defines it: with `pub use file::Image`
//!   in `store/mod.rs`, `super::Image` in `store/lock.rs` is an import of `store/file.rs`.
//! - A module and the modules within it are one: neither imports the other. `cache/mod.rs` holds fields of types that
//!   its children define, and the children are `impl` blocks of `PageCache`; that is no circle.
//! - So a circle is among siblings: the files and folders of one folder, each folder with all that it contains. This
//!   also finds every circle of files, wherever they lie: in the deepest folder that contains them all, it is one of
//!   siblings.

use std::collections::{BTreeMap, BTreeSet};

use crate::paths::{ModulePath, imports, named_paths};
use crate::tree::Source;

/// The circles in a crate, each with the imports that close it.
pub fn circles(sources: &[Source]) -> Vec<String> {
    let names = Names::of(sources);
    let mut folders: BTreeMap<ModulePath, Imports> = BTreeMap::new();
    for source in sources {
        for named in named_paths(&source.module, &source.code, &["crate"]) {
            let target = names.defining_module(&named.path);
            let common = source.module.iter().zip(&target).take_while(|(a, b)| a == b).count();
            if let (Some(from), Some(to)) = (source.module.get(common), target.get(common)) {
                let place = format!("{} line {}: {from} uses {to}", source.path, named.line);
                let folder = folders.entry(target[..common].to_vec()).or_default();
                folder.entry(from.clone()).or_default().entry(to.clone()).or_insert(place);
            }
        }
    }
    folders.values().flat_map(circles_of_siblings).collect()
}

/// By importing and imported sibling: one place of the import.
type Imports = BTreeMap<String, BTreeMap<String, String>>;

/// The imported names of a crate's modules.
struct Names {
    by_module: BTreeMap<ModulePath, BTreeMap<String, ModulePath>>,
}

impl Names {
    fn of(sources: &[Source]) -> Self {
        let children = |module: &ModulePath| -> Vec<String> {
            let within = sources.iter().filter(|source| source.module.len() == module.len() + 1);
            within
                .filter(|source| source.module.starts_with(module))
                .map(|source| source.module[module.len()].clone())
                .collect()
        };
        let names_in = |source: &Source| imports(&source.module, &source.code, &children(&source.module), &["crate"]);
        Self { by_module: sources.iter().map(|source| (source.module.clone(), names_in(source))).collect() }
    }

    /// The module that defines the item that `path` names.
    fn defining_module(&self, path: &[String]) -> ModulePath {
        // Guards against a circle of re-exports; a real chain is shorter.
        const IMPORTS_MAX: u32 = 16;
        let mut path = path.to_vec();
        for _ in 0..IMPORTS_MAX {
            let depth = (0..=path.len()).rev().find(|&depth| self.by_module.contains_key(&path[..depth])).unwrap_or(0);
            let imported = path.get(depth).and_then(|name| self.by_module.get(&path[..depth])?.get(name));
            match imported {
                Some(stands_for) if !stands_for.is_empty() => path = [stands_for, &path[depth + 1..]].concat(),
                _ => {
                    path.truncate(depth);
                    break;
                }
            }
        }
        path
    }
}

/// A description of each set of siblings that import each other, directly or not.
fn circles_of_siblings(imports: &Imports) -> Vec<String> {
    let reached: BTreeMap<&String, BTreeSet<&String>> =
        imports.keys().map(|name| (name, reach(imports, name))).collect();
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for (name, targets) in &reached {
        let circle: BTreeSet<_> =
            targets.iter().filter(|target| reached.get(*target).is_some_and(|back| back.contains(name))).collect();
        if circle.is_empty() || !seen.insert(circle.clone()) {
            continue;
        }
        let within = circle.iter().flat_map(|member| &imports[**member]);
        let places: Vec<_> = within.filter(|(to, _)| circle.contains(&to)).map(|(_, place)| place.as_str()).collect();
        let members: Vec<_> = circle.iter().map(|member| member.as_str()).collect();
        found.push(format!("a circle of {}:\n  {}", members.join(", "), places.join("\n  ")));
    }
    found
}

/// The siblings that `from` imports, and those that they import, and so on.
fn reach<'a>(imports: &'a Imports, from: &'a String) -> BTreeSet<&'a String> {
    let mut reached = BTreeSet::new();
    let mut open = vec![from];
    while let Some(name) = open.pop() {
        open.extend(imports.get(name).into_iter().flat_map(BTreeMap::keys).filter(|to| reached.insert(*to)));
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths::module_of;

    /// The circles in a crate with these files.
    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let source = |&(path, code): &(&str, &str)| Source {
            path: path.to_string(),
            module: module_of(path),
            code: code.to_string(),
            is_test: false,
        };
        circles(&files.iter().map(source).collect::<Vec<_>>())
    }

    #[test]
    fn an_import_cycle_of_files_is_found() {
        let files = [
            ("lib.rs", "mod a;"),
            ("a/mod.rs", "mod b; mod c; mod d;"),
            ("a/b.rs", "use super::c::C;"),
            ("a/c.rs", "\nfn f() { crate::a::d::g(); }"),
            ("a/d.rs", "use super::{b::{B, E}, c::C as F};"),
        ];
        let places =
            "a/b.rs line 1: b uses c\n  a/c.rs line 2: c uses d\n  a/d.rs line 1: d uses b\n  a/d.rs line 1: d uses c";
        assert_eq!(found(&files), [format!("a circle of b, c, d:\n  {places}")]);
        assert_eq!(found(&files[..4]), [""; 0]);
    }

    #[test]
    fn an_import_cycle_through_re_exports_is_found() {
        let files = [
            ("lib.rs", "mod a;"),
            ("a/mod.rs", "mod b; mod c; pub(crate) use b::{B, D as E}; struct A;"),
            ("a/b.rs", "use super::c::C;"),
            ("a/c.rs", "use super::E;"),
        ];
        assert_eq!(found(&files), ["a circle of b, c:\n  a/b.rs line 1: b uses c\n  a/c.rs line 1: c uses b"]);
    }

    #[test]
    fn a_module_and_its_children_form_no_import_cycle() {
        let files = [
            ("lib.rs", "mod a; mod e;"),
            ("a/mod.rs", "mod b; mod c; use self::b::B; use crate::e::E; struct A(B, c::C);"),
            ("a/b.rs", "use super::A; impl A {}"),
            ("a/c.rs", "use super::{A, E}; use super::b::B;"),
            ("e.rs", "fn f() {}"),
        ];
        assert_eq!(found(&files), [""; 0]);
    }

    #[test]
    fn an_import_cycle_of_folders_is_found() {
        let files = [
            ("lib.rs", "mod a; mod b;"),
            ("a/mod.rs", "mod x; mod y;"),
            ("a/x.rs", "use crate::b::z::Z;"),
            ("a/y.rs", "fn f() {}"),
            ("b/mod.rs", "pub mod z; mod w;"),
            ("b/z.rs", "struct Z;"),
            ("b/w.rs", "use crate::a::y::f;"),
        ];
        assert_eq!(found(&files), ["a circle of a, b:\n  a/x.rs line 1: a uses b\n  b/w.rs line 1: b uses a"]);
    }
}

//! Planted bugs (`mutations.toml`), each with the test that must find it.
//!
//! Every `make test` checks that each bug can still be planted and that its test exists. `make mutants` plants them one
//! by one in a copy of the tree, runs the test of each, and names the bugs that no test found. The copy and what is
//! compiled of it stay in `target/mutations`: each bug costs an incremental build, and nothing else is compiled anew.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use serde::Deserialize;

/// A test that has not failed after so many seconds hangs: that finds the bug as well.
const TEST_SECONDS_MAX: u32 = 300;
/// The first bug's build compiles every dependency, perhaps on a busy machine.
const BUILD_SECONDS_MAX: u32 = 3600;
/// The exit status of timeout(1) after it has ended its command.
const TIMED_OUT: i32 = 124;

/// A bug to plant; see `mutations.toml`.
#[derive(Debug, Deserialize)]
struct Mutation {
    name: String,
    file: PathBuf,
    old: String,
    new: String,
    test: String,
}

#[derive(Debug, Deserialize)]
struct Mutations {
    mutation: Vec<Mutation>,
}

/// What a test says of a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Found,
    FoundByHang,
    Survived,
    DoesNotCompile,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Found => "found",
            Self::FoundByHang => "found (the test hangs)",
            Self::Survived => "SURVIVED",
            Self::DoesNotCompile => "DOES NOT COMPILE",
        })
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn mutations() -> Vec<Mutation> {
    let text = fs::read_to_string(root().join("tests/mutations.toml")).expect("the file system works");
    toml::from_str::<Mutations>(&text).expect("the list is valid TOML").mutation
}

impl Mutation {
    /// The target of cargo test, as its options, and the filter of test names.
    fn target(&self) -> (Vec<&str>, &str) {
        match self.test.split_once(' ').unwrap_or((&self.test, "")) {
            ("lib", filter) => (vec!["--lib"], filter),
            ("loom", filter) => (vec!["--manifest-path", "loom/Cargo.toml", "--test", "models"], filter),
            (test, filter) => (vec!["--test", test], filter),
        }
    }

    /// The files that hold the tests of the target.
    fn sources(&self) -> PathBuf {
        let (test, _) = self.test.split_once(' ').unwrap_or((&self.test, ""));
        let file = root().join(format!("tests/{test}.rs"));
        match test {
            "lib" => root().join("src"),
            "loom" => root().join("loom/tests"),
            _ if file.exists() => file,
            test => root().join("tests").join(test),
        }
    }

    /// The file's text with the bug in it.
    fn plant(&self) -> String {
        let path = root().join(&self.file);
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {}: {e}", self.name, path.display()));
        let count = text.matches(&self.old).count();
        assert_eq!(count, 1, "{}: the text to replace occurs {count} times in {}", self.name, self.file.display());
        text.replacen(&self.old, &self.new, 1)
    }

    /// Plants the bug in `tree`, runs its test, and takes the bug out again.
    fn judge(&self, tree: &Path) -> Verdict {
        let path = tree.join(&self.file);
        fs::write(&path, self.plant()).expect("the file system works");
        let (target, filter) = self.target();
        let built = cargo(tree, BUILD_SECONDS_MAX, &[&target[..], &["--no-run"]].concat(), &[]);
        if !built.status.success() {
            println!("{}", stderr(&built));
            fs::copy(root().join(&self.file), &path).expect("the file system works");
            return Verdict::DoesNotCompile;
        }
        let output = cargo(tree, TEST_SECONDS_MAX, &target, &[filter]);
        fs::copy(root().join(&self.file), &path).expect("the file system works");
        let ran = !String::from_utf8_lossy(&output.stdout).contains("running 0 tests");
        assert!(ran, "{}: no test is named like {filter:?}", self.name);
        match output.status.code() {
            Some(0) => Verdict::Survived,
            Some(TIMED_OUT) => Verdict::FoundByHang,
            _ => Verdict::Found,
        }
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs cargo test in a tree. Ends it, and all that it has started, after `seconds_max`.
fn cargo(tree: &Path, seconds_max: u32, options: &[&str], of_tests: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.arg(seconds_max.to_string()).args([env!("CARGO"), "test", "--locked", "--quiet"]).args(options);
    command.arg("--").args(of_tests).current_dir(tree).env("RUST_BACKTRACE", "0");
    // Without debug information it compiles and links in half the time. A setting for continuous integration must not
    // make every build a whole one.
    command.env("CARGO_PROFILE_TEST_DEBUG", "0").env("CARGO_PROFILE_DEV_DEBUG", "0").env("CARGO_INCREMENTAL", "1");
    command.env("CARGO_TARGET_DIR", tree.with_file_name("target")).output().expect("timeout(1)")
}

/// A copy of all files of the tree that git knows. Keeps those that are as they should be, and what was compiled.
fn copy_tree() -> PathBuf {
    let tree = root().join("target/mutations/tree");
    let files = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().expect("git");
    assert!(files.status.success(), "git ls-files: {}", stderr(&files));
    for file in String::from_utf8(files.stdout).expect("git lists UTF-8").split_terminator('\0') {
        let (from, to) = (root().join(file), tree.join(file));
        let Ok(contents) = fs::read(&from) else { continue };
        if fs::read(&to).is_ok_and(|present| present == contents) {
            continue;
        }
        fs::create_dir_all(to.parent().expect("a file has a directory")).expect("the file system works");
        fs::copy(from, to).expect("the file system works");
    }
    tree
}

/// Whether a file, or one below a directory, has this text.
fn contains(path: &Path, text: &str) -> bool {
    if path.is_dir() {
        let mut entries = fs::read_dir(path).expect("the file system works");
        return entries.any(|entry| contains(&entry.expect("the file system works").path(), text));
    }
    fs::read_to_string(path).is_ok_and(|contents| contents.contains(text))
}

#[test]
fn every_bug_can_be_planted_and_its_test_exists() {
    let mutations = mutations();
    for (at, mutation) in mutations.iter().enumerate() {
        mutation.plant();
        let Mutation { name, test, .. } = mutation;
        assert!(mutations[..at].iter().all(|other| other.name != *name), "two bugs have the name {name}");
        assert!(mutation.sources().exists(), "{name}: there is no test {test}");
        let (_, filter) = mutation.target();
        // A filter is a path of modules, or ends with the name of a test.
        let last = filter.trim_end_matches("::").rsplit("::").next().unwrap_or("");
        let found = contains(&mutation.sources(), last) || mutation.sources().join(format!("{last}.rs")).exists();
        assert!(found || contains(&mutation.sources(), &format!("mod {last}")), "{name}: there is no test {test}");
    }
}

/// The bugs that the environment selects:
///
/// - `GENBLK_MUTANTS`: those whose line in the list, "name file test", contains it.
/// - `GENBLK_MUTANTS_SKIP`: not those that this file, the output of an earlier run, calls found.
/// - `GENBLK_MUTANTS_SAMPLE`: a random selection of so many.
fn selected() -> Vec<Mutation> {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let part = variable("GENBLK_MUTANTS").unwrap_or_default();
    let earlier =
        variable("GENBLK_MUTANTS_SKIP").map(|path| fs::read_to_string(path).expect("an earlier run's output"));
    let earlier = earlier.unwrap_or_default();
    let mut selected = mutations();
    selected.retain(|Mutation { name, file, test, .. }| {
        let found = format!("{name}: {}", Verdict::Found);
        let was_found = earlier.lines().any(|line| line.starts_with(&found));
        format!("{name} {} {test}", file.display()).contains(&part) && !was_found
    });
    if let Some(count) = variable("GENBLK_MUTANTS_SAMPLE") {
        let count: usize = count.parse().expect("GENBLK_MUTANTS_SAMPLE is a number");
        // The order of a map with random keys is random enough.
        let shuffled: HashMap<String, Mutation> = selected.into_iter().map(|bug| (bug.name.clone(), bug)).collect();
        selected = shuffled.into_values().take(count).collect();
    }
    selected
}

#[test]
#[ignore = "compiles the daemon for each bug: make mutants"]
fn every_planted_bug_is_found_by_its_test() {
    let tree = copy_tree();
    let selected = selected();
    let count = selected.len();
    let began = Instant::now();
    let mut survivors = Vec::new();
    for mutation in selected {
        let Mutation { name, test, .. } = &mutation;
        let began = Instant::now();
        let verdict = mutation.judge(&tree);
        println!("{name}: {verdict} in {} s by {test}", began.elapsed().as_secs());
        if matches!(verdict, Verdict::Survived | Verdict::DoesNotCompile) {
            survivors.push(mutation.name);
        }
    }
    println!("{count} planted bugs, {} found, in {} s", count - survivors.len(), began.elapsed().as_secs());
    assert!(survivors.is_empty(), "no test found {survivors:?}");
}

//! Every target runs over its corpus, and over mutations of it from a seed. libFuzzer finds more, since it sees which
//! code an input reaches; this needs nothing but cargo.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::{TARGETS, Target, files, sessions};
use crate::prng::Prng;

/// Mutated inputs for each target in every run of the tests.
const MUTATED: u64 = 200;
/// Longest input.
const BYTES_MAX: usize = 1024;

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let entries = fs::read_dir(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a directory").path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("a file")).collect()
}

/// An input like one of the corpus, but for some bytes.
fn mutate(corpus: &[Vec<u8>], prng: &mut Prng) -> Vec<u8> {
    let mut input = match prng.below(8) {
        0 => {
            let len = prng.between(1, 256);
            prng.bytes(usize::try_from(len).expect("it is small"))
        }
        _ => corpus[index(prng, corpus.len())].clone(),
    };
    for _ in 0..prng.between(1, 8) {
        let at = index(prng, input.len() + 1);
        let byte = prng.pick(&[0, 1, 2, 0x7f, 0x80, 0xff]);
        match prng.below(6) {
            0 if at < input.len() => input[at] = byte,
            1 | 2 if at < input.len() => input[at] = prng.bytes(1)[0],
            3 if at < input.len() => drop(input.remove(at)),
            4 => {
                // A part of another input.
                let other = &corpus[index(prng, corpus.len())];
                let from = index(prng, other.len() + 1);
                let len = index(prng, 32).min(other.len() - from);
                input.splice(at..at, other[from..from + len].iter().copied());
            }
            _ => {
                let len = prng.between(1, 16);
                let noise = prng.bytes(usize::try_from(len).expect("it is small"));
                input.splice(at..at, noise);
            }
        }
    }
    input.truncate(BYTES_MAX);
    input
}

fn index(prng: &mut Prng, len: usize) -> usize {
    if len == 0 { 0 } else { usize::try_from(prng.below(len as u64)).expect("an index") }
}

/// Runs one target over its corpus, then over mutations until there were enough and the time is over.
fn fuzz((name, target): Target, seed: u64, time: Duration) {
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "{name} has no corpus");
    corpus.iter().for_each(|input| target(input));
    let (until, mut count) = (Instant::now() + time, 0);
    while count < MUTATED || Instant::now() < until {
        let mut prng = Prng::new(seed + count);
        let input = mutate(&corpus, &mut prng);
        count += 1;
        let result = std::panic::catch_unwind(|| target(&input));
        if let Err(panic) = result {
            let path = std::env::temp_dir().join(format!("genblk-fuzz-{name}-{seed}-{count}"));
            // The input of the failure; the message says where it is.
            let written = fs::write(&path, &input).is_ok();
            eprintln!("{name}: input {count} of seed {seed}: {input:?} (in {}: {written})", path.display());
            std::panic::resume_unwind(panic);
        }
    }
    println!("{name}: {} inputs of the corpus, {count} mutations from seed {seed}", corpus.len());
}

/// The target `name` for `GENBLK_FUZZ_SECONDS` (0), from the seed `GENBLK_FUZZ_SEED` (1).
fn run(name: &str) {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let target = TARGETS.into_iter().find(|(known, _)| *known == name).expect("a target of this name");
    let time = Duration::from_secs(number("GENBLK_FUZZ_SECONDS").unwrap_or(0));
    fuzz(target, number("GENBLK_FUZZ_SEED").unwrap_or(1) << 32, time);
}

#[test]
fn any_descriptor_chain_is_parsed_as_the_model_parses_it() {
    run("request_parse");
}

#[test]
fn a_ring_completes_each_request_once_with_any_driver_state() {
    run("ring_turn");
}

#[test]
fn any_inflight_region_is_recovered_within_its_bounds() {
    run("inflight_recover");
}

#[test]
fn no_front_end_messages_prevent_the_next_session() {
    run("wire_relay");
    run("control_plane");
    sessions::clean_up();
}

#[test]
fn the_cache_keeps_its_guarantees_under_any_script_of_events() {
    run("cache_ops");
}

#[test]
fn any_accepted_cache_file_refers_only_to_existing_frames_and_pages() {
    run("ledger_decode");
    files::clean_up();
}

#[test]
fn any_accepted_configuration_has_values_in_range() {
    run("config");
}

#[test]
fn requests_and_model_agree_on_the_limits() {
    run("store_limits");
}

#[test]
fn no_message_or_statistics_of_a_disk_process_ends_the_supervisor() {
    run("disk_protocol");
}

/// The inputs of another version would be refused at their first field, and so would nearly all mutations of them.
#[test]
fn the_corpus_has_every_recorded_message_of_the_current_version() {
    let corpus = corpus("disk_protocol");
    for (first, recording) in [
        (0, include_str!("../disk_protocol/recorded/from_disk.3.jsonl")),
        (1, include_str!("../disk_protocol/recorded/to_disk.3.jsonl")),
    ] {
        for line in recording.lines() {
            let input = [&[first], line.as_bytes()].concat();
            assert!(corpus.contains(&input), "fuzz/corpus/disk_protocol lacks byte {first} and {line}");
        }
    }
}

/// `fuzz/` has a target for each function, and no other.
#[test]
fn every_target_has_a_fuzzer_and_a_corpus() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = fs::read_to_string(directory.join("Cargo.toml")).expect("its manifest");
    assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
    for (name, _) in TARGETS {
        let source = fs::read_to_string(directory.join("fuzz_targets").join(format!("{name}.rs"))).expect("its source");
        assert!(source.contains(&format!("\"{name}\"")) && manifest.contains(&format!("\"{name}\"")), "{name}");
        assert!(!corpus(name).is_empty(), "{name}");
    }
}

/// `make fuzz` builds with `--locked`, which a new dependency of genblk makes fail: copy Cargo.lock to fuzz/, and run
/// `cargo metadata --manifest-path fuzz/Cargo.toml`.
#[test]
fn the_fuzzers_lock_file_matches_the_dependencies_of_genblk() {
    let read = |path: &str| {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path);
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.parse::<toml::Table>().expect("TOML")
    };
    let (manifest, lock) = (read("Cargo.toml"), read("fuzz/Cargo.lock"));
    let packages = lock["package"].as_array().expect("packages");
    let genblk = packages.iter().find(|package| package["name"].as_str() == Some("genblk")).expect("genblk");
    let names = genblk["dependencies"].as_array().expect("its dependencies").iter().filter_map(toml::Value::as_str);
    let mut locked: Vec<&str> = names.filter_map(|name| name.split(' ').next()).collect();
    let mut wanted: Vec<&str> =
        manifest["dependencies"].as_table().expect("a table").keys().map(String::as_str).collect();
    locked.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(locked, wanted, "fuzz/Cargo.lock is of another version of genblk");
}

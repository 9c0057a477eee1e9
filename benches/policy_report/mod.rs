//! What the benchmarks of policies say at their end: a table that stands at the head of their own source, and which of
//! their demands are met.

use std::fs;
use std::process::ExitCode;

/// A demand, and whether it is met.
#[derive(Clone, Debug)]
pub struct Gate {
    /// Whether it is met.
    pub holds: bool,
    /// What was demanded, and what was found.
    pub says: String,
}

/// What the user says, without what cargo adds.
pub fn arguments() -> Vec<String> {
    std::env::args().skip(1).filter(|argument| argument != "--bench").collect()
}

/// Prints the demands, and fails if one is not met.
pub fn conclude(gates: &[Gate]) -> Result<(), String> {
    for gate in gates {
        println!("{}  {}", if gate.holds { "holds" } else { "FAILS" }, gate.says);
    }
    if gates.iter().all(|gate| gate.holds) { Ok(()) } else { Err("a demand is not met".to_string()) }
}

/// The exit status of a benchmark.
pub fn exit(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("{fault}");
            ExitCode::FAILURE
        }
    }
}

/// Replaces the table at the head of a source of benches/.
pub fn put_at_head_of(source: &str, table: &str) -> Result<(), String> {
    const OPEN: &str = "//! ```text\n";
    const CLOSE: &str = "//! ```\n";
    let path = format!("{}/benches/{source}", env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    let (head, rest) = text.split_once(OPEN).ok_or("the source has no place for a table")?;
    let (_, tail) = rest.split_once(CLOSE).ok_or("the place for the table has no end")?;
    let lines: String = table.lines().map(|line| format!("{}\n", format!("//! {line}").trim_end())).collect();
    fs::write(&path, format!("{head}{OPEN}{lines}{CLOSE}{tail}")).map_err(|e| format!("{path}: {e}"))
}

//! The output of the policy benchmarks: a table, which is kept in the doc comment of their own source, and a verdict on
//! each requirement.

use std::fs;
use std::process::ExitCode;

/// A requirement and its verdict.
#[derive(Clone, Debug)]
pub struct Gate {
    pub passed: bool,
    /// The requirement, and what was measured.
    pub message: String,
}

/// The user's arguments, without those that cargo adds.
pub fn arguments() -> Vec<String> {
    std::env::args().skip(1).filter(|argument| argument != "--bench").collect()
}

/// Prints the verdicts.
///
/// # Errors
/// A requirement is not met.
pub fn print_verdicts(gates: &[Gate]) -> Result<(), String> {
    for gate in gates {
        println!("{}  {}", if gate.passed { "pass" } else { "FAIL" }, gate.message);
    }
    if gates.iter().all(|gate| gate.passed) { Ok(()) } else { Err("a requirement is not met".to_string()) }
}

/// Prints the error, if any; returns the exit status.
pub fn exit_code(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("{reason}");
            ExitCode::FAILURE
        }
    }
}

/// Replaces the table in the doc comment of a source in benches/.
///
/// # Errors
/// The source cannot be read or written, or has no block for a table.
pub fn write_table_to(source: &str, table: &str) -> Result<(), String> {
    const OPEN: &str = "//! ```text\n";
    const CLOSE: &str = "//! ```\n";
    let path = format!("{}/benches/{source}", env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    let (head, rest) = text.split_once(OPEN).ok_or("the source has no block for a table")?;
    let (_, tail) = rest.split_once(CLOSE).ok_or("the block for the table has no end")?;
    let lines: String = table.lines().map(|line| format!("{}\n", format!("//! {line}").trim_end())).collect();
    fs::write(&path, format!("{head}{OPEN}{lines}{CLOSE}{tail}")).map_err(|e| format!("{path}: {e}"))
}

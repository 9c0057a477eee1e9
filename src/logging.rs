//! The log: one line a record on standard error, with time and level, filtered by `GENBLK_LOG`.

use std::io::Write;

use env_logger::{Builder, Env};

/// The variable that chooses what is logged: `error`, `warn`, `info` (the default), `debug` or `trace`.
pub const VARIABLE: &str = "GENBLK_LOG";

/// Starts the log; call it once, first thing.
pub fn init() {
    Builder::from_env(Env::new().filter_or(VARIABLE, "info"))
        .format(|out, record| {
            // A message may carry a path or an error of several lines: a record stays one line, so that nothing that
            // reads the log takes a part of one record for another.
            let message = record.args().to_string().replace('\n', "; ");
            writeln!(out, "{} {:5} {message}", out.timestamp_millis(), record.level())
        })
        .init();
}

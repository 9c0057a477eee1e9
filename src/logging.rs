//! The log: one line a record on standard error, with time and level, filtered by `GENBLK_LOG`.

use std::env;
use std::io::Write;

use env_logger::Builder;
use log::LevelFilter;

use crate::error::{Error, ErrorKind, Result};

/// The variable that chooses what is logged.
const VARIABLE: &str = "GENBLK_LOG";

/// Starts the log; call it once, first thing.
///
/// # Errors
/// [`ErrorKind::Config`] if the variable has a value that is no level: a log that says nothing would be a bad surprise.
pub fn init() -> Result<()> {
    let wish = env::var_os(VARIABLE).unwrap_or_else(|| "info".into());
    let level = wish.to_str().and_then(|word| word.parse::<LevelFilter>().ok()).ok_or_else(|| {
        let context = format!("{VARIABLE}: {wish:?} is none of off, error, warn, info, debug and trace");
        Error::new(ErrorKind::Config, context)
    })?;
    Builder::new()
        .filter_level(level)
        .format(|out, record| {
            // A message may carry a path or an error of several lines: a record stays one line, so that nothing that
            // reads the log takes a part of one record for another.
            let message = record.args().to_string().replace('\n', "; ");
            writeln!(out, "{} {:5} {message}", out.timestamp_millis(), record.level())
        })
        .init();
    Ok(())
}

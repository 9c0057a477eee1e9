//! The log: one line per record on standard error, with time and level, filtered by `GENBLK_LOG`.

use std::env;
use std::io::Write;

use env_logger::Builder;
use log::LevelFilter;

use crate::error::{Error, ErrorKind, Result};

/// The environment variable that sets the level.
const VARIABLE: &str = "GENBLK_LOG";

/// Starts the log; called once, before anything else.
///
/// # Errors
/// [`ErrorKind::Config`] if the variable is not a level: to fall back to another level would hide the mistake.
pub fn init() -> Result<()> {
    let wish = env::var_os(VARIABLE).unwrap_or_else(|| "info".into());
    let level = wish.to_str().and_then(|word| word.parse::<LevelFilter>().ok()).ok_or_else(|| {
        let context = format!("{VARIABLE}: {wish:?} is not one of off, error, warn, info, debug and trace");
        Error::new(ErrorKind::Config, context)
    })?;
    Builder::new()
        .filter_level(level)
        .format(|out, record| {
            // A message may contain a path or an error with line breaks. A record stays on one line, so that a reader
            // of the log never takes part of one record for another.
            let message = record.args().to_string().replace('\n', "; ");
            writeln!(out, "{} {:5} {message}", out.timestamp_millis(), record.level())
        })
        .init();
    Ok(())
}

//! The log: one line per record on standard error, with time and level, filtered by `GENBLK_LOG`.

use std::env;
use std::io::Write;

use env_logger::Builder;
use log::{LevelFilter, warn};

/// The environment variable that sets the level.
const VARIABLE: &str = "GENBLK_LOG";

/// Starts the log; called once, before anything else. A value of the variable that is not a level is reported by a
/// warning, and the level is `info`: a mistake in the environment must keep neither a disk nor --help from its user.
pub fn init() {
    let wish = env::var_os(VARIABLE).filter(|wish| !wish.is_empty());
    let level = wish.as_ref().map_or(Some(LevelFilter::Info), |wish| wish.to_str()?.trim().parse().ok());
    Builder::new()
        .filter_level(level.unwrap_or(LevelFilter::Info))
        .format(|out, record| {
            // A message may contain a path or an error with line breaks. A record stays on one line, so that a reader
            // of the log never takes part of one record for another.
            let message = record.args().to_string().replace('\n', "; ");
            writeln!(out, "{} {:5} {message}", out.timestamp_millis(), record.level())
        })
        .init();
    if let (None, Some(wish)) = (level, wish) {
        warn!("{VARIABLE}: {wish:?} is not one of off, error, warn, info, debug and trace; using info");
    }
}

//! The `genblk` command.

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

use genblk::cli::{self, Action};
use genblk::config::Config;
use genblk::error::{Error, ErrorKind, Result};
use genblk::logging;

fn main() -> ExitCode {
    logging::init();
    match cli::action(env::args_os()).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("genblk: {error}");
            ExitCode::from(error.exit_status())
        }
    }
}

fn run(action: Action) -> Result<()> {
    match action {
        Action::Print(text) => {
            // A reader that has gone away is no failure of ours.
            let _ = io::stdout().write_all(text.as_bytes());
            Ok(())
        }
        Action::Serve(config) => serve(&config),
    }
}

fn serve(config: &Config) -> Result<()> {
    let count = config.devices.len();
    Err(Error::new(
        ErrorKind::System,
        format!("no daemon in this build to serve {count} device(s)"),
    ))
}

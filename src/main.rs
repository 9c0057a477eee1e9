//! The `genblk` command.

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

use genblk::cli::{self, Action};
use genblk::daemon;
use genblk::error::Result;
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
        Action::Serve(config) => daemon::run(&config),
    }
}

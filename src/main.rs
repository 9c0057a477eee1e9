//! The `genblk` command.

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

use genblk::cli::{self, Action};
use genblk::daemon;
use genblk::error::Result;
use genblk::logging;
use genblk::recover;

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
        Action::Print(text) => print(&text),
        Action::ListLeft(memory_dir) => print(&recover::list(&memory_dir)?),
        Action::Recover(file) => print(&recover::recover(&file)?),
        Action::Discard(file) => print(&recover::discard(&file)?),
        Action::Serve(config) => return daemon::run(&config),
    }
    Ok(())
}

fn print(text: &str) {
    // EPIPE is not a failure: the reader has closed the pipe.
    let _ = io::stdout().write_all(text.as_bytes());
}

//! The `genblk` command.

use std::env;
use std::io::{self, Write};
use std::process::ExitCode;

use genblk::check;
use genblk::cli::{self, Action};
use genblk::daemon::{self, Strictness};
use genblk::error::Result;
use genblk::logging;
use genblk::recover::{self, Consent, Recovery};

fn main() -> ExitCode {
    logging::init();
    match cli::action(env::args_os()).and_then(run) {
        Ok(()) => {
            logging::flush();
            ExitCode::SUCCESS
        }
        Err(error) => {
            logging::print(&format!("genblk: {error}"));
            ExitCode::from(error.exit_status())
        }
    }
}

fn run(action: Action) -> Result<()> {
    match action {
        Action::Print(text) => print(&text),
        Action::ListCaches(directory) => print(&recover::list(&directory)?),
        Action::Prune(directory) => print(&recover::prune(&directory)?),
        Action::Recover { cache, image, force } => {
            print(&recover::recover(&Recovery { cache, image, consent: consent(force) })?);
        }
        Action::Discard { cache, force } => print(&recover::discard(&cache, consent(force))?),
        Action::Check { source, config } => print(&check::check(&source, &config)?),
        Action::Serve(config) => return daemon::run(&config, Strictness::ServeTheOthers),
        Action::ServeAll(config) => return daemon::run(&config, Strictness::AllOrNone),
        Action::TakeOver(image, memory_dir) => print(&recover::take_over(&image, &memory_dir)?),
    }
    Ok(())
}

fn consent(force: bool) -> Consent {
    if force { Consent::Forced } else { Consent::Ask }
}

fn print(text: &str) {
    // EPIPE is not a failure: the reader has closed the pipe.
    let _ = io::stdout().write_all(text.as_bytes());
}

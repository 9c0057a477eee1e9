//! The `genblk` command.

use std::env;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use genblk::check;
use genblk::cli::{self, Action};
use genblk::client::exporter::{self, TextFormat};
use genblk::client::{self, ControlClient};
use genblk::disk_process;
use genblk::error::{Error, ErrorKind, Result};
use genblk::logging;
use genblk::recover::{self, Consent, Recovery, Report};
use genblk::supervisor::{self, Hosting, Strictness};

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
    // A write beyond RLIMIT_FSIZE must fail instead of ending the process, in every command.
    recover::ignore_file_size_signal();
    match action {
        Action::Print(text) => print(&text),
        Action::ListCaches(directory) => return report(recover::list(&directory)?),
        Action::Prune(directory) => return report(recover::prune(&directory)?),
        Action::Recover { caches, image, force } => {
            return each(caches, |cache| {
                recover::recover(&Recovery { cache, image: image.clone(), consent: consent(force) })
            });
        }
        Action::Discard { caches, force } => return each(caches, |cache| recover::discard(&cache, consent(force))),
        Action::Check { source, config } => print(&check::check(&source, &config)?),
        Action::Serve(config) => return supervisor::run(&config, Strictness::ServeTheOthers, Hosting::Processes),
        Action::ServeAll(config) => return supervisor::run(&config, Strictness::AllOrNone, Hosting::Processes),
        Action::ServeOne(config) => return supervisor::run(&config, Strictness::ServeTheOthers, Hosting::Threads),
        Action::DiskProcess(name) => return serve_for_supervisor(&name),
        Action::List { socket, device, json } => {
            print(&client::list(&mut ControlClient::connect(&socket)?, device, json)?);
        }
        Action::Change { socket, device, change, json } => {
            print(&client::change(&mut ControlClient::connect(&socket)?, &device, &change, json)?);
        }
        Action::Resident { socket, device, json } => {
            print(&client::resident(&mut ControlClient::connect(&socket)?, &device, json)?);
        }
        Action::Warm(socket, options) => {
            let report = |text: &str| eprint!("{text}");
            print(&client::warm(&mut ControlClient::connect(&socket)?, &options, report)?);
        }
        Action::Attach { socket, file, devices, json } => {
            print(&client::attach(&mut ControlClient::connect(&socket)?, &file, &devices, json)?);
        }
        Action::Set { socket, device, settings, json } => {
            print(&client::set(&mut ControlClient::connect(&socket)?, &device, &settings, json)?);
        }
        Action::Reload { socket, dry_run, json } => {
            print(&client::reload(&mut ControlClient::connect(&socket)?, dry_run, json)?);
        }
        Action::Configuration { socket, device, json } => {
            print(&client::config(&mut ControlClient::connect(&socket)?, device.as_deref(), json)?);
        }
        Action::Events(socket, options) => client::events(&mut ControlClient::connect(&socket)?, &options)?,
        Action::Freeze(socket, options) => {
            if let Some(status) = client::freeze(&socket, &options, print)? {
                logging::flush();
                std::process::exit(status.code().unwrap_or(1));
            }
        }
        Action::Stat(socket, options) => return client::stat(&mut ControlClient::connect(&socket)?, &options),
        Action::Top(options) => return client::top(&options),
        Action::PrintMetrics(options) => {
            let (text, asked) = exporter::metrics(&options, TextFormat::Prometheus);
            print(&text);
            // A daemon that cannot be queried is reported as a metric, so the command succeeds.
            if let Err(e) = asked {
                eprintln!("genblk: {e}");
            }
        }
        Action::ServeMetrics(address, options) => return exporter::serve(&address, &options),
        Action::TakeOver(image, memory_dir) => print(&recover::take_over(&image, &memory_dir)?),
    }
    Ok(())
}

/// Body of a device's disk process, which the supervisor has started with one end of their channel as standard input.
fn serve_for_supervisor(name: &str) -> Result<()> {
    let failed = |e| Error::io(ErrorKind::System, "cannot use standard input", e);
    disk_process::main(name, io::stdin().as_fd().try_clone_to_owned().map_err(failed)?)
}

/// Runs a command for each cache file and prints its message. A failure for one file does not stop the others.
fn each(caches: Vec<PathBuf>, command: impl Fn(PathBuf) -> Result<String>) -> Result<()> {
    let mut failed = Ok(());
    for cache in caches {
        match command(cache) {
            Ok(message) => print(&message),
            Err(error) => {
                // The last error ends the process, which prints it.
                if let Err(earlier) = std::mem::replace(&mut failed, Err(error)) {
                    eprintln!("genblk: {earlier}");
                }
            }
        }
    }
    failed
}

/// Prints a command's report and returns its failures as an error.
fn report(report: Report) -> Result<()> {
    print(&report.text);
    report.result()
}

fn consent(force: bool) -> Consent {
    if force { Consent::Forced } else { Consent::Ask }
}

fn print(text: &str) {
    // EPIPE is not a failure: the reader has closed the pipe.
    let _ = io::stdout().write_all(text.as_bytes());
}

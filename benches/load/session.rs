//! A client's time with a server: connected, at work, and gone.

use std::time::{Duration, Instant};

use crate::guest::Guest;
use crate::job::{Job, Outcome};
use crate::load;
use crate::servers::Server;

/// A server takes one client at a time, and may be busy with the end of the last one.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a job on a server's devices, each with a connection of its own and the same number of the job's actors.
///
/// # Errors
/// Why the server could not be used.
pub fn run(server: &Server, devices: &[usize], job: &Job) -> Result<Outcome, String> {
    let of_each = job.actors.len() / devices.len();
    let guests = devices.iter().map(|&device| connect(server, device, job, of_each)).collect::<Result<Vec<_>, _>>()?;
    // The connections last as long as the queues are used.
    let (mut queues, connections): (Vec<_>, Vec<_>) =
        guests.into_iter().map(|guest| (guest.queues, guest.connection)).unzip();
    let mut queues: Vec<_> = queues.drain(..).flatten().collect();
    let cpu_us = server.cpu_us();
    let tallies = load::run(&mut queues, job);
    let server_cpu_us = server.cpu_us() - cpu_us;
    drop(queues);
    drop(connections);
    Ok(Outcome { server_cpu_us, ..Outcome::bare(tallies) })
}

/// Connects with so many queues.
///
/// # Errors
/// Why that did not work.
pub fn connect(server: &Server, device: usize, job: &Job, queues: usize) -> Result<Guest, String> {
    let until = Instant::now() + PATIENCE;
    loop {
        match Guest::connect(&server.socket(device), job, queues) {
            Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            result => return result,
        }
    }
}

//! One session of a client with a server: connect, run a job, disconnect.

use std::time::{Duration, Instant};

use crate::guest::Guest;
use crate::job::{Job, JobStats};
use crate::load;
use crate::servers::Server;

/// Limit for connecting. A server accepts one client at a time, and may still be closing the previous connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Runs a job on several devices of a server. Each device gets its own connection and an equal share of the clients.
///
/// # Errors
/// The connection failed.
pub fn run(server: &Server, devices: &[usize], job: &Job) -> Result<JobStats, String> {
    let per_device = job.clients.len() / devices.len();
    let guests =
        devices.iter().map(|&device| connect(server, device, job, per_device)).collect::<Result<Vec<_>, _>>()?;
    // The connections must outlive their queues.
    let (mut queues, connections): (Vec<_>, Vec<_>) =
        guests.into_iter().map(|guest| (guest.queues, guest.connection)).unzip();
    let mut queues: Vec<_> = queues.drain(..).flatten().collect();
    let cpu_us = server.cpu_us();
    let clients = load::run(&mut queues, job);
    let server_cpu_us = server.cpu_us() - cpu_us;
    drop(queues);
    drop(connections);
    Ok(JobStats { server_cpu_us, ..JobStats::clients_only(clients) })
}

/// Connects with this many queues.
///
/// # Errors
/// The last attempt's, after the timeout.
pub fn connect(server: &Server, device: usize, job: &Job, queues: usize) -> Result<Guest, String> {
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    loop {
        match Guest::connect(&server.socket(device), job, queues) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            result => return result,
        }
    }
}

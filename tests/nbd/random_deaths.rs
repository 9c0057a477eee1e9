//! Deaths of the server, of the disk process and of the daemon in random order, under load: whatever comes after what,
//! the guest finds what it wrote.
//!
//! `GENBLK_EVENTS` sets the number of events.

use std::time::{Duration, Instant};

use super::common::daemon::{Daemon, send};
use super::common::forgetful_nbd::serve_if_requested;
use super::common::nbd_server::NbdServer;
use super::common::prng::{Prng, seed};
use super::guest::{FrontEnd, Guest};
use super::{device, directory_with_image, image_of, socket_of};

/// Sectors that the guest uses.
const SECTORS: u64 = 16_384;
/// The test that runs the server.
const SERVER: &str = "random_deaths::runs_the_nbd_server_if_requested";
const KEYS: &str = "num_queues = 4\nworkers = 2\nrestart_burst = 1000\nnbd_quarantine_ms = 100\n\
                    cache.dirty_age_max_ms = 200";

/// Ends the daemon by a signal. The guest goes on with the next one, which starts after `between`.
fn replace(daemon: &mut Daemon, guest: &mut Guest, signal: i32, between: impl FnOnce()) {
    daemon.signal(signal);
    guest.reconnect(daemon, |daemon| {
        daemon.wait();
        between();
        daemon.restart();
    });
}

/// The server, in a process of its own; without its variables this does nothing.
#[test]
fn runs_the_nbd_server_if_requested() {
    serve_if_requested();
}

#[test]
fn random_kills_of_server_disk_process_and_daemon_lose_no_data() {
    let events = std::env::var("GENBLK_EVENTS").ok().and_then(|text| text.parse().ok()).unwrap_or(10);
    let seed = seed(26);
    let mut prng = Prng::new(seed);
    let directory = directory_with_image("nbd-random");
    let image = image_of(&directory);
    let mut server = NbdServer::start_test_server(&socket_of(&directory), &image, SERVER);
    let mut daemon = Daemon::start_configured(directory, &[&device(&server, KEYS)]);
    let mut guest = Guest::attach(FrontEnd::Qemu, &daemon, SECTORS, seed);
    for event in 0..events {
        guest.run(Instant::now() + Duration::from_micros(prng.below(200_000)));
        let kind = prng.below(5);
        println!("event {event}: {kind}");
        match kind {
            0 => {
                server.kill();
                guest.run(Instant::now() + Duration::from_micros(prng.below(100_000)));
                server.restart();
            }
            1 => {
                send(daemon.disk_process("disk0"), libc::SIGKILL);
                server.restart_if_aborted();
                guest.reconnect(&mut daemon, |_| {});
            }
            2 => replace(&mut daemon, &mut guest, libc::SIGKILL, || server.restart_if_aborted()),
            3 => replace(&mut daemon, &mut guest, libc::SIGUSR1, || server.restart_if_aborted()),
            _ => replace(&mut daemon, &mut guest, libc::SIGKILL, || {
                server.kill();
                server.restart();
            }),
        }
    }
    guest.check_everything();
    guest.flush();
    daemon.stop();
    // What is in the server's write cache was flushed.
    server.kill();
    guest.assert_image(&std::fs::read(&image).unwrap());
    assert!(guest.completed > 0);
}

//! Runs a row. Each round measures every participant once, so that a slow phase of the machine affects all of them.

use std::path::Path;
use std::time::Instant;

use crate::direct::DirectQueue;
use crate::job::{Client, CompletionMode, Job, JobStats, Ops, Pattern};
use crate::load;
use crate::machine;
use crate::medium::{Media, Medium, OpenMedium};
use crate::rows::{Against, LimitKind, Row, warm_up};
use crate::servers::{Server, ServerKind, ServerSpec};
use crate::session;

/// One column of a row: what is measured, and what its numbers are for.
#[derive(Clone, Debug)]
pub struct Participant {
    pub role: Role,
    subject: Subject,
}

/// The role of a participant in the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// genblk with its defaults.
    Genblk,
    /// genblk in another configuration, for comparison.
    Variant,
    /// Another build of genblk.
    Base,
    /// genblk with a cache that does not survive a crash.
    Volatile,
    /// Another project's server; `qemu`: it is qemu-storage-daemon.
    Peer { qemu: bool },
    /// A limit of the row.
    Limit,
}

#[derive(Clone, Debug)]
enum Subject {
    Server(ServerSpec),
    /// genblk with the row's job over this region, which is in its cache.
    Cached(ServerSpec, std::ops::Range<u64>),
    /// io_uring on the device.
    Device(Job),
}

impl Participant {
    pub fn name(&self) -> &str {
        match &self.subject {
            Subject::Server(server) => &server.name,
            Subject::Cached(..) => "genblk, all cached",
            Subject::Device(_) => "device",
        }
    }
}

/// The servers that genblk is compared with in every row.
#[derive(Clone, Debug, Default)]
pub struct Others {
    pub peers: Vec<ServerSpec>,
    pub base: Option<ServerSpec>,
}

/// All participants of a row.
pub fn participants(row: &Row, others: &Others) -> Vec<Participant> {
    let server = |role, server| Participant { role, subject: Subject::Server(server) };
    let mut all = vec![server(Role::Genblk, ServerSpec::genblk())];
    all.extend(others.base.iter().map(|base| server(Role::Base, base.clone())));
    if !matches!(row.medium, Medium::SlowDisk(_)) {
        all.push(server(Role::Variant, ServerSpec::genblk_with("genblk poll_us=0", "poll_us = 0", "")));
    }
    if row.targets.iter().any(|target| target.against == Against::Volatile) {
        let never = ServerSpec::genblk_with("genblk survive=never", "", "survive = \"never\"");
        all.push(server(Role::Volatile, never));
    }
    all.extend(others.peers.iter().map(|peer| {
        let qemu = matches!(peer.kind, ServerKind::Qemu { .. });
        server(Role::Peer { qemu }, peer.clone())
    }));
    all.extend(row.limits.iter().map(|limit| {
        let subject = match limit {
            LimitKind::Copy => Subject::Server(ServerSpec::limit()),
            LimitKind::Device(job) => Subject::Device(job.clone()),
            LimitKind::Cached(region) => Subject::Cached(ServerSpec::genblk(), region.clone()),
        };
        Participant { role: Role::Limit, subject }
    }));
    all
}

/// The samples of a participant: in each round a number for each measure, or the reason why there is none.
#[derive(Clone, Debug)]
pub struct Column {
    pub participant: Participant,
    pub rounds: Vec<Result<Vec<f64>, String>>,
}

/// The samples of a row.
#[derive(Clone, Debug)]
pub struct RowSamples {
    pub row: Row,
    pub columns: Vec<Column>,
    /// The share of CPU time that other processes used before each round.
    pub busy: Vec<f64>,
}

/// Measures a row with the participants that `chosen` accepts.
pub fn measure(
    media: &mut Media,
    row: &Row,
    others: &Others,
    chosen: impl Fn(&Participant) -> bool,
    rounds: usize,
    scale: f64,
) -> RowSamples {
    let begin = Instant::now();
    let row = Row { job: row.job.scaled(scale), ..row.clone() };
    let chosen = participants(&row, others).into_iter().filter(chosen);
    let mut columns: Vec<Column> = chosen.map(|participant| Column { participant, rounds: Vec::new() }).collect();
    let mut busy = Vec::new();
    for round in 0..rounds {
        busy.push(machine::busy_fraction());
        // Rotate the start, so that no participant always follows the same one.
        let count = columns.len();
        for at in 0..count {
            let column = &mut columns[(at + round) % count];
            let numbers = sample(media, &row, &column.participant);
            if let Err(reason) = &numbers {
                eprintln!("  {}: {reason}", column.participant.name());
            }
            column.rounds.push(numbers);
        }
    }
    eprintln!("{}: {rounds} rounds in {:.0?}", row.key, begin.elapsed());
    RowSamples { row, columns, busy }
}

fn sample(media: &mut Media, row: &Row, participant: &Participant) -> Result<Vec<f64>, String> {
    if let Subject::Server(server) = &participant.subject
        && row.job.flushes()
        && !server.honours_flush
    {
        return Err(ignores_flush(server));
    }
    let directory = media.directory().to_path_buf();
    let mut medium = media.open(row.medium).map_err(|e| format!("{:?}: {e}", row.medium))?;
    let (unloaded, stats) = match &participant.subject {
        Subject::Server(server) => serve(server, row.warm_up.as_ref(), row, &directory, &mut medium)?,
        Subject::Cached(server, region) => {
            let mut row = row.clone();
            row.job.clients.iter_mut().for_each(|client| client.region = region.clone());
            let cached = warm_up(row.job.clients[0].ops, region.clone());
            serve(server, Some(&cached), &row, &directory, &mut medium)?
        }
        Subject::Device(job) => {
            let queue = DirectQueue::open(&medium.path, &job.clients[0]).map_err(|e| format!("device: {e}"))?;
            (None, JobStats::clients_only(load::run(&mut [queue], job)))
        }
    };
    Ok(row.measures.iter().map(|measure| measure.of(&stats, unloaded.as_ref())).collect())
}

/// Runs a row on a new server. Returns the result of the first client alone, if the row needs it, and that of the job.
fn serve(
    spec: &ServerSpec,
    warm_up: Option<&Job>,
    row: &Row,
    directory: &Path,
    medium: &mut OpenMedium,
) -> Result<(Option<JobStats>, JobStats), String> {
    let queues = row.job.clients.len();
    let mut server = Server::start(spec, directory, std::slice::from_ref(&medium.path), queues)?;
    if let Some(warm_up) = warm_up {
        run_on(&mut server, warm_up, medium)?;
    }
    let first_client = || Job { clients: row.job.clients[..1].to_vec(), ..row.job.clone() };
    let unloaded = if row.unloaded { Some(run_on(&mut server, &first_client(), medium)?) } else { None };
    let stats = run_on(&mut server, &row.job, medium);
    // Do not wait for write-back to a slow disk.
    medium.lift_throttle();
    let stats = stats?;
    if medium.counts_writes() && !flushes_are_honoured(&row.job, &stats) {
        return Err(ignores_flush(spec));
    }
    Ok((unloaded, stats))
}

/// Finds out which peers honour FLUSH, with a job of writes that ends with one. A peer that cannot be probed is
/// trusted: the rows will fail with the reason.
pub fn probe_flush(media: &mut Media, peers: &mut [ServerSpec]) {
    for peer in peers {
        match honours_flush(media, peer) {
            Ok(honours) => peer.honours_flush = honours,
            Err(reason) => eprintln!("cannot tell whether {} honours FLUSH: {reason}", peer.name),
        }
    }
}

fn honours_flush(media: &mut Media, peer: &ServerSpec) -> Result<bool, String> {
    const BYTES: u64 = 64 << 20;
    let client = Client::new(Ops::Writes, Pattern::Sequential { streams: 1 }, 0..BYTES, 128 << 10);
    let client = client.depth(8).bytes_max(BYTES).runs_ms(0, 10_000);
    let job = Job { ends_with_flush: true, ..Job::of(client, CompletionMode::Interrupt) };
    let directory = media.directory().to_path_buf();
    let medium = media.open(Medium::Disk).map_err(|e| e.to_string())?;
    let mut server = Server::start(peer, &directory, std::slice::from_ref(&medium.path), 1)?;
    Ok(flushes_are_honoured(&job, &run_on(&mut server, &job, &medium)?))
}

fn ignores_flush(spec: &ServerSpec) -> String {
    format!("{}: its FLUSH completes before the data is on the device", spec.name)
}

/// Whether the device saw the data that completed FLUSHes cover: nearly all bytes for a job that ends with a FLUSH, and
/// at least one write for each FLUSH between writes. Half is enough, because blocks are overwritten.
fn flushes_are_honoured(job: &Job, stats: &JobStats) -> bool {
    let (operations, bytes) = stats.device_writes;
    let written: u64 = stats.clients.iter().map(|client| client.bytes).sum();
    let between: u64 = job
        .clients
        .iter()
        .zip(&stats.clients)
        .filter_map(|(client, stats)| client.flush_after_writes.map(|_| stats.flushes.len()))
        .sum();
    (!job.ends_with_flush || bytes * 2 >= written) && operations * 2 >= between
}

/// Runs a job on a new connection, and counts the writes to the device.
fn run_on(server: &mut Server, job: &Job, medium: &OpenMedium) -> Result<JobStats, String> {
    server.restart_if_exited()?;
    server.wait_until_idle();
    let before = medium.writes();
    let stats = session::run(server, &[0], job)?;
    let after = medium.writes();
    Ok(JobStats { device_writes: (after.0 - before.0, after.1 - before.1), ..stats })
}

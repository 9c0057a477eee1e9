//! The rounds: every contestant of a row, one after the other, over and over, so that a change of the machine's mood meets
//! all of them alike.

use std::path::Path;
use std::time::Instant;

use crate::direct::DirectQueue;
use crate::job::{Job, Outcome};
use crate::load;
use crate::machine;
use crate::medium::{Media, Medium, Opened};
use crate::rows::{Against, Bound, Row, warming};
use crate::servers::{Contestant, Kind, Server};
use crate::session;

/// Who is measured, and what for.
#[derive(Clone, Debug)]
pub struct Entrant {
    pub role: Role,
    who: Who,
}

/// What an entrant's numbers are good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// genblk as it comes.
    Genblk,
    /// genblk in another configuration, for comparison.
    Variant,
    /// genblk with a cache that goes with it.
    Volatile,
    /// A server of somebody else's; whether it is qemu-storage-daemon.
    Peer { qemu: bool },
    /// What bounds the row.
    Bound,
}

#[derive(Clone, Debug)]
enum Who {
    Server(Contestant),
    /// genblk with the row's job over this part of the image, which it has cached.
    Cached(Contestant, std::ops::Range<u64>),
    Device(Job),
}

impl Entrant {
    pub fn name(&self) -> &str {
        match &self.who {
            Who::Server(server) => &server.name,
            Who::Cached(..) => "genblk, all cached",
            Who::Device(_) => "device",
        }
    }
}

/// Everybody who takes part in a row.
pub fn entrants(row: &Row, peers: &[Contestant]) -> Vec<Entrant> {
    let server = |role, server| Entrant { role, who: Who::Server(server) };
    let mut all = vec![server(Role::Genblk, Contestant::genblk())];
    if !matches!(row.medium, Medium::SlowDisk(_)) {
        all.push(server(Role::Variant, Contestant::genblk_with("genblk poll_us=0", "poll_us = 0", "")));
    }
    if row.targets.iter().any(|target| target.against == Against::Volatile) {
        let never = Contestant::genblk_with("genblk survive=never", "", "survive = \"never\"");
        all.push(server(Role::Volatile, never));
    }
    all.extend(peers.iter().map(|peer| {
        let qemu = matches!(peer.kind, Kind::Qemu { .. });
        server(Role::Peer { qemu }, peer.clone())
    }));
    all.extend(row.bounds.iter().map(|bound| {
        let who = match bound {
            Bound::Copy => Who::Server(Contestant::limit()),
            Bound::Device(job) => Who::Device(job.clone()),
            Bound::Cached(region) => Who::Cached(Contestant::genblk(), region.clone()),
        };
        Entrant { role: Role::Bound, who }
    }));
    all
}

/// An entrant's numbers: for each round one for each measure, or why there is none.
#[derive(Clone, Debug)]
pub struct Column {
    pub entrant: Entrant,
    pub rounds: Vec<Result<Vec<f64>, String>>,
}

/// All numbers of a row.
#[derive(Clone, Debug)]
pub struct Measured {
    pub row: Row,
    pub columns: Vec<Column>,
    /// What others took of the processors before each round, in parts of all.
    pub busy: Vec<f64>,
}

/// Measures a row; `chosen` says for each entrant whether it takes part.
pub fn measure(
    media: &mut Media,
    row: &Row,
    peers: &[Contestant],
    chosen: impl Fn(&Entrant) -> bool,
    rounds: usize,
    scale: f64,
) -> Measured {
    let begin = Instant::now();
    let row = Row { job: row.job.scaled(scale), ..row.clone() };
    let entrants = entrants(&row, peers).into_iter().filter(chosen);
    let mut columns: Vec<Column> = entrants.map(|entrant| Column { entrant, rounds: Vec::new() }).collect();
    let mut busy = Vec::new();
    for round in 0..rounds {
        busy.push(machine::busy());
        // Each round begins with another, so that nobody always comes after the same one.
        let count = columns.len();
        for at in 0..count {
            let column = &mut columns[(at + round) % count];
            let numbers = sample(media, &row, &column.entrant);
            if let Err(reason) = &numbers {
                eprintln!("  {}: {reason}", column.entrant.name());
            }
            column.rounds.push(numbers);
        }
    }
    eprintln!("{}: {rounds} rounds in {:.0?}", row.name, begin.elapsed());
    Measured { row, columns, busy }
}

fn sample(media: &mut Media, row: &Row, entrant: &Entrant) -> Result<Vec<f64>, String> {
    let folder = media.folder().to_path_buf();
    let mut medium = media.open(row.medium).map_err(|e| format!("{:?}: {e}", row.medium))?;
    let (idle, outcome) = match &entrant.who {
        Who::Server(server) => serve(server, row.warm.as_ref(), row, &folder, &mut medium)?,
        Who::Cached(server, region) => {
            let mut row = row.clone();
            row.job.actors.iter_mut().for_each(|actor| actor.region = region.clone());
            let warm = warming(row.job.actors[0].does, region.clone());
            serve(server, Some(&warm), &row, &folder, &mut medium)?
        }
        Who::Device(job) => {
            let queue = DirectQueue::open(&medium.path, &job.actors[0]).map_err(|e| format!("device: {e}"))?;
            (None, Outcome::bare(load::run(&mut [queue], job)))
        }
    };
    Ok(row.measures.iter().map(|measure| measure.of(&outcome, idle.as_ref())).collect())
}

/// Runs a row against a server of its own; the outcome of the first actor alone comes first, if the row asks for it.
fn serve(
    who: &Contestant,
    warm: Option<&Job>,
    row: &Row,
    folder: &Path,
    medium: &mut Opened,
) -> Result<(Option<Outcome>, Outcome), String> {
    let queues = row.job.actors.len();
    let mut server = Server::start(who, folder, std::slice::from_ref(&medium.path), queues)?;
    if let Some(warm) = warm {
        run_on(&mut server, warm, medium)?;
    }
    let alone = || Job { actors: row.job.actors[..1].to_vec(), ..row.job.clone() };
    let idle = if row.idle { Some(run_on(&mut server, &alone(), medium)?) } else { None };
    let outcome = run_on(&mut server, &row.job, medium);
    // What is still on its way to a slow disk need not be waited for.
    medium.unleash();
    let outcome = outcome?;
    if medium.counts_writes() && !flushes_are_kept(&row.job, &outcome) {
        return Err(format!("{}: its FLUSH completes without the data being on the device", who.name));
    }
    Ok((idle, outcome))
}

/// Whether the device saw what FLUSHes that completed speak of: nearly all bytes at the end of a job of writes that ends with
/// one, and a write at least for each between writes. (Half, because blocks are written over.) Who does not keep them is
/// fast, and no peer.
fn flushes_are_kept(job: &Job, outcome: &Outcome) -> bool {
    let (operations, bytes) = outcome.device_writes;
    let written: u64 = outcome.tallies.iter().map(|tally| tally.bytes).sum();
    let between: u64 = job
        .actors
        .iter()
        .zip(&outcome.tallies)
        .filter_map(|(actor, tally)| actor.flush_after_writes.map(|_| tally.flushes.len()))
        .sum();
    (!job.ends_with_flush || bytes * 2 >= written) && operations * 2 >= between
}

/// Runs a job on a connection of its own, and looks at the device too.
fn run_on(server: &mut Server, job: &Job, medium: &Opened) -> Result<Outcome, String> {
    server.revive()?;
    server.settle();
    let before = medium.writes();
    let outcome = session::run(server, &[0], job)?;
    let after = medium.writes();
    Ok(Outcome { device_writes: (after.0 - before.0, after.1 - before.1), ..outcome })
}

//! Random schedules of the client against a model of a server: connections that are cut while the server keeps running
//! and executes the requests that it had received, servers that are stopped, servers that are killed and lose data (all
//! or one of several at one address), replies in pieces. Each run follows from a seed.
//!
//! The model of the cache observes its contract: it writes a block again only when the last write of it has completed,
//! it treats everything that it had submitted before a reported loss as lost, and it reads only durable blocks. The
//! simulation checks two guarantees: data that a successful Sync covers is durable, and no block ever returns to an
//! older version.

#![allow(clippy::cast_possible_truncation, reason = "sizes and indices here are small")]

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::time::Duration;

use super::client::{Client, SharedLists};
use super::memory;
use super::slot::Violation;
use super::wire::{Export, REQUEST_BYTES, REQUEST_MAGIC, be16, be32, be64, chunk, command, export_flag};
use crate::fault_injection::{PlantedBug, run_with};
use crate::prng::Prng;
use crate::store::{Event, IoRequest, Segment};
use crate::units::{Fault, OpKind, Unmap, Urgency};

const BLOCKS: usize = 8;
const BLOCK: usize = 512;
const STEPS: usize = 3000;
const SEEDS: u64 = 1000;
const QUARANTINE: Duration = Duration::from_millis(100);

/// A request that the server has received.
#[derive(Clone, Debug)]
struct Received {
    command: u16,
    cookie: u64,
    blocks: Range<usize>,
    /// For a write: the versions.
    versions: Vec<u64>,
}

/// The server's end of a connection, and the bytes in transit.
#[derive(Debug, Default)]
struct Wire {
    is_up: bool,
    /// Its server was killed, which its client has not noticed.
    is_dead: bool,
    /// The server is stopped until then.
    back_at: Duration,
    to_server: Vec<u8>,
    to_client: VecDeque<u8>,
    received: Vec<Received>,
}

/// A server with a volatile cache.
#[derive(Debug, Default)]
struct Server {
    current: [u64; BLOCKS],
    durable: [u64; BLOCKS],
    /// The client whose process holds the newest version of each block, until it is durable.
    holder: [usize; BLOCKS],
    zombies: Vec<Zombie>,
}

/// A request of a connection that was cut.
#[derive(Clone, Debug)]
struct Zombie {
    request: Received,
    /// Number of the connection's client.
    client: usize,
    /// The end of the time in which it can be executed; `None` until the server has answered that client again: it may
    /// be stopped.
    until: Option<Duration>,
}

impl Zombie {
    fn can_execute(&self, now: Duration) -> bool {
        self.until.is_none_or(|until| now < until)
    }
}

/// The state of a block in the model of the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Block {
    version: u64,
    /// The newest version is to be written.
    is_dirty: bool,
    is_busy: bool,
    is_unsynced: bool,
}

#[derive(Debug)]
struct Op {
    kind: OpKind,
    block: usize,
    version: u64,
    /// See the cache's own field of this name.
    doubts: u32,
    memory: Box<[u8]>,
    /// For a Sync: the blocks and versions that it covers.
    covers: Vec<(usize, u64)>,
}

struct World {
    prng: Prng,
    now: Duration,
    server: Server,
    clients: Vec<Client>,
    wires: Vec<Wire>,
    breaks: u64,
    shared: SharedLists,
    blocks: [Block; BLOCKS],
    versions: u64,
    doubts: u32,
    tags: u64,
    ops: HashMap<u64, Op>,
    is_syncing: bool,
    losses: u32,
}

fn export() -> Export {
    Export {
        size_bytes: (BLOCKS * BLOCK) as u64,
        flags: export_flag::SEND_FLUSH | export_flag::SEND_WRITE_ZEROES | export_flag::CAN_MULTI_CONN,
        block_min: 1,
        block_preferred: 512,
        block_max: 4096,
        is_structured: true,
        allocation: None,
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut prng = Prng::new(seed);
        let shared = SharedLists::default();
        let queues = prng.pick(&[1, 1, 2]);
        let mut world = Self {
            clients: (0..queues).map(|_| Client::new(export(), &shared, None)).collect(),
            wires: (0..queues).map(|_| Wire { is_up: true, ..Wire::default() }).collect(),
            prng,
            now: Duration::from_secs(1),
            server: Server::default(),
            breaks: 0,
            shared,
            blocks: [Block::default(); BLOCKS],
            versions: 0,
            doubts: 0,
            tags: 0,
            ops: HashMap::new(),
            is_syncing: false,
            losses: 0,
        };
        world.clients.iter_mut().for_each(|client| client.connected(&export(), false, world.now));
        world
    }

    fn submit(&mut self, kind: OpKind, block: usize, version: u64) {
        self.tags += 1;
        let mut memory = vec![0; BLOCK].into_boxed_slice();
        if kind == OpKind::Write {
            memory[..8].copy_from_slice(&version.to_be_bytes());
        } else {
            memory[..8].copy_from_slice(&u64::MAX.to_be_bytes());
        }
        let segments = match kind {
            OpKind::Read | OpKind::Write => {
                let (first, second) = memory.split_at_mut(100);
                [first, second].map(|part| Segment { base: part.as_mut_ptr(), len: part.len() }).to_vec()
            }
            _ => Vec::new(),
        };
        let (offset, len) = if kind == OpKind::Sync { (0, 0) } else { ((block * BLOCK) as u64, BLOCK as u64) };
        let unsynced =
            |(at, block): (usize, &Block)| (block.is_unsynced && !block.is_busy).then_some((at, block.version));
        let covers = match kind {
            // A dirty block has a newer version than the one that is covered.
            OpKind::Sync => self.blocks.iter().enumerate().filter(|(_, b)| !b.is_dirty).filter_map(unsynced).collect(),
            _ => Vec::new(),
        };
        self.ops.insert(self.tags, Op { kind, block, version, doubts: self.doubts, memory, covers });
        let request = IoRequest { tag: self.tags, op: kind, offset, len, urgency: Urgency::Demand, segments };
        let client = self.prng.below(self.clients.len() as u64) as usize;
        self.clients[client].submit(request, self.now);
    }

    /// Lets the model of the cache do one step.
    fn act(&mut self, may_write: bool) {
        let at = self.prng.below(BLOCKS as u64) as usize;
        let block = self.blocks[at];
        match self.prng.below(6) {
            0 | 1 if may_write && !block.is_busy => {
                self.versions += 1;
                self.blocks[at] = Block { version: self.versions, is_dirty: true, ..block };
            }
            2 | 3 if block.is_dirty && !block.is_busy => {
                self.blocks[at] = Block { is_dirty: false, is_busy: true, ..block };
                self.submit(OpKind::Write, at, block.version);
            }
            // The version of zeros is 0.
            4 if may_write && !block.is_busy && self.prng.percent(30) => {
                self.blocks[at] = Block { version: 0, is_dirty: false, is_busy: true, ..block };
                self.submit(OpKind::Zero { unmap: Unmap::Allowed }, at, 0);
            }
            4 if !block.is_busy && !block.is_dirty && !block.is_unsynced => {
                self.blocks[at].is_busy = true;
                self.submit(OpKind::Read, at, block.version);
            }
            5 if !self.is_syncing => {
                self.is_syncing = true;
                self.submit(OpKind::Sync, 0, 0);
            }
            _ => {}
        }
    }

    fn completed(&mut self, event: &Event) {
        let (tag, fault) = match event {
            Event::Done { tag } | Event::Mapped { tag, .. } => (*tag, None),
            Event::Failed { tag, fault, .. } => (*tag, Some(*fault)),
        };
        let op = self.ops.remove(&tag).expect("an event belongs to an operation");
        let block = &mut self.blocks[op.block];
        match op.kind {
            OpKind::Sync => {
                self.is_syncing = false;
                match fault {
                    None => {
                        for (at, version) in op.covers {
                            let block = &mut self.blocks[at];
                            // Unless a newer version is being written.
                            if block.version == version && !block.is_dirty && !block.is_busy && block.is_unsynced {
                                let durable = self.server.durable[at];
                                assert_eq!(durable, version, "block {at} is not durable after a Sync");
                                block.is_unsynced = false;
                            }
                        }
                    }
                    Some(Fault::Lost) => {
                        self.losses += 1;
                        self.doubts += 1;
                        for block in self.blocks.iter_mut().filter(|block| block.is_unsynced && !block.is_busy) {
                            (block.is_dirty, block.is_unsynced) = (true, false);
                        }
                    }
                    Some(fault) => panic!("a Sync failed: {fault}"),
                }
            }
            OpKind::Read => {
                assert_eq!(fault, None);
                assert_eq!(be64(&op.memory, 0), op.version, "block {} reads as another version", op.block);
                block.is_busy = false;
            }
            _ => {
                assert_eq!(fault, None);
                (block.is_busy, block.is_unsynced) = (false, true);
                if op.doubts != self.doubts {
                    (block.is_dirty, block.is_unsynced) = (true, false);
                }
            }
        }
    }

    /// Moves bytes between a client and its server.
    fn exchange(&mut self, at: usize) {
        if self.clients[at].is_obsolete() || self.wires[at].is_dead && self.prng.percent(3) {
            return self.cut(at);
        }
        let (client, wire) = (&mut self.clients[at], &mut self.wires[at]);
        if !wire.is_up || wire.is_dead {
            return;
        }
        let mut pieces = Vec::new();
        client.output(&mut pieces);
        let total: usize = pieces.iter().map(|piece| piece.len).sum();
        let count = if self.prng.percent(50) { total } else { self.prng.below(total as u64 + 1) as usize };
        wire.to_server.extend(memory::copy_out(&pieces, 0, count as u64));
        client.sent(count);
        wire.parse();
        let count = self.prng.below(wire.to_client.len() as u64 + 1) as usize;
        let bytes: Vec<u8> = wire.to_client.iter().copied().take(count).collect();
        let mut taken = 0;
        while taken < bytes.len() {
            match client.receive(&bytes[taken..], self.now) {
                Ok(0) => break,
                Ok(count) => taken += count,
                Err(Violation(why)) => panic!("the client rejects a correct server: {why}"),
            }
        }
        wire.to_client.drain(..taken);
        let mut events = Vec::new();
        client.take_events(&mut events);
        events.iter().for_each(|event| self.completed(event));
    }

    /// The server executes one request of a connection, in any order, and replies.
    fn execute(&mut self, at: usize) {
        let wire = &mut self.wires[at];
        if wire.received.is_empty() {
            return;
        }
        let index = self.prng.below(wire.received.len() as u64) as usize;
        let request = wire.received.swap_remove(index);
        self.server.execute(&request, at);
        match request.command {
            command::READ => {
                let mut bytes = vec![0; BLOCK];
                bytes[..8].copy_from_slice(&self.server.current[request.blocks.start].to_be_bytes());
                let cut = self.prng.between(1, BLOCK as u64 - 1) as usize;
                let offset = (request.blocks.start * BLOCK) as u64;
                let parts = [0..cut, cut..BLOCK];
                let order = if self.prng.percent(50) { [0, 1] } else { [1, 0] };
                for part in order.map(|n| parts[n].clone()) {
                    let data = [&(offset + part.start as u64).to_be_bytes()[..], &bytes[part]].concat();
                    wire.reply(0, chunk::OFFSET_DATA, request.cookie, &data);
                }
                wire.reply(chunk::DONE, chunk::NONE, request.cookie, &[]);
            }
            _ if self.prng.percent(50) => wire.reply(chunk::DONE, chunk::NONE, request.cookie, &[]),
            _ => {
                let magic = super::wire::SIMPLE_REPLY_MAGIC.to_be_bytes();
                wire.to_client.extend(magic.into_iter().chain([0; 4]).chain(request.cookie.to_be_bytes()));
            }
        }
    }

    /// The connection is cut; the server keeps running.
    fn cut(&mut self, at: usize) {
        // The server may be stopped for longer than a quarantine.
        let back_at = self.now + self.prng.pick(&[Duration::ZERO, Duration::ZERO, QUARANTINE * 3]);
        let wire = std::mem::replace(&mut self.wires[at], Wire { back_at, ..Wire::default() });
        let zombie = |request| Zombie { request, client: at, until: None };
        self.server.zombies.extend(wire.received.into_iter().map(zombie));
        self.breaks += 1;
        self.clients[at].disconnected(self.breaks, QUARANTINE, self.now);
    }

    /// The server is killed, loses some of the data that was not durable, and its connections break.
    fn kill(&mut self) {
        self.server.zombies.clear();
        for at in 0..BLOCKS {
            if self.prng.percent(50) {
                self.server.durable[at] = self.server.current[at];
            }
        }
        self.server.current = self.server.durable;
        for at in 0..self.wires.len() {
            if self.wires[at].is_up {
                self.wires[at].received.clear();
                // A network that fails at the same time hides its end.
                if self.prng.percent(30) {
                    self.wires[at].is_dead = true;
                    continue;
                }
                self.cut(at);
                self.shared.suspects.release(self.breaks);
                self.clients[at].retry_held(self.now);
            }
        }
    }

    /// The process that serves one client is killed. Another one answers at its address.
    fn kill_one(&mut self, at: usize) {
        self.server.zombies.retain(|zombie| zombie.client != at);
        for block in (0..BLOCKS).filter(|block| self.server.holder[*block] == at) {
            if self.prng.percent(50) {
                self.server.current[block] = self.server.durable[block];
            }
        }
        self.wires[at].received.clear();
        self.cut(at);
        self.shared.suspects.release(self.breaks);
        self.clients[at].retry_held(self.now);
    }

    fn step(&mut self, faults: bool) {
        let at = self.prng.below(self.wires.len() as u64) as usize;
        match self.prng.below(100) {
            0 if faults && self.wires[at].is_up => self.cut(at),
            1 if faults && self.prng.percent(30) => self.kill(),
            1 if faults && self.wires[at].is_up && !self.wires[at].is_dead && self.prng.percent(30) => {
                self.kill_one(at);
            }
            2..10 if !self.wires[at].is_up && self.now >= self.wires[at].back_at => {
                self.wires[at].is_up = true;
                for zombie in self.server.zombies.iter_mut().filter(|zombie| zombie.client == at) {
                    zombie.until.get_or_insert(self.now + QUARANTINE);
                }
                self.clients[at].connected(&export(), true, self.now);
            }
            10..16 if !self.server.zombies.is_empty() => {
                let index = self.prng.below(self.server.zombies.len() as u64) as usize;
                // A server that is stopped does nothing.
                if self.now >= self.wires[self.server.zombies[index].client].back_at {
                    let zombie = self.server.zombies.swap_remove(index);
                    if zombie.can_execute(self.now) {
                        self.server.execute(&zombie.request, zombie.client);
                    }
                }
            }
            16..30 => {
                self.now += Duration::from_micros(self.prng.below(8000));
                self.server.zombies.retain(|zombie| zombie.can_execute(self.now));
                self.clients.iter_mut().for_each(|client| client.advance(self.now));
            }
            30..50 => self.exchange(at),
            50..75 => self.execute(at),
            _ => self.act(faults),
        }
    }

    fn run(mut self) -> u32 {
        for _ in 0..STEPS {
            self.step(true);
        }
        let is_settled = |world: &Self| {
            world.ops.is_empty() && world.blocks.iter().all(|block| !block.is_dirty && !block.is_unsynced)
        };
        for _ in 0..200_000 {
            if is_settled(&self) {
                break;
            }
            self.step(false);
        }
        assert!(is_settled(&self), "an operation never completes: {:?} {:?}", self.ops, self.clients);
        for zombie in std::mem::take(&mut self.server.zombies) {
            self.server.execute(&zombie.request, zombie.client);
        }
        for (at, block) in self.blocks.iter().enumerate() {
            assert_eq!(self.server.current[at], block.version, "block {at} has another version in the end");
        }
        self.losses
    }
}

impl Server {
    fn execute(&mut self, request: &Received, client: usize) {
        self.holder[request.blocks.clone()].fill(client);
        match request.command {
            command::WRITE => self.current[request.blocks.clone()].copy_from_slice(&request.versions),
            command::WRITE_ZEROES => self.current[request.blocks.clone()].fill(0),
            command::FLUSH => self.durable = self.current,
            _ => {}
        }
    }
}

impl Wire {
    /// Takes whole requests from the wire.
    fn parse(&mut self) {
        while self.to_server.len() >= REQUEST_BYTES {
            assert_eq!(be32(&self.to_server, 0), REQUEST_MAGIC);
            let (command, len) = (be16(&self.to_server, 6), be32(&self.to_server, 24) as usize);
            let payload = if command == command::WRITE { len } else { 0 };
            if self.to_server.len() < REQUEST_BYTES + payload {
                return;
            }
            let start = be64(&self.to_server, 16) as usize / BLOCK;
            let blocks = start..start + len / BLOCK;
            let versions = self.to_server[REQUEST_BYTES..REQUEST_BYTES + payload].chunks(BLOCK);
            let versions = versions.map(|block| be64(block, 0)).collect();
            self.received.push(Received { command, cookie: be64(&self.to_server, 8), blocks, versions });
            self.to_server.drain(..REQUEST_BYTES + payload);
        }
    }

    fn reply(&mut self, flags: u16, kind: u16, cookie: u64, data: &[u8]) {
        let len = u32::try_from(data.len()).expect("a short chunk");
        self.to_client.extend(super::wire::STRUCTURED_REPLY_MAGIC.to_be_bytes());
        self.to_client.extend(flags.to_be_bytes());
        self.to_client.extend(kind.to_be_bytes());
        self.to_client.extend(cookie.to_be_bytes());
        self.to_client.extend(len.to_be_bytes());
        self.to_client.extend(data);
    }
}

fn run(seed: u64, bug: Option<PlantedBug>) -> std::thread::Result<u32> {
    run_with(bug, || World::new(seed).run())
}

#[test]
fn no_schedule_of_cuts_kills_and_zombie_writes_loses_or_revives_data() {
    let mut losses = 0;
    for seed in 0..SEEDS {
        losses += run(seed, None).unwrap_or_else(|_| panic!("seed {seed} of the NBD simulation failed"));
    }
    assert!(losses > 100, "only {losses} losses were reported in {SEEDS} worlds");
}

#[test]
fn the_nbd_simulation_finds_every_planted_bug() {
    for bug in [PlantedBug::SuspectsNotHeld, PlantedBug::RestartNotReported] {
        let seed = (0..SEEDS).find(|seed| run(*seed, Some(bug)).is_err());
        println!("seed {seed:?} finds {bug:?}");
        assert!(seed.is_some(), "no seed finds {bug:?}");
    }
}

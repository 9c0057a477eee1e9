//! The operator reads pages into the cache, and lists those that are in memory, at any time.

use std::sync::mpsc::{Receiver, TryRecvError};

use super::World;
use crate::cache::WarmStep;
use crate::device::WorkerCommand;
use crate::prng::Prng;
use crate::units::{PageNo, PageSpan, SECTORS_PER_PAGE};

/// Of 1000 steps, the number in which the operator does something.
const PER_MILLE: u64 = 5;

/// A command whose reply has not arrived.
#[derive(Debug)]
enum Awaited {
    Warmed(PageSpan, Receiver<(PageNo, WarmStep)>),
    Listed(Receiver<(Vec<PageNo>, Option<u32>)>),
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Warming {
    prng: Prng,
    awaited: Vec<Awaited>,
}

impl Warming {
    /// An operator, in a third of the worlds.
    pub fn new(seed: u64) -> Option<Self> {
        (seed % 3 == 2).then(|| Self { prng: Prng::new(seed ^ 0x7761_726d), awaited: Vec::new() })
    }
}

impl Awaited {
    /// Checks the reply, if it has arrived. Returns whether it is still awaited: not after the death of the daemon.
    fn check(&self, image_pages: u64) -> bool {
        let state = match self {
            Self::Warmed(span, reply) => reply.try_recv().map(|(next, _)| {
                assert!(span.first <= next && next <= span.end(), "{span:?} is warmed up to {next:?}");
            }),
            Self::Listed(reply) => reply.try_recv().map(|(pages, _)| {
                assert!(pages.iter().all(|page| page.0 < image_pages), "{pages:?} of {image_pages} pages");
            }),
        };
        state == Err(TryRecvError::Empty)
    }
}

impl World {
    /// Occasionally the operator sends a command; checks the replies to earlier ones.
    pub fn warm_or_list(&mut self) {
        let image_pages = self.image.values().len() as u64;
        let (Some(Warming { prng, awaited }), Some(life)) = (&mut self.warming, &self.life) else { return };
        awaited.retain(|command| command.check(image_pages.div_ceil(SECTORS_PER_PAGE)));
        if prng.below(1000) >= PER_MILLE {
            return;
        }
        let worker = life.workers.worker_for(prng.below(4) as u16);
        awaited.push(if prng.percent(70) {
            // Also past the end of the image.
            let span = PageSpan::new(PageNo(prng.below(140)), prng.between(1, 60));
            Awaited::Warmed(span, worker.request(|reply| WorkerCommand::Warm(span, reply)))
        } else {
            let from = prng.below(130) as u32;
            Awaited::Listed(worker.request(|reply| WorkerCommand::Resident(from, reply)))
        });
    }
}

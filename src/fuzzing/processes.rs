//! What a disk process that is taken over can send to the supervisor: messages, and its page of statistics.

use super::input::Input;
use crate::counters::snapshot::Snapshot;
use crate::counters::{BLOCK_WORDS, Class};
use crate::disk_protocol::{FromDisk, ToDisk, decode, encode};
use crate::disk_stats::{StatsPage, WORDS};

/// A message is refused, or means the same when it is sent again. A page of statistics can be read and described.
///
/// Input: which of them; then the bytes of a message, or pairs of an index and a word.
pub(super) fn disk_protocol(input: &[u8]) {
    let mut input = Input::new(input);
    match input.below(3) {
        0 => {
            if let Ok(message) = decode::<FromDisk>(input.rest()) {
                let bytes = encode(&message).expect("it can be sent");
                assert_eq!(decode::<FromDisk>(&bytes).expect("it can be received"), message);
            }
        }
        1 => {
            if let Ok(message) = decode::<ToDisk>(input.rest()) {
                let bytes = encode(&message).expect("it can be sent");
                assert_eq!(decode::<ToDisk>(&bytes).expect("it can be received"), message);
            }
        }
        _ => {
            let (page, _file) = StatsPage::create(1).expect("memory");
            while !input.is_empty() {
                let at = usize::from(input.u16());
                page.overwrite(at % (WORDS + BLOCK_WORDS), input.u64());
            }
            let state = page.read();
            if let Some(oldest) = state.oldest {
                assert!(!oldest.describe().is_empty());
            }
            let _ = (page.silent_for(), page.take_truncated_memory());
            let snapshot = Snapshot::read(&page.counters());
            for class in Class::ALL {
                let latencies = snapshot.requests(class);
                let quantile = latencies.quantile(999);
                assert!(quantile.is_none_or(|quantile| quantile <= latencies.max_ns), "{class:?}");
                let _ = (latencies.mean_ns(), snapshot.in_flight(class.operation));
            }
        }
    }
}

//! Tests of the queue: everything that is visible to the guest equals the results of virtio-queue; and the queue's
//! bounds.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::*;
use crate::prng::Prng;
use crate::virtio::testing::{END, HOLE, SEAM, ram};

const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x8000;
const USED: u64 = 0x9000;
/// More than the length of either ring of a queue of 64.
const RING_BYTES: usize = 6 + 64 * 8;

fn layout(size: u16, event_idx: bool) -> QueueLayout {
    QueueLayout { size, desc_table: TABLE, avail_ring: AVAIL, used_ring: USED, event_idx }
}

fn oracle(layout: &QueueLayout, position: QueuePosition) -> Queue {
    let mut queue = Queue::new(1024).unwrap();
    queue.set_size(layout.size);
    queue.try_set_desc_table_address(GuestAddress(layout.desc_table)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(layout.avail_ring)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(layout.used_ring)).unwrap();
    queue.set_next_avail(position.next_avail);
    queue.set_next_used(position.next_used);
    queue.set_event_idx(layout.event_idx);
    queue.set_ready(true);
    queue
}

fn ring_bytes(mem: &GuestMemoryMmap, at: u64) -> [u8; RING_BYTES] {
    let mut bytes = [0; RING_BYTES];
    mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

/// Whether the driver requests an interrupt for the elements that virtio-queue pushed onto the used ring since the last
/// call.
fn oracle_wants_interrupt(queue: &mut Queue, mem: &GuestMemoryMmap) -> bool {
    if queue.event_idx_enabled() {
        return queue.needs_notification(mem).unwrap();
    }
    mem.load::<u16>(GuestAddress(AVAIL), Ordering::Relaxed).unwrap() & 1 == 0
}

/// Two drivers that perform the same steps, one served by this queue and one by virtio-queue, see the same rings and
/// get the same interrupts.
fn take(queue: &mut SplitQueue, max: usize, heads: &mut Vec<u16>) -> Result<(), Overrun> {
    let before = heads.len();
    queue.peek(max, heads)?;
    queue.advance(u16::try_from(heads.len() - before).unwrap());
    Ok(())
}

#[test]
fn the_split_queue_agrees_with_virtio_queue_on_any_driver_input() {
    let (mut wanted_count, mut unwanted_count) = (0, 0);
    for seed in 0..2000 {
        let mut prng = Prng::new(seed);
        let layout = layout(prng.pick(&[1, 2, 8, 64]), prng.below(2) == 1);
        let start = prng.pick(&[0, 5, u16::MAX, u16::MAX - 3]);
        let position = QueuePosition { next_avail: start, next_used: start };
        let (ours, theirs) = (Arc::new(ram()), ram());
        let theirs: &GuestMemoryMmap = &theirs;
        let mut queue = SplitQueue::new(&ours, layout, position).unwrap();
        let mut oracle = oracle(&layout, position);
        let (mut avail_idx, mut out) = (start, Vec::new());
        let put = |at: u64, value: u16| {
            ours.store(value, GuestAddress(at), Ordering::Relaxed).unwrap();
            theirs.store(value, GuestAddress(at), Ordering::Relaxed).unwrap();
        };
        put(AVAIL + 2, start);
        for _ in 0..100 {
            let waiting = avail_idx.wrapping_sub(queue.position().next_avail);
            match prng.below(5) {
                0 if usize::from(waiting) + out.len() < usize::from(layout.size) => {
                    let entry = u64::from(avail_idx % layout.size);
                    put(AVAIL + 4 + entry * 2, u16::try_from(prng.below(u64::from(layout.size))).unwrap());
                    avail_idx = avail_idx.wrapping_add(1);
                    put(AVAIL + 2, avail_idx);
                }
                0 => put(AVAIL + 4 + u64::from(layout.size) * 2, u16::try_from(prng.below(0x1_0000)).unwrap()),
                1 => put(AVAIL, u16::try_from(prng.below(2)).unwrap()),
                2 => {
                    let (max, mut heads) = (usize::try_from(prng.below(9)).unwrap(), Vec::new());
                    take(&mut queue, max, &mut heads).unwrap();
                    let chains = oracle.iter(theirs).unwrap().take(max).map(|chain| chain.head_index());
                    assert!(chains.eq(heads.iter().copied()), "seed {seed}");
                    out.extend(heads);
                }
                3 if !out.is_empty() => {
                    for _ in 0..=prng.below(out.len() as u64) {
                        let Some(head) = out.pop() else { break };
                        let len = u32::try_from(prng.below(1 << 32)).unwrap();
                        queue.push_used(head, len);
                        oracle.add_used(theirs, head, len).unwrap();
                    }
                    let wanted = queue.publish();
                    assert_eq!(wanted, oracle_wants_interrupt(&mut oracle, theirs), "seed {seed}");
                    *if wanted { &mut wanted_count } else { &mut unwanted_count } += 1;
                }
                3 => {
                    queue.disable_notification();
                    oracle.disable_notification(theirs).unwrap();
                }
                _ => {
                    let expected = oracle.enable_notification(theirs).unwrap();
                    assert_eq!(queue.enable_notification(), expected, "seed {seed}");
                }
            }
            assert_eq!(ring_bytes(&ours, USED), ring_bytes(theirs, USED), "seed {seed}");
            assert_eq!(queue.position().next_avail, oracle.next_avail(), "seed {seed}");
            assert_eq!(queue.position().next_used, oracle.next_used(), "seed {seed}");
        }
    }
    assert!(
        wanted_count > 1000 && unwanted_count > 1000,
        "interrupts wanted {wanted_count} times, not wanted {unwanted_count} times"
    );
}

#[test]
fn used_elements_become_visible_only_when_they_are_published() {
    let mem = Arc::new(ram());
    let mut queue = SplitQueue::new(&mem, layout(8, false), QueuePosition { next_avail: 0, next_used: 0 }).unwrap();
    queue.push_used(3, 1);
    queue.push_used(4, 1);
    assert!(queue.has_unpublished());
    assert_eq!(queue.used_idx(), 0, "nothing is visible before it is published");
    queue.publish();
    assert_eq!(queue.used_idx(), 2);
    assert!(!queue.has_unpublished());
}

#[test]
fn used_elements_of_the_previous_daemon_are_not_published_again() {
    let mem = Arc::new(ram());
    let mut queue = SplitQueue::new(&mem, layout(8, false), QueuePosition { next_avail: 0, next_used: 0 }).unwrap();
    queue.set_position(QueuePosition { next_avail: 5, next_used: 3 });
    assert!(!queue.has_unpublished());
}

#[test]
fn only_a_taken_head_can_be_returned() {
    let mem = Arc::new(ram());
    let mut queue = SplitQueue::new(&mem, layout(8, false), QueuePosition { next_avail: 0, next_used: 0 }).unwrap();
    mem.store(1u16, GuestAddress(AVAIL + 2), Ordering::Relaxed).unwrap();
    assert!(!queue.return_head(0), "nothing was taken");
    take(&mut queue, 1, &mut Vec::new()).unwrap();
    assert!(!queue.return_head(1), "another head was taken");
    assert!(queue.return_head(0) && queue.has_available());
}

#[test]
fn an_available_ring_with_more_heads_than_descriptors_is_an_error() {
    let mem = Arc::new(ram());
    let mut queue =
        SplitQueue::new(&mem, layout(8, false), QueuePosition { next_avail: 65_530, next_used: 0 }).unwrap();
    let mut heads = Vec::new();
    let mut take = |idx: u16| {
        mem.store(idx, GuestAddress(AVAIL + 2), Ordering::Relaxed).unwrap();
        take(&mut queue, 64, &mut heads)
    };
    assert_eq!(take(3), Err(Overrun), "nine heads");
    assert_eq!(take(2), Ok(()), "eight heads");
    assert_eq!(heads.len(), 8);
}

#[test]
fn repeated_invalid_indices_do_not_occupy_the_worker() {
    let mem = Arc::new(ram());
    let mut queue = SplitQueue::new(&mem, layout(8, false), QueuePosition { next_avail: 0, next_used: 0 }).unwrap();
    let mut show = |idx: u16| {
        mem.store(idx, GuestAddress(AVAIL + 2), Ordering::Relaxed).unwrap();
        let result = queue.peek(64, &mut Vec::new());
        (result, queue.rereads_left)
    };
    assert_eq!(show(9), (Err(Overrun), 0), "it is read again at first");
    assert_eq!(show(9), (Err(Overrun), 0), "and not the next time");
    assert_eq!(show(8), (Ok(()), 1));
    assert_eq!(show(9), (Err(Overrun), 0));
}

#[test]
fn a_queue_that_is_misaligned_or_outside_guest_memory_is_refused() {
    let mem = Arc::new(ram());
    let is_found = |change: &dyn Fn(&mut QueueLayout)| {
        let mut layout = layout(64, true);
        change(&mut layout);
        SplitQueue::new(&mem, layout, QueuePosition { next_avail: 0, next_used: 0 }).is_some()
    };
    assert!(is_found(&|_| {}));
    assert!(is_found(&|l| l.used_ring = HOLE - 6 - 64 * 8 - 2), "its last byte is the last of the region");
    assert!(!is_found(&|l| l.used_ring = HOLE - 6 - 64 * 8 + 2), "its last word is beyond the region");
    assert!(is_found(&|l| l.desc_table = SEAM - 64 * 8), "a table may cross regions");
    assert!(!is_found(&|l| l.desc_table = HOLE - 64 * 8), "half of the table is unmapped");
    assert!(!is_found(&|l| l.avail_ring = HOLE));
    assert!(!is_found(&|l| l.avail_ring = l.used_ring + 4), "the rings overlap");
    assert!(!is_found(&|l| l.used_ring = l.desc_table + 64 * 16 - 4), "a ring overlaps the table");
    assert!(!is_found(&|l| l.desc_table = END - 16));
    assert!(!is_found(&|l| l.desc_table = u64::MAX - 15), "the addresses wrap");
    assert!(!is_found(&|l| l.avail_ring = SEAM - 8), "a ring may not cross regions");
    assert!(!is_found(&|l| l.avail_ring += 1), "alignment");
    assert!(!is_found(&|l| l.used_ring += 2), "alignment");
    assert!(!is_found(&|l| l.desc_table += 8), "alignment");
    assert!(!is_found(&|l| l.size = 48), "not a power of two");
    assert!(!is_found(&|l| l.size = 0));
}

//! Tests of chains: valid, broken and malicious ones.

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::*;
use crate::prng::Prng;
use crate::virtio::testing::{END, HIGH, HOLE, INDIRECT, NEXT, SEAM, WRITE, put, put_chain, ram};

const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x8000;
const USED: u64 = 0x9000;

/// The buffers of the chain up to its end or first error, and the result.
fn walk(mem: &GuestRam, table: u64, size: u16, head: u16) -> (Vec<Buffer>, Result<(), BrokenChain>) {
    let mut buffers = Vec::new();
    let table = DescriptorTable::new(mem, GuestAddress(table), u32::from(size));
    table.prefetch_heads(mem, &[head, size, u16::MAX]);
    for buffer in DescriptorChain::new(mem, table, head) {
        match buffer {
            Ok(buffer) => buffers.push(buffer),
            Err(broken) => return (buffers, Err(broken)),
        }
    }
    (buffers, Ok(()))
}

/// The buffers that virtio-queue's iterator finds in the same chain.
fn oracle(mem: &GuestMemoryMmap, table: u64, size: u16, head: u16) -> Vec<Buffer> {
    let mut queue = Queue::new(1024).unwrap();
    queue.set_size(size);
    queue.try_set_desc_table_address(GuestAddress(table)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_ready(true);
    mem.write_obj(1u16, GuestAddress(AVAIL + 2)).unwrap();
    mem.write_obj(head, GuestAddress(AVAIL + 4)).unwrap();
    let chain = queue.iter(mem).unwrap().next().unwrap();
    chain.map(|d| Buffer { range: GuestRange { addr: d.addr(), len: d.len() }, writable: d.is_write_only() }).collect()
}

fn random_descriptor(prng: &mut Prng, size: u64, indirect_table: u64) -> (u64, u32, u16, u16) {
    let next = u16::try_from(prng.below(size + size / 8)).unwrap();
    if prng.below(12) == 0 {
        let addr = prng.pick(&[indirect_table, indirect_table, indirect_table, HOLE, END - 16]);
        let len = prng.pick(&[16, 32, 64, 128, 256, 0, 15, 24, 1 << 20]);
        let flags = INDIRECT | prng.pick(&[0, 0, 0, WRITE, NEXT]);
        return (addr, len, flags, next);
    }
    let flags = prng.pick(&[0, NEXT, NEXT, NEXT]) | prng.pick(&[0, WRITE]);
    (prng.next_u64(), u32::try_from(prng.below(0x2000)).unwrap(), flags, next)
}

/// Over random tables with indirect ones, loops, indexes out of range and tables outside memory: a chain followed to
/// its end has exactly virtio-queue's buffers, and a broken one is reported no later than where virtio-queue stopped.
#[test]
fn parsing_random_chains_agrees_with_virtio_queue() {
    let mem = ram();
    let (mut whole, mut broken, mut long) = (0, 0, 0);
    for seed in 0..40_000 {
        let mut prng = Prng::new(seed);
        let size = prng.pick(&[1u16, 2, 8, 16, 32]);
        // The indirect table crosses the seam of two regions, or is at the end of memory and partly unmapped.
        let indirect_table = prng.pick(&[HIGH, SEAM - 24, END - 64]);
        for index in 0..size {
            put(&mem, TABLE, index, random_descriptor(&mut prng, u64::from(size), indirect_table));
        }
        for index in 0..4 {
            put(&mem, indirect_table, index, random_descriptor(&mut prng, 4, indirect_table));
        }
        let head = u16::try_from(prng.below(u64::from(size))).unwrap();
        let (buffers, end) = walk(&mem, TABLE, size, head);
        let expected = oracle(&mem, TABLE, size, head);
        if end.is_ok() {
            assert_eq!(buffers, expected, "seed {seed}");
            whole += 1;
            long += u32::from(buffers.len() > 3);
        } else {
            assert!(expected.starts_with(&buffers), "seed {seed}");
            broken += 1;
        }
    }
    assert!(whole > 10_000 && broken > 10_000 && long > 1_000, "{whole} whole, {broken} broken, {long} long");
}

#[test]
fn a_chain_with_a_loop_breaks_after_one_buffer_per_table_entry() {
    let mem = ram();
    for size in [1u16, 2, 16] {
        for index in 0..size {
            put(&mem, TABLE, index, (0, 1, NEXT, (index + 1) % size));
        }
        let (buffers, end) = walk(&mem, TABLE, size, 0);
        assert_eq!((buffers.len(), end), (usize::from(size), Err(BrokenChain)));
    }
    put(&mem, TABLE, 0, (HIGH, 32, INDIRECT, 0));
    put(&mem, HIGH, 0, (0, 1, NEXT, 1));
    put(&mem, HIGH, 1, (0, 1, NEXT, 0));
    let (buffers, end) = walk(&mem, TABLE, 16, 0);
    assert_eq!((buffers.len(), end), (2, Err(BrokenChain)));
}

/// T18: a chain may have zero or more plain descriptors before an indirect one (a device MUST handle that, section
/// 2.7.5.3.2), whose WRITE flag is ignored.
#[test]
fn an_indirect_table_may_follow_plain_descriptors() {
    let mem = ram();
    for plain in 0..4u16 {
        for flag in [0, WRITE] {
            for index in 0..plain {
                put(&mem, TABLE, index, (u64::from(index), 16, NEXT, index + 1));
            }
            put(&mem, TABLE, plain, (HIGH, 48, INDIRECT | flag, 7));
            put_chain(&mem, HIGH, &[(100, 16, 0), (101, 16, WRITE), (102, 1, WRITE)]);
            let (buffers, end) = walk(&mem, TABLE, 16, 0);
            assert_eq!(end, Ok(()));
            let seen: Vec<_> = buffers.iter().map(|b| (b.range.addr.0, b.writable)).collect();
            let expected: Vec<_> =
                (0..u64::from(plain)).map(|n| (n, false)).chain([(100, false), (101, true), (102, true)]).collect();
            assert_eq!(seen, expected);
        }
    }
}

#[test]
fn a_bad_indirect_table_breaks_the_chain() {
    let mem = ram();
    put(&mem, HIGH, 0, (0, 1, WRITE, 0));
    let tables = [(HIGH, 0, 0), (HIGH, 8, 0), (HIGH, 17, 0), (HIGH, 16 * 32769, 0), (HIGH, u32::MAX, 0)];
    let unmapped = [(HOLE, 16, 0), (END - 8, 16, 0), (u64::MAX - 7, 16, 0), (u64::MAX, 32, 0)];
    for (addr, len, flags) in tables.into_iter().chain(unmapped).chain([(HIGH, 16, NEXT)]) {
        put(&mem, TABLE, 0, (addr, len, INDIRECT | flags, 1));
        put(&mem, TABLE, 1, (0, 1, WRITE, 0));
        assert_eq!(walk(&mem, TABLE, 16, 0), (vec![], Err(BrokenChain)), "{addr:#x} {len}");
    }
    put(&mem, TABLE, 0, (HIGH, 16, INDIRECT, 0));
    put(&mem, HIGH, 0, (HIGH, 16, INDIRECT, 0));
    assert_eq!(walk(&mem, TABLE, 16, 0), (vec![], Err(BrokenChain)), "a table in a table");
}

/// Even of the largest table, only the entries in use need to be mapped.
#[test]
fn an_indirect_table_may_extend_past_guest_memory() {
    let mem = ram();
    put(&mem, TABLE, 0, (END - 32, 16 * 32768, INDIRECT, 0));
    put_chain(&mem, END - 32, &[(5, 16, 0), (6, 1, WRITE)]);
    let (buffers, end) = walk(&mem, TABLE, 16, 0);
    assert_eq!((buffers.len(), end), (2, Ok(())));
}

#[test]
fn a_chain_has_at_most_1024_buffers() {
    let mem = ram();
    let max = 1024;
    for plain in [0, 1, 5u16] {
        for excess in [0, 1] {
            let inner = max - usize::from(plain) + excess;
            for index in 0..plain {
                put(&mem, TABLE, index, (0, 1, NEXT, index + 1));
            }
            put(&mem, TABLE, plain, (HIGH, u32::try_from(inner * 16).unwrap(), INDIRECT, 0));
            put_chain(&mem, HIGH, &vec![(0, 1, 0); inner]);
            let (buffers, end) = walk(&mem, TABLE, 16, 0);
            assert_eq!(buffers.len(), max);
            assert_eq!(end, if excess == 0 { Ok(()) } else { Err(BrokenChain) });
        }
    }
}

#[test]
fn a_table_partly_outside_memory_breaks_only_the_chains_that_use_that_part() {
    let mem = ram();
    let table = END - 32;
    put_chain(&mem, table, &[(0, 16, 0), (0, 1, WRITE)]);
    assert_eq!(walk(&mem, table, 256, 0).1, Ok(()));
    assert_eq!(walk(&mem, table, 256, 2), (vec![], Err(BrokenChain)));
    assert_eq!(walk(&mem, table, 256, 256), (vec![], Err(BrokenChain)));
    assert_eq!(walk(&mem, u64::MAX - 15, 256, 3), (vec![], Err(BrokenChain)));
    assert_eq!(walk(&mem, table, 0, 0), (vec![], Err(BrokenChain)));
}

//! Tests of copies against a flat model of the data.

use super::*;
use crate::prng::Prng;
use crate::virtio::testing::{END, HIGH, HOLE, SEAM, ram};

fn range(addr: u64, len: u32) -> GuestRange {
    GuestRange { addr: GuestAddress(addr), len }
}

/// Copies to and from disjoint ranges in random order agree with one flat array, at any offset and length, both with
/// one cursor for all copies and with a fresh cursor for each.
#[test]
fn guest_copies_agree_with_a_flat_model() {
    for seed in 0..300 {
        let mut prng = Prng::new(seed);
        let mem = ram();
        // Slots of 0x800 bytes, one of them across the seam of two regions. A range never leaves its slot.
        let mut slots: Vec<u64> = (0..31).map(|n| 0x400 + n * 0x800).chain([SEAM - 0x400]).collect();
        slots.retain(|&slot| slot + 0x800 <= SEAM - 0x400 || slot == SEAM - 0x400);
        let mut ranges = Vec::new();
        while ranges.len() < 12 {
            let slot = slots.swap_remove(usize::try_from(prng.below(slots.len() as u64)).unwrap());
            let len = prng.pick(&[1, 7, 16, 511, 512, 513, 0x800]);
            ranges.push(range(slot, len));
        }
        let total: usize = ranges.iter().map(|r| r.len as usize).sum();
        let mut model = vec![0u8; total];
        let mut kept = GuestCursor::new(&mem, &ranges);
        for step in 0..40u8 {
            let offset = usize::try_from(prng.below(total as u64 + 1)).unwrap();
            let len = usize::try_from(prng.below((total - offset) as u64 + 1)).unwrap();
            let mut fresh = GuestCursor::new(&mem, &ranges);
            let cursor = if step % 2 == 0 { &mut kept } else { &mut fresh };
            match prng.below(5) {
                0 => {
                    let bytes: Vec<u8> = (0..=u8::MAX).cycle().map(|n| n.wrapping_mul(31) ^ step).take(len).collect();
                    cursor.write(offset as u64, &bytes).unwrap();
                    model[offset..offset + len].copy_from_slice(&bytes);
                }
                1 => {
                    cursor.fill_zeros(offset as u64, len).unwrap();
                    model[offset..offset + len].fill(0);
                }
                2 => {
                    let mut bytes = vec![0xee; len];
                    cursor.read(offset as u64, &mut bytes).unwrap();
                    assert_eq!(bytes, model[offset..offset + len], "seed {seed} step {step}");
                }
                3 => {
                    let bytes: Vec<u8> = (0..=u8::MAX).cycle().map(|n| n.wrapping_mul(29) ^ step).take(len).collect();
                    let next = ptr::without_provenance(usize::try_from(prng.below(u64::MAX)).unwrap());
                    // SAFETY: the vector has `len` bytes, and only this test uses it.
                    unsafe { cursor.copy_to_guest(offset as u64, bytes.as_ptr(), len, Some(next)) }.unwrap();
                    model[offset..offset + len].copy_from_slice(&bytes);
                }
                _ => {
                    let mut bytes = vec![0xee; len];
                    // SAFETY: the vector has `len` bytes, and only this test uses it.
                    unsafe { cursor.copy_from_guest(offset as u64, bytes.as_mut_ptr(), len, None) }.unwrap();
                    assert_eq!(bytes, model[offset..offset + len], "seed {seed} step {step}");
                }
            }
        }
    }
}

#[test]
fn a_copy_changes_no_byte_outside_its_ranges() {
    let mem = ram();
    mem.write_slice(&[0xaa; 64], GuestAddress(0x100)).unwrap();
    let ranges = [range(0x110, 3), range(0x120, 5)];
    GuestCursor::new(&mem, &ranges).write(1, &[1, 2, 3, 4, 5, 6]).unwrap();
    let mut seen = [0; 64];
    mem.read_slice(&mut seen, GuestAddress(0x100)).unwrap();
    let mut expected = [0xaa; 64];
    expected[0x11..0x13].copy_from_slice(&[1, 2]);
    expected[0x20..0x24].copy_from_slice(&[3, 4, 5, 6]);
    assert_eq!(seen, expected);
}

#[test]
fn sequential_copies_continue_where_the_last_one_ended() {
    let mem = ram();
    let ranges: Vec<_> = (0..100).map(|n| range(n * 0x100, 10)).collect();
    let mut cursor = GuestCursor::new(&mem, &ranges);
    for (chunk, offset) in (0..1000).step_by(25).enumerate() {
        cursor.write(offset, &[7; 25]).unwrap();
        let end = (chunk + 1) * 25;
        assert_eq!((cursor.index, cursor.start), (end / 10, (end / 10 * 10) as u64));
    }
}

#[test]
fn an_address_outside_guest_memory_is_an_error() {
    let mem = ram();
    let mut byte = [0; 16];
    for (addr, len) in [(HOLE, 16), (HOLE - 8, 16), (HIGH - 8, 16), (END - 15, 16), (END, 16), (u64::MAX - 3, 16)] {
        let ranges = [range(0, 4), range(addr, len)];
        let mut cursor = GuestCursor::new(&mem, &ranges);
        assert_eq!(cursor.read(4, &mut byte), Err(BadAddress), "{addr:#x}");
        assert_eq!(cursor.write(4, &byte), Err(BadAddress), "{addr:#x}");
        assert_eq!(cursor.fill_zeros(4, 16), Err(BadAddress), "{addr:#x}");
        assert_eq!(cursor.write(0, &byte[..4]), Ok(()), "the cursor is usable after an error");
        assert_eq!(read_once(&mem, GuestAddress(addr), &mut byte), Err(BadAddress));
    }
    assert_eq!(write_status(&mem, GuestAddress(HOLE), Status::IoErr), Err(BadAddress));
    assert_eq!(write_status(&mem, GuestAddress(u64::MAX), Status::IoErr), Err(BadAddress));
}

#[test]
fn a_section_past_the_data_is_an_error_unless_it_is_empty() {
    let mem = ram();
    let ranges = [range(0, 8), range(0x100, 8)];
    let mut cursor = GuestCursor::new(&mem, &ranges);
    assert_eq!(cursor.fill_zeros(9, 8), Err(BadAddress));
    assert_eq!(cursor.fill_zeros(16, 1), Err(BadAddress));
    assert_eq!(cursor.fill_zeros(u64::MAX, 1), Err(BadAddress));
    assert_eq!(cursor.fill_zeros(16, 0), Ok(()));
    assert_eq!(cursor.fill_zeros(0, 16), Ok(()));
    assert_eq!(GuestCursor::new(&mem, &[]).fill_zeros(0, 1), Err(BadAddress));
    assert_eq!(GuestCursor::new(&mem, &[range(0, u32::MAX)]).fill_zeros(0xffff_fff0, 16), Err(BadAddress));
}

#[test]
fn reads_and_status_writes_cross_region_borders() {
    let mem = ram();
    for start in SEAM - 20..SEAM + 4 {
        let bytes: Vec<u8> = (1..20).collect();
        mem.write_slice(&bytes, GuestAddress(start)).unwrap();
        let mut seen = [0; 19];
        read_once(&mem, GuestAddress(start), &mut seen).unwrap();
        assert_eq!(seen, *bytes);
        write_status(&mem, GuestAddress(start), Status::Unsupported).unwrap();
        assert_eq!(mem.read_obj::<u8>(GuestAddress(start)).unwrap(), 2);
    }
}

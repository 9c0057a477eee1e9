//! The image changes its size while the cache is used.

use super::*;
use crate::units::Fault;

const IMAGE: u64 = 1 << 16;
const END: u64 = IMAGE / 2;

fn cache() -> PageCache {
    cache_with(Settings { readahead_pages_max: 64, ..Settings::of(1024, IMAGE) })
}

fn flush(cache: &mut PageCache, now: u64) {
    cache.flush(Ticket(9));
    complete_all(cache, Tick::from_us(now));
}

fn try_to_shrink(cache: &mut PageCache) -> Option<u64> {
    cache.drop_beyond_end(0, u32::MAX);
    cache.shrink()
}

/// The pages in memory, in order.
fn resident(cache: &PageCache) -> Vec<u64> {
    let mut pages: Vec<u64> = cache.resident(0, u32::MAX).0.into_iter().map(|page| page.0).collect();
    pages.sort_unstable();
    pages
}

#[test]
fn an_image_shrinks_only_after_its_tail_is_durable_and_evicted() {
    let mut cache = cache();
    assert_eq!(cache.shrink(), None, "nobody has announced it");
    write(&mut cache, END - 8, 16);
    cache.announce_shrink(Some(END));
    assert_eq!(try_to_shrink(&mut cache), None, "a page beyond the end is dirty");
    cache.flush(Ticket(9));
    let mut tags = Vec::new();
    cache.pump(Tick::from_us(1));
    cache.take_ops(|op| tags.push((op.tag, op.kind)));
    assert!(tags.iter().any(|(_, kind)| *kind == OpKind::Write) && try_to_shrink(&mut cache).is_none(), "{tags:?}");
    tags.into_iter().for_each(|(tag, _)| cache.complete(tag, &Outcome::Done, Tick::from_us(2)));
    assert_eq!(try_to_shrink(&mut cache), None, "it is not durable yet");
    complete_all(&mut cache, Tick::from_us(3));
    assert_eq!(try_to_shrink(&mut cache), Some(END));
    cache.check(&[]);
    assert_eq!(resident(&cache), [END / 8 - 1], "what stays is still in memory");
    assert!(read(&mut cache, END - 8, 8));
    // It grows again: the part that was cut is read from the image.
    cache.grow(IMAGE);
    let mut pieces = Vec::new();
    cache.read(access(END, 8), &mut pieces);
    assert!(pieces.is_empty(), "nothing is known about it");
    let done = complete_all(&mut cache, Tick::from_us(4));
    assert!(done.iter().any(|(kind, _)| matches!(kind, OpKind::Map | OpKind::Read)), "{done:?}");
    cache.check(&[]);
}

#[test]
fn a_shrinking_image_is_not_read_ahead_or_warmed_past_its_new_end() {
    let mut cache = cache();
    cache.announce_shrink(Some(END));
    for (step, sector) in (END - 512..END).step_by(32).enumerate() {
        read(&mut cache, sector, 32);
        complete_all(&mut cache, Tick::from_us(step as u64));
    }
    let warmed = cache.warm(crate::units::PageSpan::new(PageNo(END / 8), 8));
    assert_eq!(warmed, (PageNo(END / 8 + 8), WarmStep::Done));
    complete_all(&mut cache, Tick::from_us(100));
    assert!(resident(&cache).iter().all(|page| *page < END / 8), "{:?}", resident(&cache));
    assert!(cache.stats().readahead_pages > 0);
    flush(&mut cache, 101);
    assert_eq!(try_to_shrink(&mut cache), Some(END));
}

#[test]
fn range_operations_past_the_new_end_are_durable_before_the_image_shrinks() {
    for discards in [false, true] {
        let mut cache = cache();
        flush(&mut cache, 1);
        let span = SectorSpan::new(END - 64, 128);
        assert!(if discards { cache.discard(Ticket(2), span) } else { cache.zero(Ticket(2), span, Unmap::Forbidden) });
        cache.announce_shrink(Some(END));
        assert_eq!(try_to_shrink(&mut cache), None, "it waits");
        let mut tags = Vec::new();
        cache.pump(Tick::from_us(2));
        cache.take_ops(|op| tags.push(op.tag));
        assert_eq!(try_to_shrink(&mut cache), None, "it is in flight");
        tags.into_iter().for_each(|tag| cache.complete(tag, &Outcome::Done, Tick::from_us(3)));
        assert_eq!(try_to_shrink(&mut cache), None, "no sync covers it");
        flush(&mut cache, 4);
        assert_eq!(try_to_shrink(&mut cache), Some(END), "discards: {discards}");
        cache.check(&[]);
    }
}

#[test]
fn a_cancelled_shrink_leaves_the_image_unchanged() {
    let mut cache = cache();
    write(&mut cache, END, 8);
    cache.announce_shrink(Some(END));
    cache.flush(Ticket(9));
    let mut tags = Vec::new();
    cache.pump(Tick::from_us(1));
    cache.take_ops(|op| tags.push(op.tag));
    for tag in tags {
        cache.complete(tag, &Outcome::Failed(Fault::Media), Tick::from_us(2));
    }
    assert_eq!(try_to_shrink(&mut cache), None, "the page could not be written");
    cache.announce_shrink(None);
    assert!(read(&mut cache, END, 8), "it is still in memory");
    assert_eq!(cache.warm(crate::units::PageSpan::new(PageNo(END / 8 + 8), 8)).0, PageNo(END / 8 + 16));
    cache.check(&[]);
}

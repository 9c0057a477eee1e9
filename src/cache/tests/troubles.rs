//! Requests that wait and stores that fail: who has to wait for whom, and when all is well again.

use super::*;

const NOW: Tick = Tick(1_000_000);

/// Pumps; returns the operations that this starts, which stay in flight.
fn started(cache: &mut PageCache, now: Tick) -> Vec<(u32, PlanKind, SectorSpan)> {
    let mut plans = Vec::new();
    cache.pump(now);
    cache.take_plans(|plan| plans.push((plan.tag, plan.kind, plan.span)));
    plans
}

#[test]
fn a_write_elsewhere_does_not_wait_for_a_discard() {
    let mut cache = cache_of(1024, 1 << 20);
    assert!(cache.discard(Ticket(9), SectorSpan::new(0, 800)));
    assert_eq!(started(&mut cache, NOW).len(), 1);
    assert_eq!(cache.read(access(8, 8), &mut Vec::new()), Admitted::Until(0), "the range is locked");
    write(&mut cache, 8000, 8);
}

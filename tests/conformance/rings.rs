//! Rings as a whole: they start, stop, resume, are enabled and disabled, and run in parallel.

use std::fs::File;
use std::process::Command;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::common::SECTOR_BYTES;
use crate::common::daemon::{Daemon, DaemonOptions, TempDir, server_binary};
use crate::common::prng::{Prng, seed};
use crate::common::raw_message::number;
use crate::common::raw_ring::Ring;
use crate::common::request::{OK, Payload, Pending, assert_serves, pattern};
use crate::common::session::{Session, SessionOptions, ring_addresses};
use crate::common::wait::{ABSENCE, TIMEOUT, readable, try_poll};
use crate::{IMAGE_BYTES, SPARE_SECTOR};

fn start(num_queues: usize) -> Daemon {
    let options = DaemonOptions { num_queues, ..DaemonOptions::default() };
    Daemon::start("rings", IMAGE_BYTES, &options)
}

/// Frees the data memory of earlier requests.
fn reuse_data_memory(session: &Session) {
    session.memory.free_all_in(1);
}

/// T15. After the reply to GET_VRING_BASE all requests that were taken have completed, none completes later, and the
/// base is the next entry to take.
/// A guest with more than 64 virtual CPUs: QEMU sets up a queue for each, and the protocol has room for 256.
#[test]
fn a_device_has_256_queues() {
    const QUEUES: usize = 256;
    let mut daemon = start(QUEUES);
    let options = SessionOptions { queues: QUEUES, queue_size: 16, ..SessionOptions::default() };
    let mut session = Session::open(&daemon.socket(), &options);
    assert_eq!(session.frontend.get_queue_num().expect("GET_QUEUE_NUM"), QUEUES as u64);
    for index in [0, 63, 64, 65, 127, 128, 255] {
        let sector = 8 * index as u64;
        let bytes = pattern(1, sector, 4096);
        assert_eq!(session.run(index, VIRTIO_BLK_T_OUT, sector, Payload::Send(&bytes)).status, OK, "queue {index}");
        let found = session.run(QUEUES - 1 - index, VIRTIO_BLK_T_IN, sector, Payload::Receive(4096));
        assert!(found.status == OK && found.data == bytes, "queue {index}");
    }
    for index in 0..QUEUES {
        session.stop_ring(index);
    }
    daemon.stop();
}

#[test]
fn a_stopped_ring_has_nothing_in_flight_and_resumes() {
    const REQUESTS: u64 = 40;
    const REQUEST_BYTES: usize = 64 << 10;
    let seed = seed(15);
    let mut prng = Prng::new(seed);
    let daemon = start(1);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for round in 0..20 {
        reuse_data_memory(&session);
        let started = session.rings[0].next_avail();
        let sector_of = |n: u64| (round * REQUESTS + n) * 128 % (IMAGE_BYTES / SECTOR_BYTES as u64);
        let in_flight: Vec<(u64, Pending)> = (0..REQUESTS)
            .map(|n| {
                let sector = sector_of(n);
                let bytes = pattern(round + 1, sector, REQUEST_BYTES);
                let pending = session.submit(0, VIRTIO_BLK_T_OUT, sector, Payload::Send(&bytes));
                (sector, pending)
            })
            .collect();
        session.rings[0].notify();
        // Stop at a random moment: none, some or all requests have completed.
        let awaited = prng.below(REQUESTS) as u16;
        try_poll(TIMEOUT, || (session.rings[0].used_idx().wrapping_sub(started) >= awaited).then_some(()));
        let base = session.stop_ring(0);
        let used = session.rings[0].used_idx();
        assert_eq!(used, base, "seed {seed} round {round}: all requests that were taken have completed");
        let late = try_poll(ABSENCE / 4, || (session.rings[0].used_idx() != used).then_some(()));
        assert!(late.is_none(), "seed {seed} round {round}: a completion after the ring was stopped");

        session.set_up_ring(0, base);
        session.enable_ring(0, true);
        session.rings[0].notify();
        session.wait_for(0, in_flight.len());
        for (sector, pending) in &in_flight {
            assert_eq!(session.memory.byte(pending.status), OK, "seed {seed} round {round}: sector {sector}");
        }
        reuse_data_memory(&session);
        for (sector, _) in in_flight.iter().step_by(7) {
            let found = session.read(*sector, REQUEST_BYTES);
            assert!(found == pattern(round + 1, *sector, REQUEST_BYTES), "seed {seed} round {round}: {sector}");
        }
    }
}

/// A ring may start at any index, as after a migration, and its indices wrap at 2^16.
#[test]
fn a_ring_starts_at_any_base() {
    let daemon = start(1);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for base in [1, 127, 128, 0x7fff, 0xfff0, 0xffff] {
        session.stop_ring(0);
        session.rings[0] = Ring::new(&session.memory, 128, base, false);
        session.start_ring(0);
        for n in 0..40 {
            let bytes = pattern(u64::from(base), 8 * n, 4096);
            session.write(8 * n, &bytes);
            assert!(session.read(8 * n, 4096) == bytes, "base {base}, request {n}");
        }
        assert_eq!(session.stop_ring(0), base.wrapping_add(80), "80 requests after {base}");
        session.start_ring(0);
    }
}

/// A front-end that sets the base of a ring that runs gets a ring that runs from there.
#[test]
fn a_base_set_while_a_ring_runs_takes_effect() {
    let daemon = start(1);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.submit(0, VIRTIO_BLK_T_OUT, 0, Payload::Send(&pattern(1, 0, 512)));
    session.rings[0].notify();
    let first = session.rings[0].wait_used(TIMEOUT);
    // The entry that was taken before is available again.
    session.frontend.set_vring_base(0, 0).expect("SET_VRING_BASE");
    assert_eq!(session.rings[0].wait_used(TIMEOUT), first);
    assert_eq!((session.stop_ring(0), session.rings[0].used_idx()), (1, 2));
}

/// The size of a split ring must be a power of two. The device may reject another size or serve it as given; it must
/// not acknowledge it and use a different one.
#[test]
fn a_ring_of_an_invalid_size_is_rejected_or_served_as_it_is() {
    let mut daemon = start(1);
    for size in [0_u16, 3, 100, 0x8001, u16::MAX] {
        let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
        session.share_memory();
        if session.frontend.set_vring_num(0, size).is_ok() && size == 100 {
            session.add_ring(size);
            session.start_ring(0);
            let first = session.submit(0, VIRTIO_BLK_T_OUT, 0, Payload::Send(&pattern(1, 0, 512)));
            session.rings[0].notify();
            if session.rings[0].try_wait_used(ABSENCE).is_some() {
                assert_eq!(session.memory.byte(first.status), OK);
                for n in 0..150 {
                    session.write(n, &pattern(2, n, 512));
                }
            }
        }
        drop(session);
        daemon.assert_alive();
        assert_serves(&daemon.socket(), SPARE_SECTOR);
    }
}

/// T12.
#[test]
fn a_disabled_ring_waits_until_it_is_enabled() {
    let daemon = start(1);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for round in 0..20 {
        let bytes = pattern(round + 1, 8 * round, 4096);
        session.enable_ring(0, false);
        let before = session.rings[0].used_idx();
        let pending = session.submit(0, VIRTIO_BLK_T_OUT, 8 * round, Payload::Send(&bytes));
        session.rings[0].notify();
        let early = try_poll(ABSENCE / 4, || (session.rings[0].used_idx() != before).then_some(()));
        assert!(early.is_none(), "round {round}: a disabled ring was served");
        session.enable_ring(0, true);
        // No second notification: the first one must not be lost.
        session.wait_for(0, 1);
        assert_eq!(session.memory.byte(pending.status), OK, "round {round}");
        assert!(session.read(8 * round, 4096) == bytes, "round {round}: a read returns the written data");
    }
}

/// A driver may notify the device before the front-end has enabled its ring.
#[test]
fn a_kick_before_the_ring_is_enabled_is_not_lost() {
    let daemon = start(1);
    for round in 0..20 {
        let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
        session.share_memory();
        session.add_ring(64);
        let bytes = pattern(round + 1, 8 * round, 4096);
        let pending = session.submit(0, VIRTIO_BLK_T_OUT, 8 * round, Payload::Send(&bytes));
        session.rings[0].notify();
        session.set_up_ring(0, 0);
        session.enable_ring(0, true);
        session.wait_for(0, 1);
        assert_eq!(session.memory.byte(pending.status), OK, "round {round}");
    }
}

/// T2. A short request on one ring does not wait for all requests of another.
#[test]
fn a_busy_ring_does_not_delay_another() {
    const LONG_BYTES: usize = 1 << 20;
    const LONG_REQUESTS: u64 = 32;
    const ROUNDS: u64 = 10;
    /// With one idle core the scheduler decides some rounds. A server that serves one ring at a time wins none.
    const ROUNDS_WON_MIN: u64 = 2;
    let daemon = start(2);
    let options = SessionOptions { queues: 2, region_bytes: 40 << 20, ..SessionOptions::default() };
    let mut session = Session::open(&daemon.socket(), &options);
    // Data that is not in memory: holes and cached pages would be copied in one turn of the worker.
    for mib in 0..LONG_REQUESTS + 3 * ROUNDS {
        reuse_data_memory(&session);
        session.write(mib * 2048, &pattern(1, mib, LONG_BYTES));
    }
    session.flush();
    let mut won = 0;
    for round in 0..ROUNDS {
        reuse_data_memory(&session);
        session.read(0, 512);
        let before = session.rings[0].used_idx();
        for n in 0..LONG_REQUESTS {
            session.submit(0, VIRTIO_BLK_T_IN, (round * 3 + n) * 2048, Payload::Receive(LONG_BYTES));
        }
        session.rings[0].notify();
        let short = session.run(1, VIRTIO_BLK_T_IN, 0, Payload::Receive(512));
        assert_eq!(short.status, OK);
        let done = session.rings[0].used_idx().wrapping_sub(before);
        won += u64::from(u64::from(done) < LONG_REQUESTS);
        session.wait_for(0, LONG_REQUESTS as usize);
    }
    assert!(won >= ROUNDS_WON_MIN, "the short request was first in {won} of {ROUNDS} rounds");
}

/// Each ring works on its own data.
#[test]
fn four_vrings_serve_requests_concurrently() {
    const QUEUES: usize = 4;
    const DEPTH: u64 = 16;
    let daemon = start(QUEUES);
    let options = SessionOptions { queues: QUEUES, ..SessionOptions::default() };
    let mut session = Session::open(&daemon.socket(), &options);
    let sector_of = |queue: usize, n: u64| queue as u64 * 16_384 + n * 8;
    for round in 1..=10 {
        reuse_data_memory(&session);
        for queue in 0..QUEUES {
            for n in 0..DEPTH {
                let sector = sector_of(queue, n);
                session.submit(queue, VIRTIO_BLK_T_OUT, sector, Payload::Send(&pattern(round, sector, 4096)));
            }
            session.rings[queue].notify();
        }
        for queue in 0..QUEUES {
            session.wait_for(queue, DEPTH as usize);
        }
        for queue in 0..QUEUES {
            // Read on another ring than the one that wrote.
            let reader = (queue + 1) % QUEUES;
            for n in 0..DEPTH {
                let sector = sector_of(queue, n);
                let outcome = session.run(reader, VIRTIO_BLK_T_IN, sector, Payload::Receive(4096));
                assert_eq!(outcome.status, OK);
                assert!(outcome.data == pattern(round, sector, 4096), "round {round} ring {queue} request {n}");
            }
        }
    }
}

/// Invalid ring addresses: past the end of memory, across it, unmapped, or misaligned (T19).
#[test]
fn the_daemon_survives_a_ring_outside_memory() {
    let mut daemon = start(1);
    for case in ["past the end", "across the end", "unmapped", "at the end of addresses", "misaligned"] {
        let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
        session.share_memory();
        session.add_ring(128);
        let mut addresses = ring_addresses(&session.rings[0]);
        let end = addresses.desc_table_addr - session.rings[0].desc_addr()
            + session.memory.regions()[1].guest_addr
            + session.memory.regions()[1].len;
        match case {
            "past the end" => addresses.desc_table_addr = end,
            "across the end" => {
                addresses.desc_table_addr = end - 16;
                addresses.avail_ring_addr = end - 2;
                addresses.used_ring_addr = end - 4;
            }
            "unmapped" => addresses.avail_ring_addr = 0x10,
            "at the end of addresses" => addresses.used_ring_addr = u64::MAX - 3,
            _ => addresses.used_ring_addr += 1,
        }
        // The daemon may reject the address, or fail to use it.
        let accepted = session.frontend.set_vring_num(0, 128).is_ok()
            && session.frontend.set_vring_addr(0, &addresses).is_ok()
            && session.frontend.set_vring_call(0, &session.rings[0].call).is_ok()
            && session.frontend.set_vring_kick(0, &session.rings[0].kick).is_ok();
        if accepted {
            let _ = session.raw(number::SET_VRING_ENABLE, &[0_u32.to_le_bytes(), 1_u32.to_le_bytes()].concat());
            session.rings[0].notify();
            try_poll(ABSENCE, || (session.rings[0].used_idx() != 0).then_some(()));
        }
        println!("{case}: {}", if accepted { "accepted" } else { "rejected" });
        drop(session);
        daemon.assert_alive();
        assert_serves(&daemon.socket(), SPARE_SECTOR);
    }
}

/// The used ring over the available one, and over the descriptor table: what the device writes would be what it reads.
#[test]
fn overlapping_rings_are_refused_with_a_log_line() {
    let mut daemon = start(1);
    for over in ["available ring", "descriptor table"] {
        let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
        session.share_memory();
        session.add_ring(128);
        let mut addresses = ring_addresses(&session.rings[0]);
        addresses.used_ring_addr = match over {
            "available ring" => (addresses.avail_ring_addr + 16) & !3,
            _ => addresses.desc_table_addr + 64,
        };
        session.frontend.set_vring_num(0, 128).expect("SET_VRING_NUM");
        session.frontend.set_vring_addr(0, &addresses).expect("the addresses are in memory");
        session.frontend.set_vring_call(0, &session.rings[0].call).expect("SET_VRING_CALL");
        session.frontend.set_vring_kick(0, &session.rings[0].kick).expect("SET_VRING_KICK");
        session.enable_ring(0, true);
        // A ring that starts interrupts its driver.
        session.rings[0].take_interrupts();
        daemon.await_log("not served: its rings overlap");
        session.submit(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(512));
        session.rings[0].notify();
        assert!(!readable(&[session.rings[0].call_fd()], ABSENCE), "{over}");
        drop(session);
        daemon.assert_alive();
        assert_serves(&daemon.socket(), SPARE_SECTOR);
    }
}

/// Each ring needs several descriptors: together more than the default soft limit of many hosts.
#[test]
fn the_daemon_raises_its_descriptor_limit_for_all_rings() {
    const RINGS: usize = 24;
    let directory = TempDir::new("descriptors");
    File::create(directory.path().join("image")).and_then(|image| image.set_len(IMAGE_BYTES)).expect("an image");
    let mut few = Command::new("sh");
    few.args(["-c", r#"ulimit -Sn 64; exec "$0" "$@""#]).arg(server_binary());
    let daemon = Daemon::start_by(directory, &[&format!("num_queues = {RINGS}")], few);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for index in 1..RINGS {
        session.add_ring(64);
        session.start_ring(index);
    }
    for index in 0..RINGS {
        assert_eq!(session.run(index, VIRTIO_BLK_T_IN, 0, Payload::Receive(512)).status, OK, "ring {index}");
    }
}

/// A front-end may send a ring's address again while the ring runs. No completion may come twice.
#[test]
fn the_used_index_never_goes_backwards() {
    const ROUNDS: u32 = 100;
    let daemon = start(1);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.read(0, 256 << 10);
    let addresses = ring_addresses(&session.rings[0]);
    let mut used = session.rings[0].used_idx();
    for round in 0..ROUNDS {
        reuse_data_memory(&session);
        for _ in 0..16 {
            session.submit(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(256 << 10));
        }
        session.rings[0].notify();
        session.frontend.set_vring_addr(0, &addresses).expect("SET_VRING_ADDR");
        let end = used.wrapping_add(16);
        while used != end {
            let now = try_poll(TIMEOUT, || Some(session.rings[0].used_idx()).filter(|&now| now != used));
            let now = now.unwrap_or_else(|| panic!("round {round}: used.idx stays at {used}, expected {end}"));
            assert!(
                end.wrapping_sub(now) < end.wrapping_sub(used),
                "round {round}: used.idx goes from {used} to {now}"
            );
            used = now;
        }
        while session.rings[0].take_used().is_some() {}
    }
}

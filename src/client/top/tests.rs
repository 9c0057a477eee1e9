//! What the screen looks like, by size, key and state of the daemon.

use ratatui::crossterm::event::KeyEvent;

use super::*;
use crate::control::wire::{
    CacheStatistics, Description, DeviceState, DeviceStatistics, DeviceStatus, FrontEnd, Latency, RequestStatistics,
    StoreStatistics, WorkerStatistics,
};
use crate::counters::latency::{Latencies, bucket_of};

fn latency(times: &[(u64, u64)]) -> Latency {
    let mut latencies = Latencies::default();
    for &(ns, count) in times {
        latencies.counts[bucket_of(ns)] += count;
        latencies.sum_ns += ns * count;
        latencies.max_ns = latencies.max_ns.max(ns);
    }
    Latency::from(&latencies)
}

fn status(name: &str) -> DeviceStatus {
    DeviceStatus {
        name: name.to_owned(),
        state: DeviceState::Serving,
        why: None,
        pid: Some(17),
        image: format!("/srv/{name}.img"),
        socket: format!("/run/genblk/{name}.sock"),
        read_only: false,
        serial: name.to_owned(),
        mode: "writeback".to_owned(),
        front_end: Some(FrontEnd { pid: 4242, uid: 0 }),
        image_bytes: Some(20 << 30),
        cache_bytes: 256 << 20,
        cache_wanted_bytes: None,
        cache_present_bytes: None,
        resident_bytes: Some(1 << 20),
        dirty_bytes: Some(0),
        oldest_operation_us: None,
        limits: None,
        pending: Vec::new(),
    }
}

fn statistics(name: &str, reads: u64, waited: u64) -> DeviceStatistics {
    let requests = |operation: &str, memory: u64, waited: u64| RequestStatistics {
        operation: operation.to_owned(),
        requests: memory + waited,
        bytes: (memory + waited) * 4096,
        from_memory: latency(&[(1500, memory)]),
        waited: latency(&[(140_000, waited)]),
        ..RequestStatistics::default()
    };
    DeviceStatistics {
        name: name.to_owned(),
        requests: vec![requests("read", reads, waited), requests("write", reads / 10, 0), requests("flush", 0, waited)],
        cache: CacheStatistics {
            hit_pages: reads,
            miss_pages: waited,
            frames: 65_536,
            resident_pages: 65_536,
            dirty_pages: 15_667,
            dirty_limit_pages: 30_720,
            ..CacheStatistics::default()
        },
        stores: vec![StoreStatistics {
            operation: "read".to_owned(),
            operations: waited,
            ..StoreStatistics::default()
        }],
        workers: vec![WorkerStatistics { busy_ns: reads * 10_000, ..WorkerStatistics::default() }],
        ..DeviceStatistics::default()
    }
}

/// The sample after so many seconds of a daemon whose disk `vm1` reads more than `db`.
fn sample(seconds: u64) -> DaemonSample {
    let since_us = 1_000_000_000;
    DaemonSample {
        description: Description { version: "0.1.0".to_owned(), pid: 1, since_us, events: Vec::new() },
        devices: vec![
            status("db"),
            status("vm1"),
            DeviceStatus {
                state: DeviceState::Failed,
                why: Some("cannot open image /srv/x\u{1b}[2J.img".to_owned()),
                image_bytes: None,
                front_end: None,
                ..status("x")
            },
        ],
        time_us: since_us + seconds * 1_000_000,
        statistics: vec![
            statistics("db", seconds * 900, seconds * 100),
            statistics("vm1", seconds * 40_000, seconds * 10),
        ],
    }
}

fn state() -> TopState {
    let mut state = TopState::new(sample(100));
    (101..140).for_each(|second| state.update(Ok(sample(second))));
    state
}

fn drawn(state: &TopState, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw::draw(frame, state, Palette { has_colour: true })).unwrap();
    text_of(terminal.backend())
}

fn press(state: &mut TopState, keys: &str) {
    for key in keys.chars() {
        let event = Event::Key(KeyEvent::new(KeyCode::Char(key), KeyModifiers::NONE));
        state.apply(command_of(&event).unwrap());
    }
}

#[test]
fn a_screen_of_80_columns_shows_all_disks_and_details_of_the_selected_one() {
    let text = screen_text(&state());
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 24);
    assert_eq!(lines[0], "genblk 0.1.0 up 2m19s 3 disks  r 41.0k/s 99.7%  w 4.1k/s  dirty 122M/240M");
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(lines[1]), ["disk", "state", "r/s", "hit%", "r99", "w/s", "w99", "f/s", "f99", "dirty", "busy"]);
    assert_eq!(words(lines[2])[..6], [">", "db", "serving", "1.0k", "90.0", "140u"]);
    assert_eq!(words(lines[3])[..5], ["vm1", "serving", "40.0k", "100.0", "1.5u"]);
    assert_eq!(words(lines[4])[..3], ["x", "failed", "-"]);
    assert!(text.contains(" db  /srv/db.img  20.0G  writeback  front-end: pid 4242\n"), "{text}");
    let graph = lines.iter().find(|line| line.starts_with(" r/s ")).unwrap();
    assert!(graph.contains("\u{2588}\u{2588}\u{2588}\u{2588}"), "the sparkline of a steady rate is full: {graph}");
    assert!(text.contains(" read   memory  1.5u  1.5u  1.5u   waited  140u  140u  140u  (p50 p99 p99.9)\n"), "{text}");
    assert!(lines[23].starts_with(" q quit"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
}

#[test]
fn every_key_of_top_has_its_effect() {
    let mut state = state();
    press(&mut state, "jjj");
    let text = drawn(&state, 80, 24);
    assert!(text.contains("\n> x ") && text.contains("\n cannot open image /srv/x?[2J.img\n"), "{text}");
    press(&mut state, "ks");
    let text = drawn(&state, 80, 24);
    let order: Vec<&str> = text.lines().skip(2).take(3).map(|line| line[2..].split(' ').next().unwrap()).collect();
    assert_eq!(order, ["vm1", "db", "x"], "by reads: {text}");
    assert!(text.contains("r/s*") && text.contains("\n> vm1 "), "{text}");
    press(&mut state, "w");
    let text = drawn(&state, 80, 24);
    assert!(text.contains("vm1: below") && text.contains("2.0u"), "{text}");
    press(&mut state, "h");
    assert!(drawn(&state, 80, 24).contains("99th percentile"));
    state.apply(TopCommand::Back);
    press(&mut state, "p");
    assert!(state.is_paused() && drawn(&state, 80, 24).contains("PAUSED"));
    let control_c = Event::Key(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL));
    assert_eq!(command_of(&control_c), Some(TopCommand::Quit));
    assert_eq!(command_of(&Event::Resize(1, 1)), Some(TopCommand::Redraw));
}

#[test]
fn the_layout_follows_the_width_of_the_screen() {
    let mut state = state();
    let wide = drawn(&state, 200, 60);
    assert!(wide.contains(" ########## ######...."), "{wide}");
    press(&mut state, "jj");
    for (width, height) in [(80, 13), (40, 12), (20, 6), (10, 3), (1, 1), (300, 10)] {
        let text = drawn(&state, width, height);
        assert_eq!(text.lines().count(), usize::from(height));
        assert!(height < 6 || text.contains("\n> x"), "the selected disk is shown: {text}");
    }
    for key in ["w", "h"] {
        press(&mut state, key);
        drawn(&state, 1, 1);
        drawn(&state, 30, 5);
    }
}

#[test]
fn numbers_stay_on_screen_until_the_next_daemon_answers() {
    let mut state = state();
    state.update(Err(Error::new(ErrorKind::NoDaemon, "no daemon listens on /run/genblk/control.sock")));
    let text = drawn(&state, 80, 24);
    assert!(text.contains("40.0k") && text.ends_with("\n no daemon listens on /run/genblk/control.sock\n"), "{text}");
    let mut next = sample(2);
    next.description.pid = 2;
    state.update(Ok(next));
    let text = drawn(&state, 80, 24);
    assert!(text.starts_with("genblk 0.1.0 up 2s ") && text.contains("40.0k") && !text.contains("no daemon"), "{text}");
    let nothing = DaemonSample { devices: Vec::new(), statistics: Vec::new(), ..sample(3) };
    state.update(Ok(nothing));
    assert!(drawn(&state, 80, 24).contains("0 disks"));
}

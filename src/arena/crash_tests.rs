//! A daemon is killed between any two stores to an arena's file. In every resulting state, the next daemon finds each
//! frame's record, each range to be zeroed, and the recorded state of the guest as they were before or after the step.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::image_id::ImageId;
use crate::shared_memory::FileChange;
use crate::shared_memory::trace::{FileId, TraceEvent, crash_states, file_id, record};
use crate::tenure::TenureId;
use crate::tenure::token::ChangeToken;
use crate::units::PageNo;

const IDENTITY: ImageId = ImageId { device: 1, inode: 2, born_ns: 3 };
/// Size of the largest image: its pages use all numbers that a record can hold except one.
const SIZE_BYTES: u64 = (1 << 52) - (1 << 12);
const TENURE: TenureFacts =
    TenureFacts { id: TenureId { generation: 7, id: 1 << 100 | 1 }, since: 9, is_recorded: false, is_over: false };
const LOST: GuestState = GuestState { data: GuestData::Lost, ..GuestState::FRESH };
const WRITE_THROUGH: GuestState = GuestState { write_through: true, ..GuestState::FRESH };
const BOTH: GuestState = GuestState { data: GuestData::Lost, ..WRITE_THROUGH };
const GUESTS: [GuestState; 4] = [GuestState::FRESH, LOST, WRITE_THROUGH, BOTH];

const FRAMES: usize = 2;
const DIRTY: FrameRecord = FrameRecord { page: PageNo(7), valid: SectorMask(0xf0), dirty: SectorMask(0x30) };
const ZEROES: SectorSpan = SectorSpan { start: 64, count: 8 };

/// A directory with an arena's file; removed with the value.
pub(super) struct Directory(PathBuf);

impl Directory {
    /// A directory with a file of these bytes; without bytes there is no file.
    pub(super) fn new(bytes: &[u8]) -> Self {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let directory = Self(std::env::temp_dir().join(format!("genblk-arena-{}-{serial}", std::process::id())));
        let file = directory.file();
        file.file.write_all_at(bytes, 0).unwrap();
        directory
    }

    pub(super) fn file(&self) -> ArenaFile {
        let directory = ArenaFile::dir(&self.0);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory).unwrap();
        let path = directory.join(IDENTITY.file_name(SIZE_BYTES, 0));
        fs::OpenOptions::new().create(true).append(true).open(&path).unwrap();
        ArenaFile::open_existing(&path, AllowedOwner::Own).unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(ArenaFile::dir(&self.0).join(IDENTITY.file_name(SIZE_BYTES, 0))).unwrap_or_default()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn spec(frames: usize, guest: GuestState) -> ArenaSpec<'static> {
    spec_with_room(frames, frames, guest)
}

pub(super) fn spec_with_room(reserved: usize, frames: usize, guest: GuestState) -> ArenaSpec<'static> {
    static IMAGE: LazyLock<ImageFacts> = LazyLock::new(|| ImageFacts {
        identity: IDENTITY,
        size_bytes: SIZE_BYTES,
        path: "/image".into(),
        alias: "dm:uuid".to_owned(),
    });
    ArenaSpec { frames, reserved, image: &IMAGE, tenure: TENURE, guest }
}

/// The contents that a daemon finds in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Marker(GuestState),
    Cache { guest: GuestState, frames: usize, records: Vec<(FrameId, FrameRecord)>, zeroes: Vec<(usize, SectorSpan)> },
}

impl Found {
    fn guest(&self) -> GuestState {
        match self {
            Self::Nothing => GuestState::FRESH,
            Self::Marker(guest) | Self::Cache { guest, .. } => *guest,
        }
    }

    /// The contents that the next daemon finds in a file with these bytes.
    fn in_bytes(bytes: &[u8]) -> Result<Self> {
        let file = Directory::new(bytes).file();
        let Some(header) = file.header()? else { return Ok(Self::Nothing) };
        assert_eq!((header.image.identity, header.boot), (IDENTITY, ledger::boot_id()));
        if header.frames == 0 {
            return Ok(Self::Marker(header.guest));
        }
        let arena = Arena::attach(file, &header)?;
        let (records, zeroes) = (arena.records().collect(), arena.pending_zeroes().collect());
        Ok(Self::Cache { guest: header.guest, frames: arena.frames(), records, zeroes })
    }
}

/// Applies events to a copy of the bytes that a file had before them.
fn apply<'a>(id: FileId, before: &[u8], events: impl IntoIterator<Item = &'a TraceEvent>) -> Vec<u8> {
    let mut bytes = before.to_vec();
    let mut mappings = Vec::new();
    for event in events {
        match event {
            TraceEvent::File(owner, FileChange::Mapped(base, len)) => mappings.push((*owner, *base..*base + *len)),
            TraceEvent::File(owner, _) if *owner != id => {}
            TraceEvent::File(_, FileChange::Length(length)) => bytes.resize(usize::try_from(*length).unwrap(), 0),
            TraceEvent::File(_, FileChange::ZerosFrom(first)) => bytes[usize::try_from(*first).unwrap()..].fill(0),
            TraceEvent::Store(store) => {
                // A later mapping may have the addresses of one that was removed.
                let mapping = mappings.iter().rev().find(|(_, mapping)| mapping.contains(&store.address));
                let (owner, mapping) = mapping.expect("a store is to a mapping");
                if *owner == id {
                    let at = store.address - mapping.start;
                    bytes[at..at + store.bytes.len()].copy_from_slice(&store.bytes);
                }
            }
        }
    }
    bytes
}

/// A step on an arena's file.
struct Step {
    file: FileId,
    /// The file's bytes before it.
    before: Vec<u8>,
    events: Vec<TraceEvent>,
}

impl Step {
    /// Runs a step on a file with the bytes `before`. Its result is dropped afterwards.
    fn run<R>(before: &[u8], step: impl FnOnce(ArenaFile) -> R) -> Self {
        let directory = Directory::new(before);
        let file = directory.file();
        let id = file_id(&file.file);
        let (result, events) = record(|| step(file));
        let (step, after) = (Self { file: id, before: before.to_vec(), events }, directory.bytes());
        assert!(after.is_empty() || step.after() == after, "every change of the file is recorded");
        drop(result);
        step
    }

    /// Runs a step on an arena that `prepare` has filled.
    fn on_arena(prepare: impl FnOnce(&Arena), step: impl FnOnce(&Arena)) -> Self {
        Self::on_arena_of(&spec(FRAMES, GuestState::FRESH), prepare, step)
    }

    /// Like [`Step::on_arena`], for an arena made from `spec`.
    fn on_arena_of(spec: &ArenaSpec<'_>, prepare: impl FnOnce(&Arena), step: impl FnOnce(&Arena)) -> Self {
        let directory = Directory::new(&[]);
        let file = directory.file();
        let id = file_id(&file.file);
        let arena = Arena::persistent(file, spec).unwrap();
        prepare(&arena);
        let before = directory.bytes();
        let ((), mut events) = record(|| step(&arena));
        events.insert(0, TraceEvent::File(id, FileChange::Mapped(arena.memory.at(0).addr(), arena.memory.bytes())));
        Self { file: id, before, events }
    }

    /// The file's bytes after some of the events.
    fn in_state<'a>(&self, state: impl IntoIterator<Item = &'a TraceEvent>) -> Vec<u8> {
        apply(self.file, &self.before, state)
    }

    fn after(&self) -> Vec<u8> {
        self.in_state(&self.events)
    }

    /// The invalid contents that a daemon finds, over all states in which the step may be interrupted.
    fn faults(&self, is_allowed: impl Fn(&Found) -> bool) -> Vec<String> {
        let fault = |state: Vec<&TraceEvent>| match Found::in_bytes(&self.in_state(state)) {
            Ok(found) => (!is_allowed(&found)).then(|| format!("{found:?}")),
            Err(e) => Some(e.to_string()),
        };
        crash_states(&self.events).into_iter().filter_map(fault).collect()
    }
}

/// Every kind of file that a daemon may find: its bytes, and its contents.
fn earlier_files() -> Vec<(Vec<u8>, Found)> {
    let mut files = vec![(Vec::new(), Found::Nothing)];
    for guest in GUESTS {
        let marker = Step::run(&[], |file| Arena::loss_marker(file, &spec(FRAMES, guest)).unwrap());
        files.push((marker.after(), Found::Marker(guest)));
        let fill = |file| {
            let arena = Arena::persistent(file, &spec(FRAMES, guest)).unwrap();
            arena.publish(FrameId(1), DIRTY);
            arena.note_zero(5, Some(ZEROES));
            arena
        };
        let (records, zeroes) = (vec![(FrameId(1), DIRTY)], vec![(5, ZEROES)]);
        files.push((Step::run(&[], fill).after(), Found::Cache { guest, frames: FRAMES, records, zeroes }));
    }
    files
}

/// Whether the creation of an arena for `guest` may pass through `state` between `old` and `new`.
fn is_on_the_way(state: &Found, old: &Found, new: &Found, guest: GuestState) -> bool {
    match state {
        Found::Nothing => *old == Found::Nothing,
        // The header may already record the guest's new state.
        Found::Marker(recorded) => {
            let data_only = GuestState { write_through: false, ..guest };
            [GuestState::FRESH, data_only, guest].map(|guest| old.guest().merged_with(guest)).contains(recorded)
        }
        cache => cache == old || cache == new,
    }
}

#[test]
fn guest_state_in_a_cache_file_survives_the_creation_of_a_new_arena() {
    for (bytes, old) in earlier_files() {
        for guest in GUESTS {
            for frames in [0, 1, 5] {
                let merged = old.guest().merged_with(guest);
                let new = match frames {
                    0 => Found::Marker(merged),
                    frames => Found::Cache { guest: merged, frames, records: Vec::new(), zeroes: Vec::new() },
                };
                let step = Step::run(&bytes, |file| match frames {
                    0 => Arena::loss_marker(file, &spec(FRAMES, guest)).unwrap(),
                    frames => Arena::persistent(file, &spec(frames, guest)).unwrap(),
                });
                let faults = step.faults(|state| is_on_the_way(state, &old, &new, guest));
                assert!(faults.is_empty(), "from {old:?} to {new:?}: {faults:#?}");
                assert_eq!(Found::in_bytes(&step.after()).unwrap(), new);
            }
        }
    }
}

#[test]
fn the_write_through_mode_survives_an_orderly_stop() {
    for (bytes, found) in earlier_files() {
        let Found::Cache { guest, .. } = found else { continue };
        let step = Step::run(&bytes, |file| {
            let header = file.header().unwrap().unwrap();
            let arena = Arena::attach(file, &header).unwrap();
            arena.publish(FrameId(1), FrameRecord { dirty: SectorMask::NONE, ..DIRTY });
            arena.note_zero(5, None);
            arena.keep_on_drop(false);
        });
        let faults = step.faults(|state| state.guest() == guest);
        assert!(faults.is_empty(), "{guest:?}: {faults:#?}");
        if guest == WRITE_THROUGH {
            assert_eq!(Found::in_bytes(&step.after()).unwrap(), Found::Marker(guest));
        }
    }
}

#[test]
fn a_frame_record_is_updated_atomically() {
    let other = FrameRecord { page: PageNo(1 << 39), valid: SectorMask::ALL, dirty: SectorMask::NONE };
    let records = [FrameRecord::empty(PageNo(7)), DIRTY, FrameRecord { dirty: SectorMask::ALL, ..other }, other];
    for old in records {
        for new in records {
            let step = Step::on_arena(|arena| arena.publish(FrameId(1), old), |arena| arena.publish(FrameId(1), new));
            let allowed = [old, new].map(|record| match record.is_empty() {
                true => Vec::new(),
                false => vec![(FrameId(1), record)],
            });
            let faults =
                step.faults(|found| matches!(found, Found::Cache { records, .. } if allowed.contains(records)));
            assert!(faults.is_empty(), "from {old:?} to {new:?}: {faults:#?}");
        }
    }
}

/// While a page moves to another frame, at least one of the two frames has its bytes and a record of it.
#[test]
fn a_moving_page_always_has_a_recorded_frame_with_its_bytes() {
    let (old, new) = (FrameId(0), FrameId(1));
    let record = FrameRecord { page: PageNo(7), valid: SectorMask::ALL, dirty: SectorMask::ALL };
    let fill = |arena: &Arena| {
        arena.memory.zero(arena.frame_offset(old), PAGE_SIZE);
        arena.memory.store(arena.frame_offset(old), 77);
        arena.publish(old, record);
    };
    let step = Step::on_arena(fill, |arena| {
        arena.copy_sectors(old, new, SectorMask::ALL);
        arena.publish(new, record);
        arena.publish(old, FrameRecord::empty(record.page));
    });
    let states = crash_states(&step.events);
    assert!(states.len() > 3);
    for state in states {
        let file = Directory::new(&step.in_state(state)).file();
        let header = file.header().unwrap().unwrap();
        let arena = Arena::attach(file, &header).unwrap();
        let recorded: Vec<_> = arena.records().collect();
        assert!(!recorded.is_empty(), "the page is lost");
        for (frame, found) in recorded {
            assert_eq!((found, arena.memory.load(arena.frame_offset(frame))), (record, 77), "{frame:?}");
        }
    }
}

#[test]
fn a_range_to_be_zeroed_is_recorded_whole_or_not_at_all() {
    let later = SectorSpan { start: 8, count: 800 };
    let step = Step::on_arena(
        |arena| arena.note_zero(5, Some(ZEROES)),
        |arena| {
            arena.note_zero(6, Some(later));
            arena.note_zero(5, None);
            arena.note_zero(5, Some(later));
        },
    );
    let allowed = [vec![(5, ZEROES)], vec![(5, ZEROES), (6, later)], vec![(6, later)], vec![(5, later), (6, later)]];
    let is_allowed = |found: &Found| matches!(found, Found::Cache { zeroes, .. } if allowed.contains(zeroes));
    assert_eq!(step.faults(is_allowed), [""; 0]);
}

#[test]
fn a_change_token_is_updated_atomically() {
    let token = |number: u64| ChangeToken::from_words(std::array::from_fn(|word| number * 100 + word as u64));
    let step = Step::on_arena(
        |arena| {
            arena.record_token_now(token(1));
            arena.begin_change(SectorSpan::new(0, 1));
        },
        |arena| arena.record_token_now(token(2)),
    );
    let states = crash_states(&step.events);
    assert!(states.len() > ChangeToken::WORDS);
    for state in states {
        let file = Directory::new(&step.in_state(state)).file();
        let seen = file.header().unwrap().unwrap().last_seen;
        let expected = if seen.is_at_rest { (token(2), 0) } else { (token(1), 4096) };
        assert_eq!((seen.token, seen.changed_bytes), expected);
    }
}

/// Frames that have memory in the tests of a change of size, and frames for which there is room.
const RESERVED: u32 = 3000;
const ROOM: u32 = 6000;
/// A page in the last frame, and the bytes of its first word.
const LAST: FrameId = FrameId(RESERVED - 1);
const MOVED: FrameRecord = FrameRecord { page: PageNo(7), valid: SectorMask::ALL, dirty: SectorMask::ALL };
const WORD: u64 = 77;

fn put_page(arena: &Arena, frame: FrameId) {
    arena.memory.zero(arena.frame_offset(frame), PAGE_SIZE);
    arena.memory.store(arena.frame_offset(frame), WORD);
    arena.publish(frame, MOVED);
}

/// The steps of the cache and of its memory thread when the cache shrinks to half its size.
fn shrink(arena: &Arena) {
    arena.copy_sectors(LAST, FrameId(0), SectorMask::ALL);
    arena.publish(FrameId(0), MOVED);
    arena.publish(LAST, FrameRecord::empty(MOVED.page));
    arena.set_frames_in_use(RESERVED as usize / 2);
    while arena.free_unused().unwrap() {}
}

/// States in which a daemon does not find the page with its bytes in a frame that has memory.
fn states_without_page(step: &Step) -> Vec<String> {
    let fault = |state| {
        let file = Directory::new(&step.in_state(state)).file();
        let header = file.header().unwrap().unwrap();
        let arena = Arena::attach(file, &header).unwrap();
        let recorded: Vec<_> = arena.records().collect();
        let is_right = |(frame, record): &(FrameId, FrameRecord)| {
            frame.index() < arena.reserved_frames()
                && *record == MOVED
                && arena.memory.load(arena.frame_offset(*frame)) == WORD
        };
        let all_right = !recorded.is_empty() && recorded.iter().all(is_right);
        (!all_right).then(|| format!("{recorded:?} of {} frames", arena.reserved_frames()))
    };
    crash_states(&step.events).into_iter().filter_map(fault).collect()
}

#[test]
fn a_resize_keeps_a_pages_bytes_at_every_step() {
    let spec = spec_with_room(RESERVED as usize, ROOM as usize, GuestState::FRESH);
    let shrunk = Step::on_arena_of(&spec, |arena| put_page(arena, LAST), shrink);
    assert!(crash_states(&shrunk.events).len() > 5);
    assert_eq!(states_without_page(&shrunk), [""; 0]);
    let grown = Step::on_arena_of(
        &spec,
        |arena| put_page(arena, LAST),
        |arena| {
            arena.reserve(ROOM as usize).unwrap();
            arena.set_frames_in_use(ROOM as usize);
            put_page(arena, FrameId(ROOM - 1));
        },
    );
    assert_eq!(states_without_page(&grown), [""; 0]);
}

#[test]
fn the_crash_check_catches_memory_freed_before_its_records_are_cleared() {
    let spec = spec_with_room(RESERVED as usize, ROOM as usize, GuestState::FRESH);
    let step = || Step::on_arena_of(&spec, |arena| put_page(arena, LAST), shrink);
    let freed = |event: &TraceEvent| matches!(event, TraceEvent::File(_, FileChange::ZerosFrom(_)));
    let first = step().events.iter().position(freed).unwrap();
    assert!(!states_without_page(&reordered(step(), first, 1)).is_empty());
}

// The checks find what they are meant to find: the same steps with their stores in a wrong order.

/// Moves the event at `from` to before the one at `to`.
fn reordered(mut step: Step, from: usize, to: usize) -> Step {
    let event = step.events.remove(from);
    step.events.insert(to, event);
    step
}

/// Positions of the stores among the events.
fn stores(step: &Step) -> Vec<usize> {
    (0..step.events.len()).filter(|&at| matches!(step.events[at], TraceEvent::Store(_))).collect()
}

#[test]
fn the_crash_check_catches_a_header_marked_complete_too_early() {
    let create = || Step::run(&[], |file| Arena::persistent(file, &spec(FRAMES, WRITE_THROUGH)).unwrap());
    let is_allowed = |found: &Found| *found == Found::Nothing || found.guest() == WRITE_THROUGH;
    assert_eq!(create().faults(is_allowed), [""; 0]);
    let stores = stores(&create());
    let magic_first = reordered(create(), stores[stores.len() - 1], stores[0]);
    assert!(!magic_first.faults(is_allowed).is_empty());
}

#[test]
fn the_crash_check_catches_frames_counted_before_the_guest_state_is_stored() {
    let (marker, _) = earlier_files().remove(1);
    let create = || Step::run(&marker, |file| Arena::persistent(file, &spec(FRAMES, LOST)).unwrap());
    let is_allowed = |found: &Found| !matches!(found, Found::Cache { guest, .. } if *guest != LOST);
    assert_eq!(create().faults(is_allowed), [""; 0]);
    let stores = stores(&create());
    let frames_first = reordered(create(), stores[stores.len() - 2], stores[1]);
    assert!(!frames_first.faults(is_allowed).is_empty());
}

#[test]
fn the_crash_check_catches_a_range_whose_length_is_stored_first() {
    let note = || Step::on_arena(|_| {}, |arena| arena.note_zero(5, Some(ZEROES)));
    let is_allowed =
        |found: &Found| matches!(found, Found::Cache { zeroes, .. } if zeroes.is_empty() || *zeroes == [(5, ZEROES)]);
    assert_eq!(note().faults(is_allowed), [""; 0]);
    let stores = stores(&note());
    assert!(!reordered(note(), stores[1], stores[0]).faults(is_allowed).is_empty());
}

//! Several writers of one page.

use std::sync::{Arc, Mutex};

use super::*;

/// Memory that logs the sectors that are copied between frames, and the last record of each page that has one.
#[derive(Clone, Debug, Default)]
struct Log {
    copied: Arc<Mutex<Vec<SectorMask>>>,
    recorded: Arc<Mutex<Option<FrameRecord>>>,
}

impl FrameMemory for Log {
    fn copy_sectors(&self, _: FrameId, _: FrameId, mask: SectorMask) {
        self.copied.lock().unwrap().push(mask);
    }
    fn zero_sectors(&self, _: FrameId, _: SectorMask) {}
    fn publish(&self, _: FrameId, record: FrameRecord) {
        if record.page == PageNo(0) {
            *self.recorded.lock().unwrap() = Some(record);
        }
    }
    fn zero_slots(&self) -> usize {
        4
    }
    fn note_zero(&self, _: usize, _: Option<SectorSpan>) {}
}

fn logged() -> (PageCache, Log) {
    let log = Log::default();
    let settings = Settings { readahead_pages_max: 0, ..Settings::of(64, 1 << 20) };
    (PageCache::new(settings, Box::new(log.clone())), log)
}

/// Writes sectors 0 and 1 of the first page, while another writer fills sectors 4 and 5. Returns the other one's piece.
fn write_beside_another(cache: &mut PageCache) -> Piece {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    assert_eq!(cache.write(access(0, 2), &mut first), Admitted::All);
    assert_eq!(cache.write(access(4, 2), &mut second), Admitted::All);
    cache.finish_write(&first[0], CopyResult::Complete);
    second[0]
}

#[test]
fn a_read_in_skips_the_sectors_of_an_unfinished_writer() {
    let (mut cache, log) = logged();
    let piece = write_beside_another(&mut cache);
    assert!(!read(&mut cache, 6, 2), "these sectors must be read in");
    let ops = complete_all(&mut cache, Tick::from_us(1));
    assert_eq!(ops, [(OpKind::Read, SectorSpan::new(0, 8))]);
    assert_eq!(*log.copied.lock().unwrap(), [SectorMask::run(2, 2).or(SectorMask::run(6, 2))]);
    assert!(!read(&mut cache, 4, 2), "the other writer has not finished");
    cache.finish_write(&piece, CopyResult::Complete);
    assert_eq!(return_pieces(&mut cache), 1, "the read gets what was written");
    assert!(read(&mut cache, 0, 8), "all of the page is in memory");
    cache.check(&[]);
}

/// If the daemon dies now, the store has the bytes of these sectors, and the frame has some of the guest's.
#[test]
fn the_ledger_omits_clean_sectors_of_an_unfinished_writer() {
    let (mut cache, log) = logged();
    read(&mut cache, 0, 8);
    complete_all(&mut cache, Tick::from_us(1));
    let recorded = || log.recorded.lock().unwrap().map(|record| (record.valid, record.dirty));
    assert_eq!(recorded(), Some((SectorMask::ALL, SectorMask::NONE)));
    let piece = write_beside_another(&mut cache);
    let others = SectorMask::ALL.without(SectorMask::run(4, 2));
    assert_eq!(recorded(), Some((others, SectorMask::run(0, 2))));
    cache.finish_write(&piece, CopyResult::Complete);
    assert_eq!(recorded(), Some((SectorMask::ALL, SectorMask::run(0, 2).or(SectorMask::run(4, 2)))));
    cache.check(&[]);
}

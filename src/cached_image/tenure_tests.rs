//! When a tenure counts as over: an image's record must not say so while the cache has what the image lacks.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::CachedImage;
use crate::arena::{Arena, ArenaFile, ArenaSpec, GuestState, ImageFacts, TenureFacts};
use crate::cache::{ErrorPolicy, PolicyKind, Settings};
use crate::error::Result;
use crate::image_id::ImageId;
use crate::store::{Backing, Limits, StoreQueue};
use crate::tenure::TenureId;
use crate::units::{FrameId, FrameRecord, ImageHoles, PageNo, SectorMask, SectorSpan};

const FRAMES: u32 = 16;
const IMAGE_SECTORS: u64 = 1024;

/// Counts how often a tenure ended.
#[derive(Debug, Default)]
struct Recorded(AtomicU32);

impl Backing for Recorded {
    fn limits(&self) -> &Limits {
        unreachable!("nothing asks for them")
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        unreachable!("nothing is read")
    }

    fn end_tenure(&self) -> io::Result<bool> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }
}

fn settings() -> Settings {
    Settings {
        frames: FRAMES,
        image_sectors: IMAGE_SECTORS,
        block_sectors: 1,
        holes: ImageHoles::Unmappable,
        cluster_pages_max: 64,
        retain: true,
        policy: PolicyKind::S3Fifo,
        readahead_pages_max: 0,
        flush_target_us: 250_000,
        dirty_pages_max: FRAMES,
        dirty_age_us: 1_000_000,
        allocate: false,
        unmap: true,
        on_error: ErrorPolicy::Report,
        on_full: ErrorPolicy::Report,
        page_key: 0,
        hold_us: 10_000,
    }
}

/// Ends a cache that `prepare` has made what it is; returns how often the image was told that the tenure is over.
fn ended_tenures(test: &str, prepare: impl Fn(&Arena)) -> u32 {
    let directory: PathBuf = std::env::temp_dir().join(format!("genblk-{test}-{}", std::process::id()));
    let identity = ImageId { device: 1, inode: 2, born_ns: 3 };
    let image = ImageFacts { identity, size_bytes: IMAGE_SECTORS * 512, path: "/image".into(), alias: String::new() };
    let id = TenureId { generation: 1, id: 2 };
    let tenure = TenureFacts { id, since: 0, is_recorded: true, is_over: false };
    let spec = ArenaSpec { frames: FRAMES as usize, image: &image, tenure, guest: GuestState::FRESH };
    let file = ArenaFile::create_for(&directory, &image).unwrap();
    let arena = Arena::persistent(file, &spec).map_err(|e| e.error).unwrap();
    prepare(&arena);
    let recorded = Arc::new(Recorded::default());
    let backing: Arc<dyn Backing> = recorded.clone();
    drop(CachedImage::new("test", backing, arena, settings()));
    std::fs::remove_dir_all(directory).unwrap();
    recorded.0.load(Ordering::Relaxed)
}

#[test]
fn a_tenure_is_over_only_when_the_image_has_everything_and_no_loss_is_unknown_to_the_guest() {
    let page = |dirty| FrameRecord { page: PageNo(3), valid: SectorMask::ALL, dirty };
    let is_over = |test: &str, prepare: &dyn Fn(&Arena)| ended_tenures(test, prepare) == 1;
    assert!(is_over("tenure-clean", &|arena| arena.publish(FrameId(0), page(SectorMask::NONE))));
    assert!(!is_over("tenure-dirty", &|arena| arena.publish(FrameId(0), page(SectorMask::run(2, 1)))));
    assert!(!is_over("tenure-zeroes", &|arena| arena.note_zero(0, Some(SectorSpan::new(8, 8)))));
    assert!(!is_over("tenure-lost", &Arena::set_data_loss));
}

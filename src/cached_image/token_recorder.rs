//! Records the image's change token whenever no change of the image is in flight.
//!
//! A local file system has the attributes of a file in memory, so a worker queries them. Other file systems (NFS, FUSE,
//! SMB) may query a server, which may not respond: for these a thread of the image does it, and no request of the guest
//! waits.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use log::warn;

use crate::arena::{Arena, IdlePoint};
use crate::store::Backing;

/// The state that the callers share with the thread.
#[derive(Debug, Default)]
struct RecorderState {
    /// The latest idle point for which the token is to be recorded.
    idle: Option<IdlePoint>,
    /// Recording has ended.
    ended: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<RecorderState>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, RecorderState> {
        self.state.lock().expect("no thread panics with the state locked")
    }
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct TokenRecorder {
    /// The shared state of the thread; `None`: the caller queries the token itself.
    thread: Option<Arc<Shared>>,
}

impl TokenRecorder {
    /// Starts the recorder. If the thread cannot be started, no token of an image on a server is recorded, and recovery
    /// compares pages instead.
    pub(super) fn start(name: &str, backing: &Arc<dyn Backing>, arena: &Arc<Arena>) -> Self {
        if !backing.idle_token_may_wait() {
            return Self { thread: None };
        }
        let shared = Arc::new(Shared::default());
        let orders = Arc::clone(&shared);
        // If the image hangs, the thread must not keep the lock of the image or the cache alive.
        let (backing, arena) = (Arc::downgrade(backing), Arc::downgrade(arena));
        let run = move || {
            while let Some(idle) = next(&orders) {
                let Some(backing) = backing.upgrade() else { return };
                let token = backing.idle_token();
                drop(backing);
                let state = orders.lock();
                if let (Some(token), Some(arena), false) = (token, arena.upgrade(), state.ended) {
                    // Does nothing if a change has started since `idle`.
                    arena.record_token(idle, token);
                }
            }
        };
        if let Err(e) = thread::Builder::new().name(format!("token {name}")).spawn(run) {
            warn!(
                "{name}: cannot start the thread that records the image's timestamps: {e}; after a crash, the image \
                 may be refused as changed"
            );
        }
        Self { thread: Some(shared) }
    }

    /// Records the token for the moment `idle`, unless a change starts meanwhile.
    pub(super) fn record_when_idle(&self, idle: IdlePoint, backing: &Arc<dyn Backing>, arena: &Arena) {
        match &self.thread {
            Some(shared) => {
                shared.lock().idle = Some(idle);
                shared.changed.notify_one();
            }
            None => {
                if let Some(token) = backing.idle_token() {
                    arena.record_token(idle, token);
                }
            }
        }
    }

    /// Stops recording, because the end of the tenure records the last token. Does not wait for the image.
    pub(super) fn end(&self) {
        if let Some(shared) = &self.thread {
            shared.lock().ended = true;
            shared.changed.notify_one();
        }
    }
}

impl Drop for TokenRecorder {
    fn drop(&mut self) {
        self.end();
    }
}

/// The next idle point for which a token is to be recorded; `None` at the end.
fn next(orders: &Shared) -> Option<IdlePoint> {
    let mut state = orders.lock();
    loop {
        if state.ended {
            return None;
        }
        if let Some(idle) = state.idle.take() {
            return Some(idle);
        }
        state = orders.changed.wait(state).expect("no thread panics with the state locked");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::arena::{ArenaFile, ArenaSpec, GuestState, ImageFacts, TenureFacts};
    use crate::error::Result;
    use crate::image_id::ImageId;
    use crate::store::{Limits, StoreQueue};
    use crate::tenure::TenureId;
    use crate::tenure::token::ChangeToken;
    use crate::units::SectorSpan;

    /// An image whose server responds when the test lets it.
    #[derive(Debug)]
    struct Remote {
        asked: Sender<()>,
        answers: Mutex<Receiver<ChangeToken>>,
    }

    impl Backing for Remote {
        fn limits(&self) -> &Limits {
            unreachable!("no caller needs them")
        }

        fn attach(&self) -> Result<Box<dyn StoreQueue>> {
            unreachable!("nothing is read")
        }

        fn idle_token(&self) -> Option<ChangeToken> {
            self.asked.send(()).ok()?;
            self.answers.lock().ok()?.recv().ok()
        }

        fn idle_token_may_wait(&self) -> bool {
            true
        }
    }

    #[test]
    fn no_caller_waits_for_the_attributes_of_a_remote_image() {
        let (asked, is_asked) = channel();
        let (answer, answers) = channel();
        let backing: Arc<dyn Backing> = Arc::new(Remote { asked, answers: Mutex::new(answers) });
        let (directory, arena) = persistent_arena();
        let recorder = TokenRecorder::start("test", &backing, &arena);
        let token = |modified_ns| ChangeToken { modified_ns, ..ChangeToken::default() };
        arena.begin_change(SectorSpan::new(0, 8));
        let began = Instant::now();
        recorder.record_when_idle(arena.idle_point().expect("a change"), &backing, &arena);
        assert!(began.elapsed() < Duration::from_secs(1));
        is_asked.recv_timeout(Duration::from_secs(10)).expect("the thread asks");
        // A change starts before the image responds: the response is too late.
        arena.begin_change(SectorSpan::new(0, 8));
        let idle = arena.idle_point().expect("a change");
        recorder.record_when_idle(idle, &backing, &arena);
        answer.send(token(1)).unwrap();
        is_asked.recv_timeout(Duration::from_secs(10)).expect("the thread asks again");
        assert!(arena.idle_point().is_some(), "the token of an earlier moment is not recorded");
        answer.send(token(2)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while arena.idle_point().is_some() {
            assert!(Instant::now() < deadline, "the token is recorded");
            thread::yield_now();
        }
        // After the end nothing is recorded, and nothing waits for the thread.
        arena.begin_change(SectorSpan::new(0, 8));
        recorder.record_when_idle(arena.idle_point().expect("a change"), &backing, &arena);
        is_asked.recv_timeout(Duration::from_secs(10)).expect("the thread asks");
        drop(recorder);
        answer.send(token(3)).unwrap();
        thread::sleep(Duration::from_millis(50));
        assert!(arena.idle_point().is_some());
        drop(arena);
        std::fs::remove_dir_all(directory).unwrap();
    }

    /// A directory in memory with the arena of a cache.
    fn persistent_arena() -> (std::path::PathBuf, Arc<Arena>) {
        let directory = std::env::temp_dir().join(format!("genblk-token-{}", std::process::id()));
        let identity = ImageId { device: 1, inode: 2, born_ns: 3 };
        let image = ImageFacts { identity, size_bytes: 1 << 20, path: "/image".into(), alias: String::new() };
        let id = TenureId { generation: 1, id: 2 };
        let tenure = TenureFacts { id, since: 0, is_recorded: false, is_over: false };
        let spec = ArenaSpec { frames: 4, reserved: 4, image: &image, tenure, guest: GuestState::FRESH };
        let file = ArenaFile::create_for(&directory, &image).unwrap();
        let arena = Arena::persistent(file, &spec).map_err(|e| e.error).unwrap();
        (directory, Arc::new(arena))
    }
}

//! The remains of earlier daemons for an image: its record, and the caches that may belong to it. Decides which of them
//! may be used, and refuses to serve the image while an unusable cache may hold completed writes of it.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use log::{error, info, warn};

use super::proof::{MatchStrength, Proof, SET_ASIDE, prove};
use super::search::{Candidate, Search, allowed_owner, has_identity, is_of};
use super::write_back::Unwritten;
use crate::arena::{AllowedOwner, Arena, ArenaFile, GuestData, GuestState, ImageFacts};
use crate::config::DeviceConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::store::file::LastTenure;
use crate::store::named::NamedImage;
use crate::systemd::ServiceManager;
use crate::tenure::TenureId;
use crate::tenure::host::{Boot, BootRelation, booted_at};
use crate::tenure::record::{CacheLocation, Record, TenureState};
use crate::tenure::token::{ChangeVerdict, age_of};
use crate::units::{PAGE_BYTES, counted};

/// See the module.
#[derive(Debug)]
pub(super) struct Leftovers {
    /// The cache that may be used: it belongs to the image in its present state. If there were several, the others hold
    /// no unwritten data.
    pub(super) usable: Option<Candidate>,
    /// The state of the guest, from other sources than that cache.
    pub(super) guest: GuestState,
    /// Generation of the latest tenure; 0 if there was none.
    pub(super) generation: u64,
    /// The record of the last tenure.
    pub(super) record: Option<Record>,
    /// Whether a daemon may have died while it was changing the image, or an operator has set its cache aside since.
    pub(super) may_have_died: bool,
    /// The tenures of the caches that were found, even if they are not used.
    found: HashSet<TenureId>,
}

impl Leftovers {
    /// Finds the remains for an image, which is open and locked.
    ///
    /// # Errors
    /// [`ErrorKind::Ledger`] when the image must not be served in its present state; otherwise as [`Search::run`].
    pub(super) fn find(
        config: &DeviceConfig,
        image: &dyn NamedImage,
        facts: &ImageFacts,
        manager: &Arc<ServiceManager>,
    ) -> Result<Self> {
        let name = &config.name;
        if let Some(moved) = MovedCache::of(image, facts) {
            return Err(moved.refusal(image));
        }
        let record = record_of(name, image, facts)?;
        if let Some(record) = &record {
            refuse_other_host(image, record)?;
        }
        let memory_dir = &config.cache.memory_dir;
        let overlapping = image.overlapping_tenures();
        overlapping.iter().try_for_each(|record| refuse_other_host(image, record))?;
        let search = Search { image, facts, record: record.as_ref(), overlapping: &overlapping, memory_dir, manager };
        let mut left = Self {
            usable: None,
            guest: GuestState::FRESH,
            generation: 0,
            record: record.clone(),
            may_have_died: false,
            found: HashSet::new(),
        };
        left.generation = record.as_ref().map_or(0, |record| record.tenure.generation);
        for candidate in search.run()? {
            left.add(name, config.read_only, image, candidate)?;
        }
        if let Some(record) = &record {
            left.check_cache_exists(name, image, record)?;
        }
        for record in &overlapping {
            left.check_overlapping_cache_exists(image, record)?;
        }
        Ok(left)
    }

    /// Examines another cache.
    fn add(&mut self, name: &str, read_only: bool, image: &dyn NamedImage, candidate: Candidate) -> Result<()> {
        if !candidate.header.is_set_aside {
            self.found.extend(candidate.header.tenure.map(|tenure| tenure.id));
        }
        if candidate.match_strength == MatchStrength::OtherAccess {
            return take_other_access(name, read_only, image, &candidate);
        }
        self.may_have_died |= candidate.header.is_set_aside || !candidate.header.last_seen.is_at_rest;
        let generation = candidate.header.tenure.map_or(0, |tenure| tenure.id.generation);
        self.generation = self.generation.max(generation);
        if let Some(unwritten) = candidate.foreign {
            return refuse_foreign(image, &candidate, unwritten);
        }
        if candidate.header.frames == 0 {
            self.add_marker(read_only, candidate);
            return Ok(());
        }
        if candidate.header.is_set_aside {
            warn_unused(name, image, &candidate, SET_ASIDE);
            return Ok(());
        }
        let Candidate { file, header, match_strength, .. } = candidate;
        let arena = Arena::attach(file, &header)?;
        let proof = prove(&arena, &header, match_strength, image, self.record.as_ref());
        let unwritten = Unwritten::of(&arena);
        let file = arena.into_file().expect(super::HAS_FILE);
        match proof {
            Proof::Proven => self.use_or_refuse(
                name,
                read_only,
                image,
                Candidate { file, header, match_strength, foreign: None },
                unwritten,
            ),
            Proof::Overtaken(why) if unwritten != Unwritten::NOTHING => {
                warn_unused(name, image, &Candidate { file, header, match_strength, foreign: None }, &why);
                Ok(())
            }
            Proof::Refuted(why) | Proof::Unproven(why) if unwritten != Unwritten::NOTHING => {
                Err(refusal(image, &file, unwritten, header.last_seen.heartbeat_ns, &why))
            }
            Proof::Overtaken(why) | Proof::Refuted(why) | Proof::Unproven(why) => {
                self.guest = self.guest.merged_with(header.guest);
                if read_only || match_strength == MatchStrength::Similar {
                    return Ok(());
                }
                info!("{name}: dropped the cache in {file}, which held no unwritten data: {why}");
                self.close_tenure(name, image, header.tenure.map(|tenure| tenure.id));
                // Its record of the guest's state must stay, in case this daemon dies, until the new cache has it.
                file.shrink_to_header()?;
                if let Some(header) = file.header()? {
                    self.add_marker(read_only, Candidate { file, header, match_strength, foreign: None });
                }
                Ok(())
            }
        }
    }

    /// Records a cache that belongs to the image.
    fn use_or_refuse(
        &mut self,
        name: &str,
        read_only: bool,
        image: &dyn NamedImage,
        candidate: Candidate,
        unwritten: Unwritten,
    ) -> Result<()> {
        let Some(Candidate { file, header, .. }) = &self.usable else {
            self.usable = Some(candidate);
            return Ok(());
        };
        if header.frames > 0 && unwritten != Unwritten::NOTHING {
            let context =
                format!("found two caches of image {}, {file} and {}", image.path().display(), candidate.file);
            let hint =
                format!("write them first with \"genblk recover {}\", or remove them with --discard", candidate.file);
            return Err(Error::new(ErrorKind::Ledger, format!("{context}; the second holds {unwritten}; {hint}")));
        }
        if header.frames == 0 {
            // A cache replaces a marker.
            self.guest = self.guest.merged_with(header.guest);
            let marker = self.usable.replace(candidate).expect("it was judged");
            if !read_only {
                marker.file.remove();
            }
            return Ok(());
        }
        self.guest = self.guest.merged_with(candidate.header.guest);
        if !read_only {
            info!("{name}: dropped the cache in {}, which held no unwritten data", candidate.file);
            candidate.file.remove();
        }
        Ok(())
    }

    /// Records a file without pages, which holds only the guest's state.
    fn add_marker(&mut self, read_only: bool, candidate: Candidate) {
        if candidate.match_strength == MatchStrength::Similar {
            return;
        }
        self.guest = self.guest.merged_with(candidate.header.guest);
        if self.usable.is_none() {
            self.usable = Some(candidate);
        } else if !read_only {
            candidate.file.remove();
        }
    }

    /// Records that the tenure of a cache without unwritten data has ended.
    fn close_tenure(&mut self, name: &str, image: &dyn NamedImage, tenure: Option<TenureId>) {
        let Some(record) = &mut self.record else { return };
        if record.state != TenureState::Open || Some(record.tenure) != tenure {
            return;
        }
        record.state = TenureState::Clean;
        if let Err(e) = image.write_record(record) {
            warn!("{name}: cannot record that the image was released: {e}");
        }
    }

    /// Checks that the cache of an open tenure is among those that were found.
    fn check_cache_exists(&mut self, name: &str, image: &dyn NamedImage, record: &Record) -> Result<()> {
        // The tenure may have been ended meanwhile, or its end may be recorded next to the cache's old path.
        let state = self.record.as_ref().map_or(record.state, |record| record.state);
        let noted = recorded_end(record);
        let state = noted.filter(|_| state == TenureState::Open).unwrap_or(state);
        let since = age_of(record.since * 1_000_000_000).as_secs();
        match (state, Boot::current().relation_to(record.boot), &record.cache) {
            _ if self.found.contains(&record.tenure) => {}
            (TenureState::Clean, ..) => {}
            (TenureState::Open, BootRelation::EarlierBoot, _) => {
                error!(
                    "{name}: the host rebooted while image {} was in use (marked {} ago): completed writes that were \
                     not flushed are lost, as on a disk whose power fails",
                    image.path().display(),
                    duration(since)
                );
                if booted_at().is_some_and(|booted| record.since > booted) {
                    error!(
                        "{name}: the image was marked in use after this boot, so another host may have the same \
                         machine ID (a clone): stop genblk there, because it may hold a cache of the image, and give \
                         each host an ID of its own (systemd-machine-id-setup)"
                    );
                }
            }
            (TenureState::Forfeited, ..) | (TenureState::Open, _, CacheLocation::Memory) => {
                self.guest.data = GuestData::Lost;
            }
            (TenureState::Open, _, place) => return Err(missing_cache(image, "", place, since)),
        }
        Ok(())
    }

    /// Checks that the cache of the open tenure of an image that shares bytes with this one is among those that were
    /// found.
    fn check_overlapping_cache_exists(&mut self, image: &dyn NamedImage, record: &Record) -> Result<()> {
        match &record.cache {
            _ if is_over(record, &self.found) => {}
            CacheLocation::Memory => self.guest.data = GuestData::Lost,
            place => {
                let since = age_of(record.since * 1_000_000_000).as_secs();
                return Err(missing_cache(image, "another access to the bytes of ", place, since));
            }
        }
        Ok(())
    }
}

/// How a tenure has ended, if that is recorded next to the place of its cache.
pub(super) fn recorded_end(record: &Record) -> Option<TenureState> {
    match &record.cache {
        CacheLocation::Path(path) => ArenaFile::recorded_tenure_end(path, allowed_owner(), record.tenure),
        _ => None,
    }
}

/// Whether the cache of an open tenure holds nothing that is missing: it was found, or its end is recorded next to the
/// place of the cache, or the host has rebooted since.
pub(super) fn is_over(record: &Record, found: &HashSet<TenureId>) -> bool {
    recorded_end(record).is_some()
        || found.contains(&record.tenure)
        || Boot::current().relation_to(record.boot) == BootRelation::EarlierBoot
}

/// The record of the image's last tenure, if there is one that was written for this image.
pub(super) fn record_of(name: &str, image: &dyn NamedImage, facts: &ImageFacts) -> Result<Option<Record>> {
    let shown = image.path().display();
    let failed = |e| {
        Error::io(ErrorKind::Image, format!("cannot read the record of the last daemon that used image {shown}"), e)
    };
    match image.last_tenure().map_err(failed)? {
        LastTenure::NoRecords | LastTenure::None => Ok(None),
        LastTenure::Recorded(record) if is_of(&record, facts) => Ok(Some(record)),
        LastTenure::Recorded(record) => {
            if record.state == TenureState::Open {
                warn!(
                    "{name}: image {shown} was copied from an image that was in use: completed writes that were not \
                     flushed then are not in the copy"
                );
            }
            Ok(None)
        }
        LastTenure::Unreadable(why) => {
            let context = format!(
                "image {shown} has a record of the last daemon that used it, which this version of genblk cannot \
                 read: {why}"
            );
            let hint = format!(
                "a cache may hold completed writes; if you know that none does, remove the record with \"genblk \
                 take-over {shown}\""
            );
            Err(Error::new(ErrorKind::Ledger, format!("{context}; {hint}")))
        }
    }
}

/// A cache with completed writes of the file from which an image was copied, if that file no longer exists: most likely
/// the image was moved from another file system.
#[derive(Debug)]
pub(super) struct MovedCache {
    file: ArenaFile,
    unwritten: Unwritten,
    /// The path of the file from which the image was copied.
    from: PathBuf,
}

impl MovedCache {
    /// `None` if the image has no record of another file; if that file still exists; if its cache is in use, or holds
    /// nothing; or if the image shows that it was copied before, or was changed since.
    pub(super) fn of(image: &dyn NamedImage, facts: &ImageFacts) -> Option<Self> {
        let LastTenure::Recorded(record) = image.last_tenure().ok()? else { return None };
        let CacheLocation::Path(path) = &record.cache else { return None };
        if record.state != TenureState::Open || is_of(&record, facts) {
            return None;
        }
        let file = ArenaFile::open_existing(path, AllowedOwner::Own).ok()?;
        let survey = file.survey().ok()??;
        let (header, unwritten) = (&survey.header, Unwritten::surveyed(&survey));
        let is_its_cache = header.tenure.is_some_and(|tenure| tenure.id == record.tenure) && !header.is_set_aside;
        let is_there = has_identity(&header.image.path, &header.image.identity);
        let was_changed = matches!(header.last_seen.judge(&image.found_token()), ChangeVerdict::Changed(_));
        if !survey.is_dirty() || !is_its_cache || is_there || was_changed {
            return None;
        }
        Some(Self { unwritten, from: header.image.path.clone(), file })
    }

    fn refusal(&self, image: &dyn NamedImage) -> Error {
        let Self { file, unwritten, from } = self;
        let (image, from) = (image.path().display(), from.display());
        let context = format!(
            "image {image} was moved or copied from {from}, which no longer exists, and {file}, the cache of that \
             file, holds {unwritten}"
        );
        let hint = format!(
            "if it was moved, write them with \"genblk recover --force --image {image} {file}\"; if it is a copy, run \
             \"genblk take-over {image}\" to serve it without them"
        );
        Error::new(ErrorKind::Ledger, format!("{context}; {hint}"))
    }

    /// What it is, and what it holds.
    pub(super) fn describe(&self) -> String {
        format!("{}, the cache of {}, which holds {}", self.file, self.from.display(), self.unwritten)
    }
}

/// Refuses an image whose cache another host may hold.
fn refuse_other_host(image: &dyn NamedImage, record: &Record) -> Result<()> {
    if record.state != TenureState::Open || Boot::current().relation_to(record.boot) != BootRelation::OtherHost {
        return Ok(());
    }
    let image = image.path().display();
    let place = location_text(&record.cache);
    let since = duration(age_of(record.since * 1_000_000_000).as_secs());
    let (host, is_maybe_here) = match (record.boot.machine, Boot::current().machine) {
        (0, _) => ("a host without a machine ID".to_owned(), true),
        (host, here) => (format!("host {host:032x}"), here == 0),
    };
    let context = format!(
        "image {image} was marked in use by {host} {since} ago and never released; its cache is {place} on that host"
    );
    let hint = if is_maybe_here {
        format!(
            "if that was this host before its last boot, completed writes that were not flushed are lost; if it was \
             another host, start genblk there, or stop it there with SIGTERM; then run \"genblk take-over {image}\"; \
             give each host a machine ID (systemd-machine-id-setup)"
        )
    } else {
        format!(
            "start genblk on that host, or stop it there with SIGTERM; if that host will not return, run \"genblk \
             take-over {image}\" to serve the image here without the completed writes of that cache"
        )
    };
    Err(Error::new(ErrorKind::Ledger, format!("{context}; {hint}")))
}

/// Logs that a cache is not used, and its contents.
fn warn_unused(name: &str, image: &dyn NamedImage, candidate: &Candidate, why: &str) {
    let file = &candidate.file;
    let holds = match candidate.unwritten() {
        Ok(Unwritten::NOTHING) => return,
        Ok(unwritten) => format!("is ignored ({why}); it holds {unwritten} of {}", image.path().display()),
        Err(e) => format!("is ignored ({why}), and cannot be read ({e})"),
    };
    warn!("{name}: {file} {holds}; {}", file.removal_hint());
}

/// Refuses an image whose bytes have completed writes in a cache of another image: a loop device and its file, or a
/// disk and its partition. Drops the pages of such a cache without unwritten data: this daemon will write to the same
/// bytes.
fn take_other_access(name: &str, read_only: bool, image: &dyn NamedImage, candidate: &Candidate) -> Result<()> {
    let (file, unwritten) = (&candidate.file, candidate.unwritten()?);
    if candidate.header.is_set_aside {
        return Ok(());
    }
    if unwritten == Unwritten::NOTHING {
        if read_only || candidate.foreign.is_some() || candidate.header.frames == 0 {
            return Ok(());
        }
        let other = candidate.header.image.path.display();
        info!("{name}: dropped the cache in {file} of {other}, which shares data with the image");
        return file.shrink_to_header();
    }
    let (image, other) = (image.path().display(), candidate.header.image.path.display());
    let context = format!("{file}, the cache of {other}, which shares data with image {image}, holds {unwritten}");
    let hint = format!(
        "to write them, run \"genblk recover {file}\"; to serve the image without them, run \"genblk take-over \
         {image}\""
    );
    Err(Error::new(ErrorKind::Ledger, format!("{context}; {hint}")))
}

/// Refuses a cache of another user that holds completed writes of the image.
fn refuse_foreign(image: &dyn NamedImage, candidate: &Candidate, unwritten: Unwritten) -> Result<()> {
    let Candidate { file, header, .. } = candidate;
    let (owner, image) = (file.owner(), image.path().display());
    let holds = if header.frames > 0 && unwritten != Unwritten::NOTHING {
        format!("holds {unwritten}")
    } else if header.frames == 0 && header.guest.data == GuestData::Lost {
        "records that completed writes were lost".to_owned()
    } else {
        return Ok(());
    };
    let context = format!("{file}, a cache of image {image} that user {owner} left, {holds}");
    let hint = format!(
        "start genblk as that user, or run \"genblk recover {file}\" as that user; to serve the image without them, \
         run \"genblk take-over {image}\""
    );
    Err(Error::new(ErrorKind::Ledger, format!("{context}; {hint}")))
}

/// The error for a cache with completed writes that must not be used.
pub(super) fn refusal(
    image: &dyn NamedImage,
    file: &ArenaFile,
    unwritten: Unwritten,
    heartbeat_ns: u64,
    why: &str,
) -> Error {
    let image = image.path().display();
    let mib = (unwritten.pages as u64 * PAGE_BYTES).div_ceil(1 << 20);
    let last = match heartbeat_ns {
        0 => String::new(),
        at => format!(", the last written {} ago", duration(age_of(at).as_secs())),
    };
    let context = format!("image {image} has changed since its cache {file} was written: {why}");
    let holds = format!("the cache holds {unwritten} ({mib} MiB{last})");
    Error::new(ErrorKind::Ledger, format!("{context}; {holds}; {}", remedies(&image.to_string(), file)))
}

/// The operator's choices for a cache that must not be used.
fn remedies(image: &str, file: &ArenaFile) -> String {
    let serve = format!("to serve the image without the cache, run \"genblk take-over {image}\"");
    if file.is_in_fdstore() {
        return format!("{serve}; to delete the cache, {}", file.removal_hint());
    }
    format!(
        "to overwrite the current image with the cache, run \"genblk recover --force {file}\"; to delete the cache, \
         run \"genblk recover --discard {file}\"; {serve}"
    )
}

/// The error for a cache that is not at its recorded place: of the image, or of `what` precedes its name.
fn missing_cache(image: &dyn NamedImage, what: &str, place: &CacheLocation, since: u64) -> Error {
    let image = image.path().display();
    let context = format!(
        "{what}image {image} was marked in use {} ago and never released, but its cache {} does not exist: it was \
         removed, or is in another container's memory",
        duration(since),
        location_text(place)
    );
    let hint = format!(
        "if it is in another container, start genblk there; if it was removed, completed writes that were not flushed \
         are lost: run \"genblk take-over {image}\" to serve the image without them"
    );
    Error::new(ErrorKind::Ledger, format!("{context}; {hint}"))
}

/// The place of a cache in words.
fn location_text(place: &CacheLocation) -> String {
    match place {
        CacheLocation::Path(path) => path.display().to_string(),
        CacheLocation::FdStore(name) => format!("fd-store entry {name}"),
        CacheLocation::Memory => "only in its daemon's memory".to_owned(),
    }
}

/// A number of seconds in the largest suitable unit.
fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => counted(seconds, "second"),
        120..7200 => counted(seconds / 60, "minute"),
        7200..172_800 => counted(seconds / 3600, "hour"),
        _ => counted(seconds / 86_400, "day"),
    }
}

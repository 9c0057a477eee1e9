//! The copy server, which is the limit of cached rows: it uses genblk's virtqueues and parser, and copies between the
//! guest and a large buffer. It has no cache, no lock and no store, so its cost is that of the virtqueues and the
//! copies.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use genblk::arena::{Arena, Populator};
use genblk::broker::Broker;
use genblk::counters::worker::Counters;
use genblk::device::control::Workers;
use genblk::device::ring::Ring;
use genblk::device::{Device, WorkerCommand, WorkerControl};
use genblk::listener::{SocketAccess, bind};
use genblk::units::{FrameId, PAGE_SIZE, SECTOR_BYTES};
use genblk::vhost::Server;
use genblk::virtio::Status;
use genblk::virtio::chain::DescriptorTable;
use genblk::virtio::config_space::{DiscardLimits, DiskParameters};
use genblk::virtio::guest_copy::{GuestCursor, write_status};
use genblk::virtio::request::{Malformed, Request, RequestKind, RequestLimits, parse, serial};
use genblk::waker::Waker;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// genblk's default `poll_us`.
const POLL: Duration = Duration::from_micros(50);
/// Requests per turn, as many as genblk's worker takes.
const BATCH: usize = 64;
const QUEUE_SIZE: u16 = 1024;
const QUEUES: u16 = 64;

/// Serves a disk of `disk_bytes` until it is killed. All offsets map into a buffer of `buffer_bytes`.
///
/// # Errors
/// The system's.
pub fn serve(socket: &Path, disk_bytes: u64, buffer_bytes: usize) -> io::Result<()> {
    let capacity_sectors = disk_bytes / SECTOR_BYTES;
    let discard = DiscardLimits::new(0, 0);
    let disk = RequestLimits {
        capacity_sectors: capacity_sectors.into(),
        read_only: false,
        can_discard: false,
        max_discard_sectors: discard.max_sectors,
        can_zero: false,
        serial: serial("limit"),
    };
    let parameters = DiskParameters {
        capacity_sectors,
        block_bytes: 512,
        physical_block_bytes: 4096,
        optimal_io_bytes: 0,
        discard,
        num_queues: QUEUES,
        read_only: false,
        can_discard: false,
        can_zero: false,
        zero_may_unmap: false,
    };
    // The same kind of memory as genblk's frames, with the same alignment: relative alignment affects the speed of
    // copies.
    let buffer = Arc::new(Arena::anonymous(buffer_bytes / PAGE_SIZE).map_err(io::Error::other)?);
    let device = Device::new("limit".to_string(), Arc::clone(&buffer), disk, parameters, true, 0, Counters::new(0)?);
    let waker = Arc::new(Waker::new()?);
    let (control, commands) = WorkerControl::new("limit", Arc::clone(&waker));
    let _populator = Populator::start("limit", &buffer);
    let kicks = Epoll::new()?;
    kicks.ctl(ControlOperation::Add, waker.as_raw_fd(), EpollEvent::new(EventSet::IN, u64::MAX))?;
    let worker = Copier { commands, waker, kicks, rings: BTreeMap::new(), disk: device.disk.clone(), buffer };
    std::thread::spawn(move || worker.run());
    let broker = Broker::start("limit").expect("a thread can be started");
    let serve = |listener| {
        Server::new(device, Arc::new(Workers::new(vec![control])), QUEUE_SIZE, listener, broker, None, false)
    };
    let (listener, _bound) = bind("limit", socket, SocketAccess::OWNER).map_err(io::Error::other)?;
    serve(listener).map_err(io::Error::other)?.serve();
    Ok(())
}

struct Copier {
    commands: Receiver<WorkerCommand>,
    waker: Arc<Waker>,
    /// Watches the kick eventfds and the waker.
    kicks: Epoll,
    rings: BTreeMap<u16, Ring>,
    disk: RequestLimits,
    buffer: Arc<Arena>,
}

impl Copier {
    fn run(mut self) {
        let (mut heads, mut request) = (Vec::new(), Request::default());
        let mut idle_since = Instant::now();
        loop {
            if self.waker.take_notified() {
                self.handle_commands();
            }
            let mut worked = false;
            for ring in self.rings.values_mut().filter(|ring| ring.has_more()) {
                worked = true;
                heads.clear();
                ring.take(BATCH, &mut heads);
                let memory = Arc::clone(&ring.memory);
                let table = ring.table(&memory);
                table.prefetch_heads(&memory, &heads);
                for &head in &heads {
                    serve_one(ring, &table, head, &mut request, &self.disk, &self.buffer);
                }
                ring.publish();
            }
            if worked {
                idle_since = Instant::now();
            } else if self.rings.is_empty() || idle_since.elapsed() > POLL {
                self.sleep();
                idle_since = Instant::now();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// No request outlives its turn, so each command takes effect immediately.
    fn handle_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                WorkerCommand::Start(index, setup, reply) => {
                    let ring = Ring::new("limit", index, *setup);
                    ring.watch_kicks(&self.kicks, u64::from(index)).expect("an eventfd can be watched");
                    self.rings.insert(index, ring);
                    let _ = reply.send(());
                }
                WorkerCommand::Stop(index, reply) => {
                    let ring = self.rings.remove(&index).inspect(|ring| ring.unwatch_kicks(&self.kicks));
                    let _ = reply.send(ring.map(|ring| ring.position()));
                }
                WorkerCommand::SetCallFd(index, call_fd, reply) => {
                    if let Some(ring) = self.rings.get_mut(&index) {
                        ring.set_call_fd(call_fd);
                    }
                    let _ = reply.send(());
                }
                WorkerCommand::SetErrFd(index, err_fd, reply) => {
                    if let Some(ring) = self.rings.get_mut(&index) {
                        ring.set_err_fd(err_fd);
                    }
                    let _ = reply.send(());
                }
                WorkerCommand::Memory(memory, reply) => {
                    self.rings.values_mut().for_each(|ring| ring.set_memory(&memory));
                    let _ = reply.send(());
                }
                WorkerCommand::Flush(reply) => {
                    let _ = reply.send(Ok(()));
                }
                WorkerCommand::Resume(reply) | WorkerCommand::DrainBeyond(_, reply) => {
                    let _ = reply.send(());
                }
                // Without a cache there is nothing to drop, to warm or to freeze; who waits learns that nobody replies.
                WorkerCommand::DropClean(..)
                | WorkerCommand::Freeze(..)
                | WorkerCommand::Thaw(_)
                | WorkerCommand::Warm(..)
                | WorkerCommand::Resident(..)
                | WorkerCommand::Reconfigure(..) => {}
                WorkerCommand::Exit(_) | WorkerCommand::Abandon(_) => {}
            }
        }
    }

    fn sleep(&mut self) {
        let mut has_requests = false;
        for ring in self.rings.values_mut() {
            has_requests |= ring.enable_notification();
        }
        if !has_requests {
            // The next turn finds out what woke it.
            let _ = self.kicks.wait(-1, &mut [EpollEvent::default(); 8]);
            self.waker.clear();
        }
        self.rings.values_mut().for_each(Ring::disable_notification);
    }
}

fn serve_one(
    ring: &mut Ring,
    table: &DescriptorTable<'_>,
    head: u16,
    request: &mut Request,
    disk: &RequestLimits,
    buffer: &Arena,
) {
    match parse(&ring.memory, table, head, request) {
        Ok(()) => {
            let ok = request.check(disk).is_ok() && copy(ring, request, buffer);
            let status = if ok { Status::Ok } else { Status::IoErr };
            let _ = write_status(&ring.memory, request.status_addr, status);
            ring.push_used(head, request.used_len(status));
        }
        Err(Malformed::WithStatus { status_addr }) => {
            let _ = write_status(&ring.memory, status_addr, Status::IoErr);
            ring.push_used(head, 1);
        }
        Err(malformed) => ring.reject(head, malformed),
    }
}

fn copy(ring: &Ring, request: &Request, buffer: &Arena) -> bool {
    let len = usize::try_from(request.data_bytes).expect("a request is below 4 GiB");
    let bytes = buffer.frames() * PAGE_SIZE;
    if len > bytes {
        return false;
    }
    // The frames are contiguous.
    let data = buffer.frame(FrameId(0)).wrapping_add((request.sector * SECTOR_BYTES) as usize % (bytes - len + 1));
    let mut cursor = GuestCursor::new(&ring.memory, &request.data);
    match request.kind {
        // SAFETY: `len` bytes from `data` are within the buffer, which is not guest memory and is used only by this
        // thread.
        RequestKind::Read => unsafe { cursor.copy_to_guest(0, data, len, None) }.is_ok(),
        // SAFETY: as above.
        RequestKind::Write => unsafe { cursor.copy_from_guest(0, data, len, None) }.is_ok(),
        _ => true,
    }
}

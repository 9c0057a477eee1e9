//! An NBD server that forgets what was not flushed when it is killed.
//!
//! The test's own executable runs it in a process of its own: genblk recognizes a server that was started again by its
//! process. It keeps changes in a write cache in memory, and writes them to the image at a FLUSH, and some of them
//! earlier. After a TRIM some sectors are zeros and the others keep their data; as long as no FLUSH follows, its death
//! brings the old data back.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use super::SECTOR_BYTES;
use super::nbd_protocol::{
    BLOCK_STATUS, FLUSH, HOLE_OF_ZEROS, READ, Request, TRIM, WRITE, WRITE_ZEROES, chunk, negotiate, receive,
};
use super::nbd_server::SERVER_VARIABLES;

/// One in this many changed sectors is written to the image before a FLUSH.
const EARLY: u64 = 8;
/// Sectors for which a map reports one state.
const MAP_SECTORS: u64 = 8;

type Sector = [u8; SECTOR_BYTES];

/// An image and the changes of it that are not durable.
#[derive(Debug)]
struct WriteCache {
    image: File,
    changed: HashMap<u64, Sector>,
    /// Number of changes of sectors so far.
    changes: u64,
}

/// Serves an image until the process is killed, if the process was started for that by `NbdServer::start_test_server`.
pub fn serve_if_requested() {
    if let [Some(socket), Some(image)] = SERVER_VARIABLES.map(std::env::var_os) {
        serve(Path::new(&socket), Path::new(&image)).expect("the image can be served");
    }
}

/// Serves an image on a socket until the process is killed.
///
/// # Errors
/// Errors of the image and of the socket.
fn serve(socket: &Path, image: &Path) -> io::Result<()> {
    let image = File::options().read(true).write(true).open(image)?;
    let size = image.metadata()?.len();
    let cache = Arc::new(Mutex::new(WriteCache { image, changed: HashMap::new(), changes: 0 }));
    for stream in UnixListener::bind(socket)?.incoming() {
        let (stream, cache) = (stream?, Arc::clone(&cache));
        thread::spawn(move || serve_connection(stream, size, &cache));
    }
    Ok(())
}

fn serve_connection(mut stream: UnixStream, size: u64, cache: &Mutex<WriteCache>) -> io::Result<()> {
    negotiate(&mut stream, size)?;
    while let Some((request, payload)) = receive(&mut stream)? {
        let reply = cache.lock().expect("no connection panics").execute(request, &payload)?;
        stream.write_all(&reply)?;
    }
    Ok(())
}

impl WriteCache {
    fn read(&self, sector: u64) -> io::Result<Sector> {
        if let Some(changed) = self.changed.get(&sector) {
            return Ok(*changed);
        }
        let mut bytes = [0; SECTOR_BYTES];
        self.image.read_exact_at(&mut bytes, sector * SECTOR_BYTES as u64)?;
        Ok(bytes)
    }

    fn change(&mut self, sector: u64, bytes: Sector) -> io::Result<()> {
        self.changed.insert(sector, bytes);
        self.changes += 1;
        if self.changes.is_multiple_of(EARLY) {
            self.image.write_all_at(&bytes, sector * SECTOR_BYTES as u64)?;
        }
        Ok(())
    }

    /// Executes a request; returns the reply.
    fn execute(&mut self, request: Request, payload: &[u8]) -> io::Result<Vec<u8>> {
        let Request { command, cookie, offset, len } = request;
        let first = offset / SECTOR_BYTES as u64;
        let sectors = first..first + u64::from(len) / SECTOR_BYTES as u64;
        match command {
            READ => {
                let mut data = offset.to_be_bytes().to_vec();
                for sector in sectors {
                    data.extend(self.read(sector)?);
                }
                return Ok(chunk(1, 1, cookie, &data));
            }
            BLOCK_STATUS => return Ok(chunk(1, 5, cookie, &self.map(sectors)?)),
            WRITE => {
                let (written, _) = payload.as_chunks::<SECTOR_BYTES>();
                for (sector, bytes) in sectors.zip(written) {
                    self.change(sector, *bytes)?;
                }
            }
            WRITE_ZEROES => {
                for sector in sectors {
                    self.change(sector, [0; SECTOR_BYTES])?;
                }
            }
            TRIM => {
                for sector in sectors.filter(|sector| !sector.is_multiple_of(3)) {
                    self.change(sector, [0; SECTOR_BYTES])?;
                }
            }
            FLUSH => {
                for (sector, bytes) in self.changed.drain() {
                    self.image.write_all_at(&bytes, sector * SECTOR_BYTES as u64)?;
                }
            }
            _ => {}
        }
        Ok(chunk(1, 0, cookie, &[]))
    }

    /// The extents of a range, as in a reply: runs of sectors that are zeros, and data.
    fn map(&self, sectors: std::ops::Range<u64>) -> io::Result<Vec<u8>> {
        let mut data = 1_u32.to_be_bytes().to_vec();
        let mut at = sectors.start;
        while at < sectors.end {
            let end = (at / MAP_SECTORS * MAP_SECTORS + MAP_SECTORS).min(sectors.end);
            let is_hole = (at..end).map(|sector| self.read(sector)).collect::<io::Result<Vec<_>>>()?;
            let is_hole = is_hole.iter().flatten().all(|&byte| byte == 0);
            let len = u32::try_from(end - at).expect("a few") * SECTOR_BYTES as u32;
            data.extend(len.to_be_bytes());
            data.extend(if is_hole { HOLE_OF_ZEROS } else { 0 }.to_be_bytes());
            at = end;
        }
        Ok(data)
    }
}

//! Random bytes from the kernel.

use std::io;

use super::retry_eintr;

/// Unpredictable bytes (getrandom(2)).
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the call writes at most `N` bytes to `bytes`, whose length that is.
    let written = retry_eintr(|| unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) })?;
    if written == N.cast_signed() { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

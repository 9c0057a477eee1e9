//! Copies of bytes that other threads or processes may write at the same time.
//!
//! In Rust's memory model a plain copy with a data race is undefined behaviour, even if every mixture of old and new
//! bytes is acceptable, and there is no stable byte-wise atomic copy. The model does not cover assembler instructions,
//! so on x86-64 these copies use them. (Elsewhere, and in Miri, they are plain copies.)

#[cfg(all(target_arch = "x86_64", not(miri)))]
use std::arch::asm;

/// Bytes of a line of the processor's cache.
pub const LINE_BYTES: usize = 64;

/// The data that a copy prefetches meanwhile: as many bytes as it copies, line by line. The address need not be valid.
///
/// => A page that was not used recently is in none of the processor's caches, and the processor's prefetcher stops at
///    page boundaries: without this, every copy of a page begins with a wait for memory. (Measured on an EPYC: 185 ns
///    for a page out of 128 MiB, 245 ns if only the start of the next page is prefetched, 270 ns without prefetching;
///    and no loss if everything is in the processor's cache.)
#[derive(Clone, Copy, Debug)]
pub enum Ahead {
    /// Nothing.
    Nothing,
    /// Bytes that will be read.
    Read(*const u8),
    /// Bytes that will be written.
    Write(*const u8),
}

/// Copies `len` bytes.
///
/// => It uses no string instruction: one alone is as fast, but the processor runs nothing else in parallel with it.
///
/// # Safety
/// `source` is valid for reads and `target` for writes of `len` bytes; they do not overlap, and no reference covers a
/// byte of either that changes meanwhile. Others may read and write both at the same time through raw pointers or from
/// other processes: each of them must accept any mixture of old and new bytes.
#[inline]
pub unsafe fn copy(source: *const u8, target: *mut u8, len: usize, ahead: Ahead) {
    let mut done = 0;
    while len - done >= LINE_BYTES {
        match ahead {
            Ahead::Nothing => {}
            Ahead::Read(next) => prefetch(next.wrapping_add(done)),
            Ahead::Write(next) => prefetch_to_write(next.wrapping_add(done)),
        }
        // SAFETY: within `len` bytes of both (loop condition).
        unsafe { copy_line(source.add(done), target.add(done)) };
        done += LINE_BYTES;
    }
    if done < len {
        // SAFETY: `done` is below `len`, so this is the rest of both.
        unsafe { copy_rest(source.add(done), target.add(done), len - done) };
    }
}

/// Copies [`LINE_BYTES`] bytes.
///
/// # Safety
/// As for [`copy`].
#[inline]
unsafe fn copy_line(source: *const u8, target: *mut u8) {
    // SAFETY: loads of 64 bytes from `source` and stores of as many to `target`, unaligned, which the caller allows.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    unsafe {
        asm!(
            "movups {a}, [{source}]",
            "movups {b}, [{source} + 16]",
            "movups {c}, [{source} + 32]",
            "movups {d}, [{source} + 48]",
            "movups [{target}], {a}",
            "movups [{target} + 16], {b}",
            "movups [{target} + 32], {c}",
            "movups [{target} + 48], {d}",
            source = in(reg) source,
            target = in(reg) target,
            a = out(xmm_reg) _,
            b = out(xmm_reg) _,
            c = out(xmm_reg) _,
            d = out(xmm_reg) _,
            options(nostack, preserves_flags)
        );
    };
    // SAFETY: guaranteed by the caller.
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, LINE_BYTES);
    };
}

/// Copies any number of bytes, slower than line by line.
///
/// # Safety
/// As for [`copy`].
#[inline]
unsafe fn copy_rest(source: *const u8, target: *mut u8, len: usize) {
    // SAFETY: the instruction reads `len` bytes from `source` and writes them to `target`, upwards (the direction flag
    // is clear at every asm block), which the caller allows.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") source => _,
            inout("rdi") target => _,
            options(nostack, preserves_flags)
        );
    };
    // SAFETY: guaranteed by the caller.
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, len);
    };
}

/// Prefetches the line that holds the byte at `address`, which need not be valid. Does nothing except on x86-64.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables, reason = "there is no portable prefetch"))]
#[inline]
pub fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint. It reads nothing that the program could see, and no address makes it fault.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    };
}

/// Like [`prefetch`], for a line that will be written. A processor without the instruction ignores it.
#[cfg_attr(any(not(target_arch = "x86_64"), miri), allow(unused_variables, reason = "there is no portable prefetch"))]
#[inline]
fn prefetch_to_write(address: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: as above.
    unsafe {
        asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    };
}

/// Fills `len` bytes with zeros.
///
/// # Safety
/// As for the target of [`copy`].
#[inline]
pub unsafe fn zero(target: *mut u8, len: usize) {
    // SAFETY: the instruction writes `len` bytes from `target` on, upwards, which the caller allows.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    unsafe {
        asm!(
            "rep stosb",
            inout("rcx") len => _,
            inout("rdi") target => _,
            in("al") 0u8,
            options(nostack, preserves_flags)
        );
    };
    // SAFETY: guaranteed by the caller.
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    unsafe {
        std::ptr::write_bytes(target, 0, len);
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_address_can_be_prefetched() {
        let mut target = [0; 128];
        let nowhere = std::ptr::without_provenance(usize::MAX - 70);
        for ahead in [Ahead::Read(nowhere), Ahead::Write(nowhere)] {
            // SAFETY: both arrays have 128 bytes.
            unsafe { copy([7; 128].as_ptr(), target.as_mut_ptr(), 128, ahead) };
            assert_eq!(std::mem::take(&mut target[127]), 7);
        }
    }

    #[test]
    fn exactly_the_given_bytes_are_copied_and_zeroed() {
        let source: Vec<u8> = (0..=u8::MAX).cycle().take(5000).collect();
        for (first, len) in [(0, 0), (1, 1), (3, 7), (17, 64), (63, 513), (1, 4096), (100, 4500)] {
            let mut target = vec![0xee; 5000];
            let mut expected = target.clone();
            expected[first..first + len].copy_from_slice(&source[first..first + len]);
            // SAFETY: both vectors have these bytes, and only this test uses them.
            unsafe { copy(source[first..].as_ptr(), target[first..].as_mut_ptr(), len, Ahead::Nothing) };
            assert_eq!(target, expected, "{len} bytes at {first}");
            expected[first..first + len].fill(0);
            // SAFETY: as above.
            unsafe { zero(target[first..].as_mut_ptr(), len) };
            assert_eq!(target, expected, "{len} bytes at {first}");
        }
    }
}

//! Copies of bytes that other threads or processes may write at the same time.
//!
//! In Rust's memory model a plain copy with a data race is undefined behaviour, even if every mixture of old and new
//! bytes is acceptable, and there is no stable byte-wise atomic copy. The model does not cover assembler instructions,
//! so on x86-64 these copies use them. (Elsewhere, and in Miri, they are plain copies.)

#[cfg(all(target_arch = "x86_64", not(miri)))]
use std::arch::{asm, x86_64::_mm256_zeroupper};

/// Bytes of a line of the processor's cache.
const LINE_BYTES: usize = 64;
/// Bytes that a step of a copy moves.
const STEP_BYTES: usize = 2 * LINE_BYTES;

/// Bytes of the next copy's data that a copy prefetches, a step with each step that it copies.
///
/// => A page that was not used recently is in none of the processor's caches, and the processor's own prefetcher stops
///    at page boundaries: without this, every copy of a page begins with a wait for memory. After some lines of a page
///    the processor's prefetcher does the rest. (4 KiB copies out of and into 64 MiB, nanoseconds, on a Xeon: 4 lines
///    393 and 571, 16 lines 390 and 424, all 64 lines 461 and 437. An EPYC had 245 with few lines, and 185 with all.)
const BYTES_AHEAD: usize = 16 * LINE_BYTES;

/// Copies `len` bytes. `ahead` is the address that the next copy will use, if there will be one: its first lines are
/// prefetched. It need not be valid.
///
/// # Safety
/// `source` is valid for reads and `target` for writes of `len` bytes; they do not overlap, and no reference covers a
/// byte of either that changes meanwhile. Others may read and write both at the same time through raw pointers or from
/// other processes: each of them must accept any mixture of old and new bytes.
#[inline]
pub unsafe fn copy(source: *const u8, target: *mut u8, len: usize, ahead: Option<*const u8>) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if is_x86_feature_detected!("avx") {
        // SAFETY: the processor has AVX; the caller guarantees the rest.
        return unsafe { copy_lines(source, target, len, ahead) };
    }
    let _ = ahead;
    // SAFETY: guaranteed by the caller.
    unsafe { copy_bytes(source, target, len) };
}

/// As [`copy`], with vector instructions.
///
/// => A string instruction alone is as fast, but the processor runs nothing else in parallel with it.
///
/// # Safety
/// As for [`copy`].
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx")]
unsafe fn copy_lines(source: *const u8, target: *mut u8, len: usize, ahead: Option<*const u8>) {
    let whole = len - len % STEP_BYTES;
    let mut done = 0;
    if let Some(ahead) = ahead {
        while done < whole.min(BYTES_AHEAD) {
            prefetch(ahead.wrapping_add(done));
            prefetch(ahead.wrapping_add(done + LINE_BYTES));
            // SAFETY: the step is within `len` bytes of both.
            unsafe { copy_step(source, target, done) };
            done += STEP_BYTES;
        }
    }
    while done < whole {
        // SAFETY: as above.
        unsafe { copy_step(source, target, done) };
        done += STEP_BYTES;
    }
    // While the upper halves of the vectors are in use, code without AVX is slower.
    _mm256_zeroupper();
    if done < len {
        // SAFETY: `done` is below `len`, so this is the rest of both.
        unsafe { copy_bytes(source.add(done), target.add(done), len - done) };
    }
}

/// Copies [`STEP_BYTES`] bytes at offset `done`.
///
/// # Safety
/// As for [`copy`].
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx")]
#[inline]
unsafe fn copy_step(source: *const u8, target: *mut u8, done: usize) {
    // SAFETY: loads of 128 bytes from `source` and stores of as many to `target`, unaligned, which the caller allows.
    unsafe {
        asm!(
            "vmovdqu {a}, [{source} + {done}]",
            "vmovdqu {b}, [{source} + {done} + 32]",
            "vmovdqu {c}, [{source} + {done} + 64]",
            "vmovdqu {d}, [{source} + {done} + 96]",
            "vmovdqu [{target} + {done}], {a}",
            "vmovdqu [{target} + {done} + 32], {b}",
            "vmovdqu [{target} + {done} + 64], {c}",
            "vmovdqu [{target} + {done} + 96], {d}",
            source = in(reg) source,
            target = in(reg) target,
            done = in(reg) done,
            a = out(ymm_reg) _,
            b = out(ymm_reg) _,
            c = out(ymm_reg) _,
            d = out(ymm_reg) _,
            options(nostack, preserves_flags)
        );
    }
}

/// As [`copy`], with a string instruction.
///
/// # Safety
/// As for [`copy`].
#[inline]
unsafe fn copy_bytes(source: *const u8, target: *mut u8, len: usize) {
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
    fn prefetching_an_invalid_address_is_harmless() {
        let mut target = [0; 128];
        let nowhere = std::ptr::without_provenance(usize::MAX - 70);
        // SAFETY: both arrays have 128 bytes.
        unsafe { copy([7; 128].as_ptr(), target.as_mut_ptr(), 128, Some(nowhere)) };
        assert_eq!(target[127], 7);
    }

    #[test]
    fn copies_and_zeroing_touch_exactly_the_given_bytes() {
        let source: Vec<u8> = (0..=u8::MAX).cycle().take(5000).collect();
        for (first, len) in [(0, 0), (1, 1), (3, 7), (17, 64), (63, 513), (1, 4096), (100, 4500)] {
            let mut target = vec![0xee; 5000];
            let mut expected = target.clone();
            expected[first..first + len].copy_from_slice(&source[first..first + len]);
            // SAFETY: both vectors have these bytes, and only this test uses them.
            unsafe { copy(source[first..].as_ptr(), target[first..].as_mut_ptr(), len, None) };
            assert_eq!(target, expected, "{len} bytes at {first}");
            target.fill(0xee);
            // SAFETY: as above.
            unsafe { copy_bytes(source[first..].as_ptr(), target[first..].as_mut_ptr(), len) };
            assert_eq!(target, expected, "{len} bytes at {first}, on a processor without vectors");
            expected[first..first + len].fill(0);
            // SAFETY: as above.
            unsafe { zero(target[first..].as_mut_ptr(), len) };
            assert_eq!(target, expected, "{len} bytes at {first}");
        }
    }
}

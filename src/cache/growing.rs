//! Vectors that grow while the cache is used.

/// An empty vector that grows to `len_max` elements without being moved, if the host has enough address space. The
/// unused part takes no memory.
pub(super) fn vec_for<T>(len_max: u32) -> Vec<T> {
    let mut elements = Vec::new();
    // Otherwise the vector is moved when it grows, which takes longer.
    let _ = elements.try_reserve_exact(len_max as usize);
    elements
}

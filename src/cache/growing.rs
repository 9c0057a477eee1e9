//! Vectors that become longer while the cache is used.

/// An empty vector that grows to `len_max` elements without being moved, if the host has the addresses. What is not
/// used takes no memory.
pub(super) fn vec_for<T>(len_max: u32) -> Vec<T> {
    let mut elements = Vec::new();
    // Else it is moved when it grows, which takes longer.
    let _ = elements.try_reserve_exact(len_max as usize);
    elements
}

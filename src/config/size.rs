//! Sizes as people write them: `64M`, `4G`, or plain bytes. The suffixes are powers of 1024, as in QEMU and qemu-img.

const SUFFIXES: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// The number of bytes that `text` names; `None` if it names none, or more than a u64 holds.
pub(super) fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match SUFFIXES.iter().find(|(suffix, _)| text.ends_with(*suffix)) {
        Some((suffix, shift)) => (text.trim_end_matches(*suffix), *shift),
        None => (text, 0),
    };
    // `u64::from_str` takes a leading plus, and trimming takes several suffixes.
    if !digits.bytes().all(|b| b.is_ascii_digit()) || text.len() > digits.len() + 1 {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// `bytes` with the largest suffix that leaves no remainder.
pub(super) fn format_size(bytes: u64) -> String {
    SUFFIXES
        .iter()
        .rev()
        .find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift)
        .map_or_else(|| bytes.to_string(), |(suffix, shift)| format!("{}{suffix}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        let cases = [("0", 0), ("4096", 4096), ("4K", 4096), ("64M", 64 << 20), ("4G", 4 << 30), ("1T", 1 << 40)];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in
            ["", "M", "64m", "64MB", "64 M", "64MM", "-1", "+1", "1.5G", "0x10", "16777216T", "99999999999999999999"]
        {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn formatting_is_read_back() {
        for (bytes, text) in
            [(0, "0"), (512, "512"), (4096, "4K"), (6 << 20, "6M"), (1 << 40, "1T"), (u64::MAX, "18446744073709551615")]
        {
            assert_eq!(format_size(bytes), text);
            assert_eq!(parse_size(text), Some(bytes));
        }
    }
}

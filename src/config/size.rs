//! Sizes in configuration files and options: `64M`, `4G`, `1GiB`, `1g`, or plain bytes. The suffixes are powers of
//! 1024, as in QEMU and qemu-img. `64MB` is refused, because MB is 2^20 bytes in some programs and 10^6 in others.

const SUFFIXES: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// The number of bytes in `text`; `None` if `text` is not a size, or too large for a u64.
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    let (digits, unit) = split(text);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "ki" | "kib" => 10,
        "m" | "mi" | "mib" => 20,
        "g" | "gi" | "gib" => 30,
        "t" | "ti" | "tib" => 40,
        _ => return None,
    };
    // `u64::from_str` accepts a leading plus.
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The size probably meant by a `text` that is not a valid size: `64M` for `64MB`, `1536M` for `1.5G`.
pub(super) fn size_suggestion(text: &str) -> Option<String> {
    let (number, unit) = split(text);
    let first = unit.chars().next()?.to_ascii_uppercase();
    let shift = SUFFIXES.iter().find(|(suffix, _)| *suffix == first).map(|(_, shift)| *shift)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_digits = |part: &str| part.len() <= 9 && part.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !is_digits(whole) || !is_digits(fraction) {
        return None;
    }
    let mut bytes = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    if !fraction.is_empty() {
        let tenths = u128::from(fraction.parse::<u64>().ok()?) << shift;
        bytes = bytes.checked_add(u64::try_from(tenths / 10u128.pow(u32::try_from(fraction.len()).ok()?)).ok()?)?;
    }
    Some(format_size(bytes))
}

/// The number and the unit of a size, which a space may separate.
fn split(text: &str) -> (&str, &str) {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    (number, unit.strip_prefix(' ').unwrap_or(unit))
}

/// `bytes` as a size with the largest suffix that leaves no remainder.
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
        let cases = [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("4K", 4096),
            ("4k", 4096),
            ("64M", 64 << 20),
            ("64 MiB", 64 << 20),
            ("4G", 4 << 30),
            ("1g", 1 << 30),
            ("1GiB", 1 << 30),
            ("1gib", 1 << 30),
            ("2Gi", 2 << 30),
            ("1T", 1 << 40),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
    }

    #[test]
    fn a_malformed_size_is_refused() {
        for text in
            ["", "M", "64MB", "64  M", "64MM", "-1", "+1", "1.5G", "0x10", "16777216T", "99999999999999999999", "1i"]
        {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn a_malformed_size_gets_a_suggestion() {
        let cases = [
            ("256MB", Some("256M")),
            ("1gb", Some("1G")),
            ("64MM", Some("64M")),
            ("1.5G", Some("1536M")),
            ("0.1K", Some("102")),
            ("many", None),
            ("MB", None),
            ("-1M", None),
            ("1.9999999999G", None),
        ];
        for (text, meant) in cases {
            assert_eq!(size_suggestion(text).as_deref(), meant, "{text}");
        }
    }

    #[test]
    fn a_formatted_size_parses_to_itself() {
        for (bytes, text) in
            [(0, "0"), (512, "512"), (4096, "4K"), (6 << 20, "6M"), (1 << 40, "1T"), (u64::MAX, "18446744073709551615")]
        {
            assert_eq!(format_size(bytes), text);
            assert_eq!(parse_size(text), Some(bytes));
        }
    }
}

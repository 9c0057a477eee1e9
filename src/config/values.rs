//! The values of keys: which ones a key takes, and how messages show and suggest them.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use super::problem::nearest;
use super::size::{format_size, parse_size, size_suggestion};
use super::{DeviceConfig, MemoryDir, Socket};
use crate::nbd_uri::NbdUri;
use crate::units::PAGE_BYTES;

/// Bytes of a Unix socket's path: `sun_path` has 108, and one is the terminating zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// The value of `memory_dir` for memory in systemd's file descriptor store.
pub(crate) const SYSTEMD: &str = "systemd";

/// A value before its check: from a document, an option or the table of keys.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value<'a> {
    Text(&'a str),
    Path(&'a Path),
    Descriptor(RawFd),
    Integer(i128),
    Flag(bool),
    /// A value of a type that no key takes: the name of the type, with its article.
    Other(&'static str),
}

impl Value<'_> {
    /// The value as shown in messages.
    pub(super) fn shown(self) -> String {
        match self {
            Self::Text(text) => format!("{text:?}"),
            Self::Path(path) => format!("{path:?}"),
            Self::Descriptor(fd) => fd.to_string(),
            Self::Integer(number) => number.to_string(),
            Self::Flag(flag) => flag.to_string(),
            Self::Other(what) => what.to_string(),
        }
    }
}

use Value::{Flag, Integer, Text};

/// A key's valid values, and the field they set.
#[derive(Debug)]
pub(crate) enum ValueKind {
    Text {
        wanted: &'static str,
        fits: fn(&str) -> bool,
        set: fn(&mut DeviceConfig, &str),
    },
    /// A path, or the URI of an NBD export.
    Image {
        set: fn(&mut DeviceConfig, PathBuf),
    },
    Socket {
        set: fn(&mut DeviceConfig, Socket),
    },
    MemoryDir {
        set: fn(&mut DeviceConfig, MemoryDir),
    },
    Flag {
        set: fn(&mut DeviceConfig, bool),
    },
    Count {
        min: u32,
        max: u32,
        set: fn(&mut DeviceConfig, u32),
    },
    PowerOfTwo {
        min: u32,
        max: u32,
        set: fn(&mut DeviceConfig, u32),
    },
    /// Bytes, in whole pages.
    Size {
        min: u64,
        max: u64,
        set: fn(&mut DeviceConfig, u64),
    },
    /// One of `words`; `set` gets its index.
    Choice {
        words: &'static [&'static str],
        set: fn(&mut DeviceConfig, usize),
    },
}

impl ValueKind {
    /// Sets the field to `value`; the error lists the valid values.
    pub(super) fn set(&self, device: &mut DeviceConfig, value: Value<'_>) -> Result<(), String> {
        match self.accept(device, value) {
            Some(()) => Ok(()),
            None => Err(format!("takes {}, not {}{}", self.valid_values(), value.shown(), self.hint(value))),
        }
    }

    fn accept(&self, device: &mut DeviceConfig, value: Value<'_>) -> Option<()> {
        match (self, value) {
            (Self::Text { fits, set, .. }, Text(text)) if fits(text) => set(device, text),
            (Self::Image { set }, Text(_) | Value::Path(_)) => {
                let name = path(value, usize::MAX)?;
                // Different spellings of a URI are one image.
                let uri = NbdUri::is_uri(name).then(|| NbdUri::parse(name.to_str().unwrap_or_default()));
                set(device, uri.map_or(Ok(name.into()), |uri| uri.map(|uri| uri.to_string().into())).ok()?);
            }
            (Self::Socket { set }, Text(_) | Value::Path(_)) => {
                set(device, Socket::Path(path(value, SOCKET_PATH_BYTES_MAX)?.into()));
            }
            (Self::Socket { set }, Value::Descriptor(fd)) => set(device, Socket::Fd(fd)),
            (Self::MemoryDir { set }, Text(_) | Value::Path(_)) => {
                let path = path(value, usize::MAX)?;
                let named = path == Path::new(SYSTEMD);
                // A relative path would depend on the working directory: the next daemon might not find the cache.
                let directory = || path.is_absolute().then(|| MemoryDir::Path(path.into()));
                set(device, if named { MemoryDir::Systemd } else { directory()? });
            }
            (Self::Flag { set }, Flag(on)) => set(device, on),
            (Self::Count { min, max, set }, Integer(number)) => {
                set(device, u32::try_from(number).ok().filter(|n| (*min..=*max).contains(n))?);
            }
            (Self::PowerOfTwo { min, max, set }, Integer(number)) => {
                let count = u32::try_from(number).ok().filter(|n| (*min..=*max).contains(n))?;
                set(device, Some(count).filter(|n| n.is_power_of_two())?);
            }
            (Self::Size { min, max, set }, Text(_) | Integer(_)) => {
                let bytes = match value {
                    Integer(number) => u64::try_from(number).ok()?,
                    Text(text) => parse_size(text)?,
                    _ => return None,
                };
                let fits = (*min..=*max).contains(&bytes) && bytes.is_multiple_of(PAGE_BYTES);
                set(device, Some(bytes).filter(|_| fits)?);
            }
            (Self::Choice { words, set }, Text(text)) => {
                set(device, words.iter().position(|word| *word == text)?);
            }
            _ => return None,
        }
        Some(())
    }

    /// The valid values, for a message.
    pub(super) fn valid_values(&self) -> String {
        match self {
            Self::Text { wanted, .. } => (*wanted).to_string(),
            Self::Image { .. } => "a path or the URI of an NBD export".to_string(),
            Self::MemoryDir { .. } => format!("an absolute path or {SYSTEMD:?}"),
            Self::Socket { .. } => format!("a path of 1 to {SOCKET_PATH_BYTES_MAX} bytes"),
            Self::Flag { .. } => "true or false".to_string(),
            Self::Count { min, max, .. } => format!("an integer from {min} to {max}"),
            Self::PowerOfTwo { min, max, .. } => format!("a power of two from {min} to {max}"),
            Self::Size { min, max, .. } => {
                let (min, max, step) = (format_size(*min), format_size(*max), format_size(PAGE_BYTES));
                format!("a size from {min} to {max} (in steps of {step})")
            }
            Self::Choice { words, .. } => {
                let quoted: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
                let (last, others) = quoted.split_last().expect("a choice has words");
                format!("{} or {last}", others.join(", "))
            }
        }
    }

    /// The end of a message that suggests the value probably meant; mostly empty.
    fn hint(&self, value: Value<'_>) -> String {
        let near = match (self, value) {
            (Self::Choice { words, .. }, Text(text)) => {
                nearest(&text.to_lowercase(), words.iter().copied()).map(ToOwned::to_owned)
            }
            (Self::Image { .. }, _) => {
                let name = path(value, usize::MAX).and_then(Path::to_str).filter(|name| name.contains("://"));
                let why = name.and_then(|name| NbdUri::parse(name).err());
                return why.map_or_else(String::new, |why| format!("; the URI {why}"));
            }
            (Self::Size { .. }, Text(text)) if parse_size(text).is_none() => size_suggestion(text),
            _ => None,
        };
        near.map_or_else(String::new, |word| format!("; did you mean {word:?}?"))
    }
}

/// The mode of a file that `text` writes in octal, with or without a leading zero.
pub(super) fn parse_mode(text: &str) -> Option<u32> {
    let digits = text.strip_prefix('0').filter(|_| text.len() == 4).unwrap_or(text);
    let octal = digits.len() == 3 && digits.bytes().all(|b| (b'0'..=b'7').contains(&b));
    u32::from_str_radix(digits, 8).ok().filter(|_| octal)
}

/// The path in `value`, if the system could open it: not empty, not too long, no NUL byte.
fn path(value: Value<'_>, bytes_max: usize) -> Option<&Path> {
    let path = match value {
        Text(text) => Path::new(text),
        Value::Path(path) => path,
        _ => return None,
    };
    let bytes = path.as_os_str().as_encoded_bytes();
    let fits = !bytes.is_empty() && bytes.len() <= bytes_max && !bytes.contains(&0);
    fits.then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_mode_has_three_octal_digits() {
        for (text, mode) in [("0600", 0o600), ("660", 0o660), ("0777", 0o777), ("000", 0)] {
            assert_eq!(parse_mode(text), Some(mode), "{text}");
        }
        for text in ["", "0", "60", "00660", "1660", "0o660", "888", "+60", "-600", "rw-", "06 0"] {
            assert_eq!(parse_mode(text), None, "{text}");
        }
    }
}

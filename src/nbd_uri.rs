//! The names of NBD exports: `nbd://host[:port]/export` and `nbd+unix:///export?socket=/path` (the part of the NBD URI
//! specification that genblk supports).

use std::fmt;
use std::path::{Path, PathBuf};

/// The port of NBD servers (IANA).
const DEFAULT_PORT: u16 = 10809;
/// Longest name of an export (the protocol's own limit).
const EXPORT_BYTES_MAX: usize = 4096;
/// Bytes of a Unix socket's path: `sun_path` has 108, and one is the terminating zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The address of a server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ServerAddress {
    /// On a Unix domain socket.
    Unix(PathBuf),
    /// On a TCP port of a host, which is a name or an address.
    Tcp(String, u16),
}

/// The name of an export.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdUri {
    /// The address of its server.
    pub server: ServerAddress,
    /// The export's name on the server; may be empty.
    pub export: String,
}

impl NbdUri {
    /// Whether the name of an image is an NBD URI and not a path.
    pub fn is_uri(name: &Path) -> bool {
        let scheme = name.to_str().and_then(|text| text.split_once("://"));
        scheme.is_some_and(|(scheme, _)| {
            scheme.starts_with("nbd") && scheme.bytes().all(|b| b.is_ascii_lowercase() || b == b'+')
        })
    }

    /// The export that `text` names.
    ///
    /// # Errors
    /// The problem with the URI.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or("has no \"://\"")?;
        if rest.contains('#') {
            return Err("has a fragment (#), which is not supported".to_owned());
        }
        let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(export)?;
        if export.len() > EXPORT_BYTES_MAX || export.contains('\0') {
            return Err(format!("names an export of more than {EXPORT_BYTES_MAX} bytes, or with a zero byte"));
        }
        let server = match scheme {
            "nbd" => match query {
                None => tcp(authority)?,
                Some(query) => return Err(format!("takes no parameters, not {query:?}")),
            },
            "nbd+unix" if !authority.is_empty() => {
                return Err("has a host: write nbd+unix:///EXPORT?socket=PATH".to_owned());
            }
            "nbd+unix" => unix(query)?,
            "nbds" | "nbds+unix" => {
                return Err("requests TLS, which genblk does not support: use nbd:// through a TLS proxy".to_owned());
            }
            other => return Err(format!("has the unknown scheme {other:?}: nbd and nbd+unix are known")),
        };
        Ok(Self { server, export })
    }
}

fn tcp(authority: &str) -> Result<ServerAddress, String> {
    if authority.contains('@') {
        return Err("has a user name, which is not supported".to_owned());
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or("has an address without its \"]\"")?;
            (host, port.strip_prefix(':').or(Some(port).filter(|port| port.is_empty())))
        }
        None => match authority.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, Some("")),
        },
    };
    let port = port.ok_or("has extra characters between the address and its port")?;
    if host.is_empty() || !host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:%".contains(&b)) {
        return Err(format!("has an invalid host name: {host:?}"));
    }
    let port = if port.is_empty() { Some(DEFAULT_PORT) } else { port.parse().ok().filter(|port| *port != 0) };
    Ok(ServerAddress::Tcp(host.to_ascii_lowercase(), port.ok_or("has a port that is not a number from 1 to 65535")?))
}

fn unix(query: Option<&str>) -> Result<ServerAddress, String> {
    let path = query.and_then(|query| query.strip_prefix("socket=")).filter(|path| !path.contains('&'));
    let path = decode(path.ok_or("needs one parameter, socket=PATH")?)?;
    // A relative path would depend on the working directory: the next daemon might search for another cache.
    if !path.starts_with('/') || path.len() > SOCKET_PATH_BYTES_MAX || path.contains('\0') {
        return Err(format!("takes an absolute path of at most {SOCKET_PATH_BYTES_MAX} bytes for its socket"));
    }
    Ok(ServerAddress::Unix(path.into()))
}

/// Text with its percent escapes resolved.
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        if byte != b'%' {
            bytes.push(byte);
            rest = after;
            continue;
        }
        let digits = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let value = digits.filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        let value = value.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(value.ok_or_else(|| format!("has a % without two digits: {text:?}"))?);
        rest = &after[2..];
    }
    String::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())
}

/// Text with percent escapes for all characters that may need one.
struct Encoded<'a>(&'a str);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
                write!(f, "{}", char::from(byte))?;
            } else {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

/// The canonical spelling of a URI.
impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = Encoded(&self.export);
        match &self.server {
            ServerAddress::Unix(path) => write!(f, "nbd+unix:///{export}?socket={}", Encoded(&path.to_string_lossy())),
            ServerAddress::Tcp(host, port) if host.contains(':') => write!(f, "nbd://[{host}]:{port}/{export}"),
            ServerAddress::Tcp(host, port) => write!(f, "nbd://{host}:{port}/{export}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_written_in_canonical_form() {
        let cases = [
            ("nbd://Host/disk", "nbd://host:10809/disk"),
            ("nbd://host:1/", "nbd://host:1/"),
            ("nbd://host", "nbd://host:10809/"),
            ("nbd://[::1]:2/a/b", "nbd://[::1]:2/a/b"),
            ("nbd://127.0.0.1:3/%61 b", "nbd://127.0.0.1:3/a%20b"),
            ("nbd+unix:///?socket=/run/a.sock", "nbd+unix:///?socket=/run/a.sock"),
            ("nbd+unix:///d%2fx?socket=/a%20b", "nbd+unix:///d/x?socket=/a%20b"),
        ];
        for (text, canonical) in cases {
            let uri = NbdUri::parse(text).unwrap_or_else(|why| panic!("{text}: {why}"));
            assert_eq!(uri.to_string(), canonical, "{text}");
            assert_eq!(NbdUri::parse(canonical), Ok(uri), "{canonical}");
        }
    }

    #[test]
    fn an_invalid_uri_is_refused_with_the_reason() {
        let cases = [
            ("nbd:///disk", "invalid host name"),
            ("nbd://host:0/", "port"),
            ("nbd://host:99999/", "port"),
            ("nbd://host/?x=1", "no parameters"),
            ("nbd://me@host/", "user name"),
            ("nbd://[::1/", "]"),
            ("nbd://host/%4", "two digits"),
            ("nbd://host/%+1", "two digits"),
            ("nbd://host/%ff", "UTF-8"),
            ("nbd://host/a#b", "fragment"),
            ("nbd+unix:///x", "socket=PATH"),
            ("nbd+unix:///x?socket=run/a", "absolute"),
            ("nbd+unix:///x?socket=/a&b=c", "socket=PATH"),
            ("nbd+unix://host/x?socket=/a", "has a host"),
            ("nbds://host/", "TLS"),
            ("nbd+vsock://1/", "unknown scheme"),
        ];
        for (text, reason) in cases {
            assert!(NbdUri::is_uri(Path::new(text)), "{text}");
            let why = NbdUri::parse(text).expect_err(text);
            assert!(why.contains(reason), "{text}: {why}");
        }
        for path in ["/a/nbd://b", "./nbd://host/x", "nbd.img", "NBD://host/"] {
            assert!(!NbdUri::is_uri(Path::new(path)), "{path}");
        }
    }
}

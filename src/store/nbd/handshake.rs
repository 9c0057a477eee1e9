//! The handshake: fixed newstyle negotiation, as a state machine without I/O. It requests structured replies,
//! base:allocation, and the export with its block sizes (NBD_OPT_GO). The messages of the server are limited in length
//! and number.

use std::fmt;

use super::wire::{Export, be16, be32, be64};

/// Bytes of the greeting: two magic numbers and flags.
const GREETING_BYTES: usize = 18;
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
/// Greeting flags: the server continues after an unknown option; it omits 124 zero bytes.
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 1 << 1;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Bytes of the header of a reply to an option.
const REPLY_BYTES: usize = 20;
/// Longest data of such a reply, and most replies to all options.
const REPLY_DATA_MAX: u32 = 64 << 10;
const REPLIES_MAX: u32 = 1000;

const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED_REPLY: u32 = 8;
const OPTION_SET_META_CONTEXT: u32 = 10;

const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_META_CONTEXT: u32 = 4;
/// Types of replies with this bit report errors.
const REPLY_ERROR: u32 = 1 << 31;
const ERROR_UNSUPPORTED: u32 = REPLY_ERROR | 1;
const ERROR_POLICY: u32 = REPLY_ERROR | 2;
const ERROR_TLS_REQUIRED: u32 = REPLY_ERROR | 5;
const ERROR_UNKNOWN: u32 = REPLY_ERROR | 6;
const ERROR_SHUTDOWN: u32 = REPLY_ERROR | 7;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const ALLOCATION: &[u8] = b"base:allocation";
/// Default block sizes, for a server that reports none.
const DEFAULT_BLOCKS: (u32, u32, u32) = (1, 4096, 32 << 20);

/// The cause of a failed handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum HandshakeError {
    /// The server violates the protocol, or lacks a part that genblk needs.
    Protocol(String),
    /// The server refuses the export.
    Refused(String),
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Protocol(why) | Self::Refused(why) => f.write_str(why),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HandshakeState {
    Greeting,
    /// The header of a reply to this option.
    Reply(u32),
    /// The data of a reply of this type to this option.
    ReplyData {
        option: u32,
        kind: u32,
        len: u32,
    },
    Done,
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Handshake {
    name: String,
    state: HandshakeState,
    replies: u32,
    output: Vec<u8>,
    found: Export,
    has_size: bool,
}

impl Handshake {
    /// A handshake for the export of this name.
    pub fn new(name: &str) -> Self {
        let (block_min, block_preferred, block_max) = DEFAULT_BLOCKS;
        let found = Export { block_min, block_preferred, block_max, ..Export::default() };
        Self {
            name: name.to_owned(),
            state: HandshakeState::Greeting,
            replies: 0,
            output: Vec::new(),
            found,
            has_size: false,
        }
    }

    /// The bytes to send now.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// The number of bytes that [`Handshake::receive`] takes next, at most 64 KiB; `None` once the handshake is over.
    pub fn bytes_needed(&self) -> Option<usize> {
        match self.state {
            HandshakeState::Greeting => Some(GREETING_BYTES),
            HandshakeState::Reply(_) => Some(REPLY_BYTES),
            HandshakeState::ReplyData { len, .. } => Some(len as usize),
            HandshakeState::Done => None,
        }
    }

    /// The export, once the handshake is over.
    pub fn export(&self) -> Option<Export> {
        (self.state == HandshakeState::Done).then_some(self.found)
    }

    /// Takes exactly the number of bytes that [`Handshake::bytes_needed`] returns.
    ///
    /// # Errors
    /// [`HandshakeError`]; the connection is then unusable.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        debug_assert_eq!(Some(bytes.len()), self.bytes_needed());
        match self.state {
            HandshakeState::Greeting => self.greeted(bytes),
            HandshakeState::Reply(option) => {
                if be64(bytes, 0) != OPTION_REPLY_MAGIC || be32(bytes, 8) != option {
                    return Err(protocol("the server sends a bad magic number or another option in an option reply"));
                }
                let (kind, len) = (be32(bytes, 12), be32(bytes, 16));
                self.replies += 1;
                if len > REPLY_DATA_MAX || self.replies > REPLIES_MAX {
                    return Err(protocol("the server sends too many or too long option replies"));
                }
                if len > 0 {
                    self.state = HandshakeState::ReplyData { option, kind, len };
                    return Ok(());
                }
                self.replied(option, kind, &[])
            }
            HandshakeState::ReplyData { option, kind, .. } => self.replied(option, kind, bytes),
            HandshakeState::Done => Ok(()),
        }
    }

    fn greeted(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        if &bytes[..8] != b"NBDMAGIC" {
            return Err(protocol("the server is not an NBD server"));
        }
        let flags = be16(bytes, 16);
        if &bytes[8..16] != OPTION_MAGIC || flags & FIXED_NEWSTYLE == 0 {
            return Err(protocol(
                "the server speaks only the old form of the protocol (no fixed newstyle negotiation)",
            ));
        }
        self.output.extend(u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes());
        self.send_option(OPTION_STRUCTURED_REPLY, &[]);
        Ok(())
    }

    fn send_option(&mut self, option: u32, data: &[u8]) {
        self.output.extend(OPTION_MAGIC);
        self.output.extend(option.to_be_bytes());
        self.output.extend(len_bytes(data));
        self.output.extend(data);
        self.state = HandshakeState::Reply(option);
    }

    fn request_allocation(&mut self) {
        let mut data = len_bytes(self.name.as_bytes()).to_vec();
        data.extend(self.name.as_bytes());
        data.extend(1u32.to_be_bytes());
        data.extend(len_bytes(ALLOCATION));
        data.extend(ALLOCATION);
        self.send_option(OPTION_SET_META_CONTEXT, &data);
    }

    fn request_export(&mut self) {
        let mut data = len_bytes(self.name.as_bytes()).to_vec();
        data.extend(self.name.as_bytes());
        data.extend(1u16.to_be_bytes());
        data.extend(INFO_BLOCK_SIZE.to_be_bytes());
        self.send_option(OPTION_GO, &data);
    }

    fn replied(&mut self, option: u32, kind: u32, data: &[u8]) -> Result<(), HandshakeError> {
        let is_error = kind & REPLY_ERROR != 0;
        self.state = HandshakeState::Reply(option);
        match (option, kind) {
            (OPTION_STRUCTURED_REPLY, REPLY_ACK) => {
                self.found.is_structured = true;
                self.request_allocation();
            }
            (OPTION_STRUCTURED_REPLY, _) if is_error => self.request_export(),
            (OPTION_SET_META_CONTEXT, REPLY_META_CONTEXT) => {
                if data.len() >= 4 && &data[4..] == ALLOCATION {
                    self.found.allocation = Some(be32(data, 0));
                }
            }
            (OPTION_SET_META_CONTEXT, REPLY_ACK) => self.request_export(),
            (OPTION_SET_META_CONTEXT, _) if is_error => {
                self.found.allocation = None;
                self.request_export();
            }
            (OPTION_GO, REPLY_INFO) => self.informed(data)?,
            (OPTION_GO, REPLY_ACK) if self.has_size => self.state = HandshakeState::Done,
            (OPTION_GO, REPLY_ACK) => return Err(protocol("the server sends no NBD_INFO_EXPORT")),
            (OPTION_GO, _) if is_error => return Err(self.refusal(kind, data)),
            _ => return Err(protocol(&format!("the server sends an unexpected reply {kind:#x} to option {option}"))),
        }
        Ok(())
    }

    fn informed(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        match (data.len(), data.get(..2).map(|kind| be16(kind, 0))) {
            (12, Some(INFO_EXPORT)) => {
                (self.found.size_bytes, self.found.flags) = (be64(data, 2), be16(data, 10));
                self.has_size = true;
            }
            (14, Some(INFO_BLOCK_SIZE)) => {
                let (min, preferred, max) = (be32(data, 2), be32(data, 6), be32(data, 10));
                if !min.is_power_of_two() || min > 64 << 10 || !preferred.is_power_of_two() || max < min {
                    return Err(protocol(&format!(
                        "the server announces invalid block sizes ({min}, {preferred}, {max})"
                    )));
                }
                (self.found.block_min, self.found.block_preferred, self.found.block_max) = (min, preferred, max);
            }
            (_, None | Some(INFO_EXPORT | INFO_BLOCK_SIZE)) => {
                return Err(protocol("the server sends a malformed NBD_REP_INFO"));
            }
            // Information that was not requested.
            _ => {}
        }
        Ok(())
    }

    fn refusal(&self, kind: u32, data: &[u8]) -> HandshakeError {
        let said: String = String::from_utf8_lossy(data).chars().filter(|c| !c.is_control()).take(200).collect();
        let said = if said.is_empty() { said } else { format!(" ({said})") };
        HandshakeError::Refused(match kind {
            ERROR_UNKNOWN => format!("the server has no export {:?}{said}", self.name),
            ERROR_TLS_REQUIRED => format!("the server requires TLS{said}: use a TLS proxy"),
            ERROR_POLICY => format!("the server's policy refuses the export{said}"),
            ERROR_SHUTDOWN => format!("the server is shutting down{said}"),
            ERROR_UNSUPPORTED => format!("the server does not support NBD_OPT_GO{said}"),
            other => format!("the server refuses the export with error {:#x}{said}", other & !REPLY_ERROR),
        })
    }
}

fn protocol(why: &str) -> HandshakeError {
    HandshakeError::Protocol(why.to_owned())
}

fn len_bytes(data: &[u8]) -> [u8; 4] {
    u32::try_from(data.len()).expect("options are short").to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::super::wire::export_flag;
    use super::*;

    fn greeting(flags: u16) -> Vec<u8> {
        [&b"NBDMAGICIHAVEOPT"[..], &flags.to_be_bytes()].concat()
    }

    fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(len_bytes(data));
        bytes.extend(data);
        bytes
    }

    fn info_export(size: u64, flags: u16) -> Vec<u8> {
        [&INFO_EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
    }

    /// Feeds a server's bytes, each time as many as the handshake expects.
    fn feed(handshake: &mut Handshake, mut bytes: &[u8]) -> Result<(), HandshakeError> {
        while let Some(needed) = handshake.bytes_needed().filter(|needed| *needed <= bytes.len()) {
            let (now, later) = bytes.split_at(needed);
            handshake.receive(now)?;
            bytes = later;
        }
        Ok(())
    }

    /// The messages of a server with all features.
    fn full() -> Vec<u8> {
        let mut blocks = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        [512u32, 4096, 1 << 20].iter().for_each(|size| blocks.extend(size.to_be_bytes()));
        [
            greeting(3),
            reply(OPTION_STRUCTURED_REPLY, REPLY_ACK, &[]),
            reply(OPTION_SET_META_CONTEXT, REPLY_META_CONTEXT, &[&7u32.to_be_bytes()[..], ALLOCATION].concat()),
            reply(OPTION_SET_META_CONTEXT, REPLY_ACK, &[]),
            reply(OPTION_GO, REPLY_INFO, &info_export(1 << 30, export_flag::SEND_FLUSH)),
            reply(OPTION_GO, REPLY_INFO, &[0, 1, b'n']),
            reply(OPTION_GO, REPLY_INFO, &blocks),
            reply(OPTION_GO, REPLY_ACK, &[]),
        ]
        .concat()
    }

    #[test]
    fn a_handshake_with_all_extensions_succeeds() {
        let mut handshake = Handshake::new("disk");
        feed(&mut handshake, &full()).unwrap();
        let export = handshake.export().expect("it is over");
        let expected = Export {
            size_bytes: 1 << 30,
            flags: export_flag::SEND_FLUSH,
            block_min: 512,
            block_preferred: 4096,
            block_max: 1 << 20,
            is_structured: true,
            allocation: Some(7),
        };
        assert_eq!(export, expected);
        let sent = handshake.take_output();
        assert!(sent.windows(4).any(|bytes| bytes == b"disk") && sent.windows(15).any(|bytes| bytes == ALLOCATION));
    }

    #[test]
    fn a_handshake_without_structured_replies_succeeds() {
        let mut handshake = Handshake::new("");
        let bytes = [
            greeting(1),
            reply(OPTION_STRUCTURED_REPLY, ERROR_UNSUPPORTED, &[]),
            reply(OPTION_GO, REPLY_INFO, &info_export(4096, 0)),
            reply(OPTION_GO, REPLY_ACK, &[]),
        ]
        .concat();
        feed(&mut handshake, &bytes).unwrap();
        let export = handshake.export().expect("it is over");
        assert!(!export.is_structured && export.allocation.is_none() && export.block_max == DEFAULT_BLOCKS.2);
    }

    #[test]
    fn a_refused_option_reports_the_servers_reason() {
        for (kind, words) in [
            (ERROR_UNKNOWN, "no export \"disk\""),
            (ERROR_TLS_REQUIRED, "TLS"),
            (ERROR_POLICY, "policy"),
            (ERROR_SHUTDOWN, "shutting down"),
            (ERROR_UNSUPPORTED, "NBD_OPT_GO"),
            (REPLY_ERROR | 99, "0x63"),
        ] {
            let mut handshake = Handshake::new("disk");
            let error = reply(OPTION_GO, kind, b"\x1b[31mno");
            let bytes = [greeting(3), reply(OPTION_STRUCTURED_REPLY, ERROR_UNSUPPORTED, &[]), error].concat();
            let Err(HandshakeError::Refused(why)) = feed(&mut handshake, &bytes) else { panic!("{kind:#x}") };
            assert!(why.contains(words) && !why.contains('\x1b'), "{why}");
        }
    }

    #[test]
    fn servers_of_another_protocol_and_endless_replies_are_refused() {
        let endless = [greeting(3), reply(OPTION_STRUCTURED_REPLY, REPLY_ACK, &[])].concat();
        let context = reply(OPTION_SET_META_CONTEXT, REPLY_META_CONTEXT, b"1234other");
        let endless = [endless, context.repeat(REPLIES_MAX as usize + 1)].concat();
        let mut long = reply(OPTION_STRUCTURED_REPLY, REPLY_ACK, &[]);
        long[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        let cases = [
            b"SSH-2.0-OpenSSH_9.2 a".to_vec(),
            [&b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"[..], &[0; 2]].concat(),
            greeting(0),
            [greeting(3), vec![0; REPLY_BYTES]].concat(),
            [greeting(3), long].concat(),
            endless,
        ];
        for bytes in cases {
            let mut handshake = Handshake::new("disk");
            assert!(matches!(feed(&mut handshake, &bytes), Err(HandshakeError::Protocol(_))), "{bytes:?}");
        }
    }

    /// Whatever a server sends, the handshake ends or expects a bounded number of bytes.
    #[test]
    fn damaged_handshakes_never_panic() {
        let bytes = full();
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                let mut handshake = Handshake::new("disk");
                let _ = feed(&mut handshake, &damaged);
                assert!(handshake.bytes_needed().unwrap_or(0) <= REPLY_DATA_MAX as usize);
            }
        }
    }
}

//! Messages as an earlier build recorded them: a change of this version's wire format is seen here.

use std::os::fd::AsFd;

use super::*;
use crate::config::{DeviceConfig, Socket};

/// Messages of version 3 to a disk process, one a line.
const TO_DISK: &str = include_str!("recorded/to_disk.3.jsonl");
/// Messages of version 3 from a disk process, one a line.
const FROM_DISK: &str = include_str!("recorded/from_disk.3.jsonl");

/// Messages of earlier versions to a disk process, with the version.
const EARLIER_TO_DISK: [(u32, &str); 2] =
    [(1, include_str!("recorded/to_disk.1.jsonl")), (2, include_str!("recorded/to_disk.2.jsonl"))];
/// Messages of earlier versions from a disk process, with the version.
const EARLIER_FROM_DISK: [(u32, &str); 2] =
    [(1, include_str!("recorded/from_disk.1.jsonl")), (2, include_str!("recorded/from_disk.2.jsonl"))];

/// Checks that the messages of a recording are understood, and that they are sent as they were.
fn check_recording<M>(recording: &str, count: usize)
where
    M: Serialize + serde::de::DeserializeOwned,
{
    let lines: Vec<&str> = recording.lines().collect();
    assert_eq!(lines.len(), count);
    for line in lines {
        let message: M = decode(line.as_bytes()).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert_eq!(String::from_utf8(encode(&message).unwrap()).unwrap(), line);
    }
}

#[test]
fn the_wire_format_matches_the_recorded_messages() {
    check_recording::<ToDisk>(TO_DISK, 19);
    check_recording::<FromDisk>(FROM_DISK, 16);
}

#[test]
fn a_hello_of_another_version_is_refused_with_both_versions() {
    let later = TO_DISK.lines().next().unwrap().replace("{\"version\":3,", "{\"version\":4,");
    let error = decode::<ToDisk>(later.as_bytes()).unwrap_err().to_string();
    assert!(error.ends_with("it has version 4, but this process uses version 3"), "{error}");
    for nonsense in ["", "{}", "{\"version\":3}", "{\"version\":3,\"message\":\"Sing\"}", "\0\u{1}"] {
        assert!(decode::<ToDisk>(nonsense.as_bytes()).is_err(), "{nonsense:?}");
    }
}

/// Checks that each message of earlier versions is refused by its version, whatever else it has.
fn check_refused<M: std::fmt::Debug + serde::de::DeserializeOwned>(recordings: [(u32, &str); 2]) {
    for (version, recording) in recordings {
        assert!(recording.lines().count() > 5 && version < VERSION, "version {version}");
        for line in recording.lines() {
            let error = decode::<M>(line.as_bytes()).unwrap_err().to_string();
            let expected = format!("it has version {version}, but this process uses version {VERSION}");
            assert!(error.ends_with(&expected), "{error}: {line}");
        }
    }
}

#[test]
fn messages_of_earlier_versions_are_refused_with_both_versions() {
    check_refused::<ToDisk>(EARLIER_TO_DISK);
    check_refused::<FromDisk>(EARLIER_FROM_DISK);
}

#[test]
fn a_message_arrives_with_its_descriptors() {
    let (ours, theirs) = Channel::<ToDisk, FromDisk>::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    let serve = ToDisk::Serve { device: 3, image_of: 2, settings: Box::new(settings()) };
    ours.send(&serve, &[file.as_fd(), file.as_fd()]).unwrap();
    let Received::Message(message, files) = theirs.receive().unwrap() else { panic!("a message") };
    assert_eq!((message, files.len()), (serve, 2));
    theirs.send(&FromDisk::Served { device: 3 }, &[]).unwrap();
    drop(theirs);
    assert!(matches!(ours.receive().unwrap(), Received::Message(FromDisk::Served { device: 3 }, _)));
    assert!(matches!(ours.receive().unwrap(), Received::Closed));
    assert!(ours.send(&ToDisk::Resume { device: 3 }, &[]).is_err());
}

fn settings() -> DeviceSettings {
    DeviceSettings::from(&DeviceConfig::new("disk0", Socket::Path("/run/disk0.sock".into()), "/images/disk0.raw"))
}

/// Prints what a recording of this version holds. When the version changes, the old recording is one of the earlier
/// ones.
#[test]
#[ignore = "records messages"]
fn record() {
    let open = TO_DISK.lines().take(2).map(|line| decode::<ToDisk>(line.as_bytes()).unwrap());
    let request = |id, request| ToDisk::Request { device: 0, id, request };
    let reply = |id, reply| FromDisk::Reply { id, reply };
    let others = [
        ToDisk::Serve { device: 0, image_of: 0, settings: Box::new(settings()) },
        ToDisk::Resume { device: 0 },
        ToDisk::Quiesce { device: 0 },
        ToDisk::Finish { device: 0, ending: Ending::HandOver },
        ToDisk::Abandon { device: 0, waits_for_untracked: true },
        ToDisk::ForceClose { device: 0 },
        ToDisk::CacheFileLost { image_of: 0, unmarked: Some("no space".to_owned()) },
        request(1, DeviceRequest::Flush),
        request(2, DeviceRequest::DropClean),
        request(3, DeviceRequest::Freeze { time_ms: 10_000, holds_reads: false }),
        request(4, DeviceRequest::Thaw),
        request(5, DeviceRequest::Configure { settings: Box::new(settings()) }),
        request(6, DeviceRequest::Grow { size_bytes: 1 << 30 }),
        request(14, DeviceRequest::Shrink { size_bytes: 1 << 29 }),
        request(15, DeviceRequest::Cut { size_bytes: 1 << 29 }),
        request(7, DeviceRequest::Reserve { size_bytes: 1 << 29 }),
        request(8, DeviceRequest::Warm { extents: vec![(0, 64), (512, 8)], time_ms: 250 }),
        request(9, DeviceRequest::Resident { from: 1024 }),
    ];
    let error = ErrorText { kind: ErrorKind::Image, text: "the image failed".to_owned() };
    let from_disk = [
        FromDisk::Served { device: 0 },
        FromDisk::Failed { device: 0, error: error.clone() },
        FromDisk::ImageFailed { image_of: 0, error: error.clone() },
        FromDisk::Quiesced { device: 0 },
        FromDisk::Ended { device: 0, error: Some(error) },
        FromDisk::Ended { device: 1, error: None },
        FromDisk::Released { image_of: 0, is_cache_removed: true },
        reply(1, DeviceReply::Done),
        reply(2, DeviceReply::Dropped { pages: 7 }),
        reply(3, DeviceReply::Failed { fault: "I/O error".to_owned() }),
        reply(4, DeviceReply::Thawed { was_frozen: true }),
        reply(5, DeviceReply::NotServed),
        reply(8, DeviceReply::Warmed { left: vec![(512, 8)], is_full: true }),
        reply(9, DeviceReply::Resident { pages: vec![0, 1, 7], next: Some(2048) }),
        reply(6, DeviceReply::Refused { why: "the guest has not read the size".to_owned() }),
    ];
    let show = |bytes: Vec<u8>| println!("{}", String::from_utf8(bytes).unwrap());
    open.chain(others).for_each(|message| show(encode(&message).unwrap()));
    from_disk.iter().for_each(|message| show(encode(message).unwrap()));
}

//! Conformance: what the virtio and vhost-user specifications require of the device, and what a hostile guest or
//! front-end may do to it, one request and one message at a time.
//!
//! T1 to T22 are bugs that were found in other vhost-user-blk servers. Each has a test here:
//!
//! | bug | test |
//! |---|---|
//! | T1 FLUSH without data does nothing | `requests::a_flush_of_two_descriptors_reaches_the_image` |
//! | T2 a ring is served only after another has no more requests | `rings::a_busy_ring_does_not_delay_another` |
//! | T3 SET_CONFIG overwrites the capacity | `config_space::only_writeback_can_be_set` |
//! | T4 read-only disks take discards and write-zeroes | `requests::a_read_only_disk_rejects_every_write` |
//! | T5 a write-back cache for a driver without FLUSH | `config_space::a_driver_that_cannot_flush_gets_write_through` |
//! | T6 CONFIG_WCE has no effect | `config_space::write_through_takes_effect_as_soon_as_it_is_set` |
//! | T7 GET_CONFIG ignores the offset | `config_space::config_reads_of_every_offset_and_size_are_correct` |
//! | T8 short reads and writes count as success | `src/store/tests.rs` |
//! | T9 GET_ID without data crashes the device | `requests::a_serial_is_padded_and_never_overruns_its_buffer` |
//! | T10 the used length is always 0 | `requests::the_used_length_counts_what_was_written` |
//! | T11 malformed requests are never completed | `chains::an_invalid_request_gets_an_error_status` |
//! | T12 a disabled ring is served | `rings::a_disabled_ring_waits_until_it_is_enabled` |
//! | T13 a memory change breaks running rings | `memory::a_new_memory_table_does_not_disturb_requests_in_flight` |
//! | T14 GET_ID and GET_CONFIG leave old bytes | the tests of T9 and T7 |
//! | T15 GET_VRING_BASE replies before requests complete | `rings::a_stopped_ring_has_nothing_in_flight_and_resumes` |
//! | T16 a crash of the front-end leaks resources | `sessions::crashed_front_ends_leak_no_descriptors` |
//! | T17 writeback reads 0 while writes are volatile | `config_space::a_driver_that_cannot_flush_gets_write_through` |
//! | T18 direct descriptors before an indirect one fail | `chains::every_legal_layout_is_served` |
//! | T19 rejected messages are acknowledged | `memory::rejected_messages_are_not_acknowledged` |
//! | T20 only the classic layout (header, data, status) works | `chains::every_legal_layout_is_served` |
//! | T21 an interrupt for every request, or more | all of `notifications` |
//! | T22 an invalid request gets no status | `chains::an_invalid_request_gets_an_error_status` |

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "sizes and indices here are chosen by the tests, small, and wrap on purpose in ring indices"
)]

#[path = "../common/mod.rs"]
mod common;

mod chains;
mod config_space;
mod inflight;
mod memory;
mod notifications;
mod requests;
mod rings;
mod sessions;

/// Size of the image in most tests.
const IMAGE_BYTES: u64 = 64 << 20;

/// A sector that only [`common::request::assert_serves`] writes.
const SPARE_SECTOR: u64 = 100_000;

//! What the virtio and vhost-user specifications demand of the device, and what a hostile guest or front-end can do
//! to it, one request and one message at a time.
//!
//! Each trap that another vhost-user-blk server was seen to fall into has a test here:
//!
//! | trap | test |
//! |---|---|
//! | T1 FLUSH without data does nothing | `requests::a_flush_of_two_descriptors_reaches_the_image` |
//! | T2 rings are served one after the other | `rings::a_busy_ring_does_not_hold_up_another` |
//! | T3 SET_CONFIG overwrites the capacity | `config_space::only_writeback_can_be_set` |
//! | T4 read-only disks are discarded and zeroed | `requests::a_read_only_disk_refuses_every_change` |
//! | T5 a volatile cache without FLUSH | `config_space::a_driver_that_cannot_flush_gets_write_through` |
//! | T6 CONFIG_WCE without effect | `config_space::write_through_is_in_force_once_it_is_set` |
//! | T7 GET_CONFIG ignores the offset | `config_space::every_offset_and_size_is_honoured` |
//! | T8 short reads and writes count as success | `src/store/tests.rs`, which cuts them short |
//! | T9 GET_ID without data kills the device | `requests::a_serial_is_padded_and_never_overruns_its_buffer` |
//! | T10 the used length is always 0 | `requests::the_used_length_counts_what_was_written` |
//! | T11 malformed requests are never completed | `chains::a_wrong_request_with_a_status_byte_gets_its_status` |
//! | T12 a disabled ring is served | `rings::a_disabled_ring_waits_until_it_is_enabled` |
//! | T13 changes of memory with rings running | `memory::a_new_table_does_not_disturb_requests_in_flight` |
//! | T14 GET_ID leaves old bytes; GET_CONFIG | as for T9 and T7 |
//! | T15 GET_VRING_BASE answers too early | `rings::a_stopped_ring_owes_nothing_and_resumes` |
//! | T16 a front-end dies with requests in flight | `sessions::front_ends_that_vanish_leave_nothing_behind` |
//! | T17 writeback reads 0 while writes are volatile | `config_space::a_driver_that_cannot_flush_gets_write_through` |
//! | T18 plain descriptors before an indirect one | `chains::every_legal_layout_is_served` |
//! | T19 refused messages are acknowledged | `memory::refused_messages_are_not_acknowledged` |
//! | T20 other layouts than the classic one | `chains::every_legal_layout_is_served` |
//! | T21 an interrupt for every request, and more | all of `notifications` |
//! | T22 no status for a wrong request | `chains::a_wrong_request_with_a_status_byte_gets_its_status` |

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

/// Bytes of the image in most tests here.
const IMAGE_BYTES: u64 = 64 << 20;

/// A sector that no test writes, kept for [`common::request::assert_serves`].
const SPARE_SECTOR: u64 = 100_000;

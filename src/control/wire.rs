//! The types of the interface (`io.genblk.Control.varlink`), and the envelope of a varlink message
//! (<https://varlink.org/Method-Call>).

mod parameters;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::counters::latency::{BUCKETS, Latencies, bound_of, bucket_of};
use crate::counters::sizes::{Sizes, least_size_of, size_bucket_of};

pub use parameters::{
    AttachParameters, DetachParameters, DeviceParameters, DropParameters, FreezeParameters, ListParameters,
    ReloadParameters, ResizeParameters, SetParameters, StatisticsParameters, ThawParameters, WarmParameters,
    WatchParameters,
};

/// The interface's description.
pub const INTERFACE: &str = include_str!("io.genblk.Control.varlink");
/// Its name.
pub const NAME: &str = "io.genblk.Control";

/// A method call.
#[derive(Debug, Serialize, Deserialize)]
pub struct MethodCall {
    /// The interface and the method: `io.genblk.Control.List`.
    pub method: String,
    /// The parameters, an object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Value>,
    /// Whether the caller accepts more than one reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub more: Option<bool>,
    /// Whether the caller expects no reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oneway: Option<bool>,
}

/// A reply to a call.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct MethodReply {
    /// The results, or the parameters of the error.
    #[serde(default)]
    pub parameters: Value,
    /// Whether another reply follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continues: Option<bool>,
    /// The interface and the error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The state of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the words of the interface say it")]
pub enum DeviceState {
    Opening,
    Failed,
    Serving,
    Frozen,
    Ending,
    Ended,
}

impl DeviceState {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Opening, Self::Failed, Self::Serving, Self::Frozen, Self::Ending, Self::Ended];

    /// Its name in the interface.
    pub fn word(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Failed => "failed",
            Self::Serving => "serving",
            Self::Frozen => "frozen",
            Self::Ending => "ending",
            Self::Ended => "ended",
        }
    }
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct DeviceStatus {
    pub name: String,
    pub state: DeviceState,
    pub why: Option<String>,
    pub pid: Option<u32>,
    pub image: String,
    pub socket: String,
    pub read_only: bool,
    #[serde(default)]
    pub serial: String,
    pub mode: String,
    pub front_end: Option<FrontEnd>,
    pub image_bytes: Option<u64>,
    pub cache_bytes: u64,
    #[serde(default)]
    pub cache_wanted_bytes: Option<u64>,
    #[serde(default)]
    pub cache_present_bytes: Option<u64>,
    pub resident_bytes: Option<u64>,
    pub dirty_bytes: Option<u64>,
    pub oldest_operation_us: Option<u64>,
    #[serde(default)]
    pub limits: Option<LimitsStatus>,
    #[serde(default)]
    pub pending: Vec<String>,
}

/// The rate limits of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct LimitsStatus {
    pub read_iops: Option<u64>,
    pub write_iops: Option<u64>,
    pub total_iops: Option<u64>,
    pub read_bytes_per_second: Option<u64>,
    pub write_bytes_per_second: Option<u64>,
    pub total_bytes_per_second: Option<u64>,
    pub burst_ms: u32,
}

/// A front-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct FrontEnd {
    pub pid: u32,
    pub uid: u32,
}

/// A histogram; see the interface's description.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct Latency {
    pub count: u64,
    pub sum_ns: u64,
    pub max_ns: Option<u64>,
    pub bounds_ns: Vec<u64>,
    pub counts: Vec<u64>,
}

impl From<&Latencies> for Latency {
    fn from(latencies: &Latencies) -> Self {
        let count = latencies.count();
        let filled = || latencies.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        Self {
            count,
            sum_ns: latencies.sum_ns,
            max_ns: (count > 0).then_some(latencies.max_ns),
            bounds_ns: filled().map(|(bucket, _)| bound_of(bucket)).collect(),
            counts: filled().map(|(_, count)| *count).collect(),
        }
    }
}

impl From<&Latency> for Latencies {
    /// Converts the interface's histogram. A bound that is not one of ours counts in the bucket that contains it.
    fn from(latency: &Latency) -> Self {
        let mut counts = [0u64; BUCKETS];
        for (bound, count) in latency.bounds_ns.iter().zip(&latency.counts) {
            let bucket = &mut counts[bucket_of(bound.saturating_sub(1))];
            *bucket = bucket.saturating_add(*count);
        }
        Self { counts, sum_ns: latency.sum_ns, max_ns: latency.max_ns.unwrap_or(0) }
    }
}

/// A histogram of sizes; see the interface's description.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct SizeCounts {
    pub least_bytes: Vec<u64>,
    pub counts: Vec<u64>,
}

impl From<&Sizes> for SizeCounts {
    fn from(sizes: &Sizes) -> Self {
        let filled = || sizes.iter().enumerate().filter(|(_, count)| **count > 0);
        Self {
            least_bytes: filled().map(|(bucket, _)| least_size_of(bucket)).collect(),
            counts: filled().map(|(_, count)| *count).collect(),
        }
    }
}

impl From<&SizeCounts> for Sizes {
    fn from(counts: &SizeCounts) -> Self {
        let mut sizes = Self::default();
        for (least, count) in counts.least_bytes.iter().zip(&counts.counts) {
            let bucket = &mut sizes[size_bucket_of(*least)];
            *bucket = bucket.saturating_add(*count);
        }
        sizes
    }
}

/// Requests of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct RequestStatistics {
    pub operation: String,
    pub requests: u64,
    pub errors: u64,
    pub bytes: u64,
    pub in_flight: u64,
    pub from_memory: Latency,
    pub waited: Latency,
    #[serde(default)]
    pub sizes: SizeCounts,
}

/// The cache.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct CacheStatistics {
    pub hit_pages: u64,
    pub miss_pages: u64,
    pub hole_pages: u64,
    pub written_pages: u64,
    pub evicted_pages: u64,
    pub readahead_pages: u64,
    pub readahead_used_pages: u64,
    pub readahead_wasted_pages: u64,
    pub stalls: u64,
    pub throttled: u64,
    #[serde(default)]
    pub throttled_us: u64,
    pub frames: u64,
    pub frames_free: u64,
    pub resident_pages: u64,
    pub dirty_pages: u64,
    pub dirty_limit_pages: u64,
    pub metadata_bytes: u64,
}

impl CacheStatistics {
    /// Pages that reads requested.
    pub fn lookup_pages(&self) -> u64 {
        self.hit_pages.saturating_add(self.miss_pages).saturating_add(self.hole_pages)
    }
}

/// Operations of one kind on the image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct StoreStatistics {
    pub operation: String,
    pub operations: u64,
    pub errors: u64,
    pub bytes: u64,
    pub in_flight: u64,
    pub latency: Latency,
    #[serde(default)]
    pub sizes: SizeCounts,
}

/// A worker thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct WorkerStatistics {
    pub busy_ns: u64,
    pub turns: u64,
    pub sleeps: u64,
    pub polls: u64,
    pub fruitful_polls: u64,
}

/// A device's statistics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct DeviceStatistics {
    pub name: String,
    #[serde(default)]
    pub since_us: u64,
    pub requests: Vec<RequestStatistics>,
    pub cache: CacheStatistics,
    pub stores: Vec<StoreStatistics>,
    pub workers: Vec<WorkerStatistics>,
    #[serde(default)]
    pub limited: u64,
    #[serde(default)]
    pub limited_us: u64,
}

/// The effect of a reload on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the words of the interface say it")]
pub enum ChangeKind {
    Attached,
    Detached,
    Changed,
    Pending,
    Kept,
}

/// A change that a reload has made, or would make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct DeviceChange {
    pub device: String,
    pub what: ChangeKind,
    pub detail: Vec<String>,
}

impl DeviceChange {
    /// A change of a device.
    pub fn of(device: &str, what: ChangeKind, detail: Vec<String>) -> Self {
        Self { device: device.to_owned(), what, detail }
    }
}

/// Keys of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct DeviceKeys {
    pub device: String,
    pub keys: Vec<String>,
}

impl DeviceKeys {
    /// As a result of `Reload`: how a command overrides the file, in words.
    pub fn in_words(&self) -> String {
        let Self { device, keys } = self;
        match keys.join(", ") {
            whole if ["attached", "detached"].contains(&whole.as_str()) => {
                format!("{device}: {whole} by a command, which overrides the file until a clean stop")
            }
            keys => format!("{device}: set by a command, which overrides the file until a clean stop: {keys}"),
        }
    }
}

/// Results of `Drop`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct Dropped {
    pub dropped_bytes: u64,
}

/// Results of `Freeze`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct Freezing {
    pub frozen: bool,
    pub frozen_us: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<u64>,
}

/// Results of `Thaw`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct Thawed {
    pub held: bool,
    pub frozen_us: u64,
}

/// The progress of a long method: the results of all its replies but the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct FlushProgress {
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// Results of a method that reports its progress: `None` in the last reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct Progressing {
    pub progress: Option<FlushProgress>,
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct ByteExtent {
    pub offset: u64,
    pub bytes: u64,
}

/// Results of `Warm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct Warmed {
    pub progress: Option<FlushProgress>,
    pub full: Option<bool>,
}

/// Results of `Resident`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct ResidentExtents {
    pub extents: Vec<ByteExtent>,
}

/// Results of `Describe`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct Description {
    pub version: String,
    pub pid: u32,
    pub since_us: u64,
    #[serde(default)]
    pub events: Vec<EventCount>,
}

/// The number of events of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct EventCount {
    pub kind: String,
    pub count: u64,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct ControlEvent {
    pub sequence: u64,
    pub time_us: u64,
    pub device: Option<String>,
    pub kind: String,
    pub detail: Value,
}

/// Results of `Watch`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct Watched {
    pub events: Vec<ControlEvent>,
    pub lost: bool,
    #[serde(default)]
    pub lost_events: u64,
}

/// Results of `List`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct Devices {
    pub devices: Vec<DeviceStatus>,
}

/// Results of `Statistics`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct Statistics {
    pub time_us: u64,
    pub devices: Vec<DeviceStatistics>,
}

/// Most parameters of a call: a client must not make the daemon check thousands of names one by one.
const PARAMETERS_MAX: usize = 32;

/// Reads parameters; an error names the invalid one, if it can be identified.
pub(super) fn read_parameters<T: DeserializeOwned>(given: &Value) -> Result<T, String> {
    let Some(parameters) = given.as_object() else { return T::deserialize(given).map_err(|e| e.to_string()) };
    if parameters.len() > PARAMETERS_MAX {
        return Err(format!("{} parameters, of at most {PARAMETERS_MAX}", parameters.len()));
    }
    T::deserialize(given).map_err(|e| {
        // The invalid parameter is the one without which the others can be read.
        let mut others = parameters.clone();
        let is_wrong = |name: &&String| {
            let parameter = others.remove(*name);
            let is_right = T::deserialize(&others).is_ok();
            others.extend(parameter.map(|parameter| ((*name).clone(), parameter)));
            is_right
        };
        parameters.keys().find(is_wrong).cloned().unwrap_or_else(|| e.to_string())
    })
}

/// Results as a value.
pub(super) fn value(results: &impl Serialize) -> Value {
    serde_json::to_value(results).expect("the types of the interface are JSON")
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::*;

    #[test]
    fn a_histogram_survives_the_wire() {
        let mut latencies = Latencies { sum_ns: 5_001_003, max_ns: 5_000_000, ..Latencies::default() };
        for ns in [3, 1000, 5_000_000] {
            latencies.counts[bucket_of(ns)] += 1;
        }
        let wire = Latency::from(&latencies);
        assert_eq!((wire.count, wire.counts.len()), (3, 3));
        assert_eq!(Latencies::from(&wire), latencies);
        let sizes: Sizes = std::array::from_fn(|bucket| bucket as u64);
        assert_eq!(Sizes::from(&SizeCounts::from(&sizes)), sizes);
        let nothing = Latency::from(&Latencies::default());
        assert_eq!((nothing.max_ns, nothing.bounds_ns.len(), nothing.counts.len()), (None, 0, 0));
    }

    /// The names of the fields of a type in the interface's description.
    fn described_fields(name: &str) -> Vec<String> {
        let start = INTERFACE.find(&format!("type {name} (")).expect("the type is described");
        let text: String = INTERFACE[start..].lines().filter(|line| !line.trim_start().starts_with('#')).collect();
        let mut depth = 0;
        let body = text.chars().skip_while(|char| *char != '(').take_while(|char| {
            depth += i32::from(*char == '(') - i32::from(*char == ')');
            depth > 0
        });
        let (mut fields, mut nested) = (String::new(), 0);
        for char in body.skip(1) {
            nested += i32::from(char == '(') - i32::from(char == ')');
            fields.push(if nested > 0 && char == ',' { ' ' } else { char });
        }
        fields.split(',').filter_map(|field| Some(field.split_once(':')?.0.trim().to_owned())).collect()
    }

    fn sent_fields(value: &impl Serialize) -> Vec<String> {
        let value = serde_json::to_value(value).unwrap();
        let mut fields: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
        fields.sort();
        fields
    }

    #[test]
    fn the_states_of_a_device_are_those_of_the_interface() {
        let line = INTERFACE.lines().find_map(|line| line.trim().strip_prefix("state: (")).unwrap();
        let described: Vec<&str> = line.trim_end_matches("),").split(", ").collect();
        assert_eq!(DeviceState::ALL.map(DeviceState::word).to_vec(), described);
        for state in DeviceState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), Value::from(state.word()));
        }
    }

    #[test]
    fn the_wire_types_match_the_varlink_interface() {
        let device = DeviceStatus {
            name: String::new(),
            state: DeviceState::Serving,
            why: None,
            pid: None,
            image: String::new(),
            socket: String::new(),
            read_only: false,
            serial: String::new(),
            mode: String::new(),
            front_end: None,
            image_bytes: None,
            cache_bytes: 0,
            cache_wanted_bytes: None,
            cache_present_bytes: None,
            resident_bytes: None,
            dirty_bytes: None,
            oldest_operation_us: None,
            limits: None,
            pending: Vec::new(),
        };
        let event = ControlEvent {
            sequence: 1,
            time_us: 0,
            device: None,
            kind: String::new(),
            detail: Value::Object(Map::new()),
        };
        let limits = LimitsStatus {
            read_iops: None,
            write_iops: None,
            total_iops: None,
            read_bytes_per_second: None,
            write_bytes_per_second: None,
            total_bytes_per_second: None,
            burst_ms: 0,
        };
        let sent = [
            ("Device", sent_fields(&device)),
            ("Limits", sent_fields(&limits)),
            ("EventCount", sent_fields(&EventCount { kind: String::new(), count: 0 })),
            ("Event", sent_fields(&event)),
            ("FrontEnd", sent_fields(&FrontEnd { pid: 1, uid: 1 })),
            ("Requests", sent_fields(&RequestStatistics::default())),
            ("Latency", sent_fields(&Latency::default())),
            ("Sizes", sent_fields(&SizeCounts::default())),
            ("Cache", sent_fields(&CacheStatistics::default())),
            ("Store", sent_fields(&StoreStatistics::default())),
            ("Worker", sent_fields(&WorkerStatistics::default())),
            ("DeviceStatistics", sent_fields(&DeviceStatistics::default())),
        ];
        for (name, sent) in sent {
            let mut described = described_fields(name);
            described.sort();
            assert_eq!(sent, described, "type {name}");
        }
    }
}

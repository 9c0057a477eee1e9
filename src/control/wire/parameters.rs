//! The parameters of the methods.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ByteExtent;

/// Parameters of a method that takes a device alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct DeviceParameters {
    pub device: String,
}

/// Parameters of `Attach`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct AttachParameters {
    pub config: Value,
}

/// Parameters of `Detach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct DetachParameters {
    pub device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub force: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard: Option<bool>,
}

/// Parameters of `Set`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct SetParameters {
    pub device: String,
    pub config: Value,
}

/// Parameters of `Reload`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct ReloadParameters {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<bool>,
}

/// Parameters of `Resize`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct ResizeParameters {
    pub device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shrink: Option<bool>,
}

/// Parameters of `Drop`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct DropParameters {
    pub device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flushed: Option<bool>,
}

/// Parameters of `Freeze`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct FreezeParameters {
    pub device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reads: Option<bool>,
}

/// Parameters of `Thaw`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct ThawParameters {
    pub device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease: Option<u64>,
}

/// Parameters of `Watch`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct WatchParameters {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

/// Parameters of `List`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct ListParameters {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

/// Parameters of `Statistics`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct StatisticsParameters {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u64>,
}

/// Parameters of `Warm`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the interface's description says it")]
pub struct WarmParameters {
    pub device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extents: Option<Vec<ByteExtent>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
}

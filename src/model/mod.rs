//! The nouns of Stillbox: ids, sizes, states, specifications and the rows that the store keeps.
//!
//! Pure values: no I/O, no async, no SQL, no dialect's spelling. Every room may use this one; it uses none.

mod ids;
mod network;
mod record;
mod secret;
mod size;
mod spec;
mod state;
mod volume;

pub use ids::{BuildId, InstanceId, ParseIdError, SandboxId, SecretId, SnapshotId, TemplateId, VolumeId};
pub use network::{EgressProxy, EgressTarget, HeaderRule, NetworkPolicy, ParseTargetError, PublicTraffic};
pub use record::{
    BuildFailure, BuildRecord, BuildSource, BuildState, DumpKey, EndReason, EventKind, EventRecord, FailureKind, Fit, Keeper, KernelRef,
    LogEntry, LogLevel, MetricPoint, ProcessRef, SandboxRecord, SnapshotRecord, TemplateRecord,
};
pub use secret::SecretRecord;
pub use size::{ByteSize, ParseSizeError};
pub use spec::{AutoResume, Keep, Lifecycle, OnTimeout, Resources, SandboxSpec, Secure};
pub use state::SandboxState;
pub use volume::{MountPath, ParseVolumeError, VolumeMount, VolumeName, VolumeRecord};

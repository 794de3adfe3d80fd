//! The core's errors in E2B's statuses and words.

use super::super::error::ApiError;
use super::super::layers::chain_of;
use super::ask::no_such_sandbox;
use crate::model::SandboxState;
use crate::sandbox::{
    ConnectError, CreateError, Exhausted, ForkError, MetricsError, NetworkError, PauseError, Scarce, StoreFailure, TimeoutError,
    UnknownSandbox,
};
use crate::template::build::{RegisterError, StartBuildError, UploadError};
use crate::template::{RemoveError, ResolveError, TagError};
use http::StatusCode;

impl From<UnknownSandbox> for ApiError {
    fn from(UnknownSandbox(id): UnknownSandbox) -> Self {
        no_such_sandbox(id)
    }
}

impl From<StoreFailure> for ApiError {
    fn from(failure: StoreFailure) -> Self {
        Self::internal(failure)
    }
}

/// Newer SDKs repeat 429 and 503 by themselves unless told not to: a full server does not empty in a second.
fn too_many(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(StatusCode::TOO_MANY_REQUESTS, error.to_string()).with_header("should-retry", "false")
}

impl From<Exhausted> for ApiError {
    fn from(exhausted: Exhausted) -> Self {
        match exhausted.scarce {
            Scarce::Disk => Self::new(StatusCode::INSUFFICIENT_STORAGE, exhausted.to_string()),
            Scarce::Places => too_many(exhausted),
        }
    }
}

impl From<CreateError> for ApiError {
    fn from(error: CreateError) -> Self {
        match error {
            CreateError::TooMany { .. } => too_many(error),
            CreateError::ShuttingDown => Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string()).with_header("retry-after", "2"),
            CreateError::Killed(_) | CreateError::VolumeFile { .. } => Self::conflict(error.to_string()),
            CreateError::IdempotencyConflict { .. } => Self::new(StatusCode::UNPROCESSABLE_ENTITY, error.to_string()),
            CreateError::NotReady { .. } | CreateError::NoVolume(_) | CreateError::MountTaken { .. } | CreateError::BadMountPath { .. } => {
                Self::bad_request(error.to_string())
            }
            CreateError::Exhausted(exhausted) => exhausted.into(),
            CreateError::Start { .. } | CreateError::Store(_) => Self::internal(error),
        }
    }
}

impl From<TimeoutError> for ApiError {
    fn from(error: TimeoutError) -> Self {
        match error {
            TimeoutError::Unknown(unknown) => unknown.into(),
            // A paused sandbox has no timeout to set, and Novita's 1.x client resumes only after a 404 here.
            TimeoutError::NotRunning { id, .. } => no_such_sandbox(id),
            TimeoutError::TooLong { .. } => Self::bad_request(error.to_string()),
            TimeoutError::Store(failure) => failure.into(),
        }
    }
}

impl From<PauseError> for ApiError {
    fn from(error: PauseError) -> Self {
        match error {
            PauseError::Unknown(unknown) => unknown.into(),
            PauseError::AlreadyPaused(_) | PauseError::InTransition { .. } | PauseError::NotDumpable { .. } => {
                Self::conflict(error.to_string())
            }
            PauseError::SnapshotSpace { .. } | PauseError::Exhausted { .. } => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, error.to_string())
            }
            PauseError::Dump { .. } | PauseError::Store(_) => Self::internal(error),
        }
    }
}

impl From<ConnectError> for ApiError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Unknown(unknown) => unknown.into(),
            ConnectError::AlreadyRunning(_) | ConnectError::InTransition { .. } => Self::conflict(error.to_string()),
            ConnectError::TooLong { .. } => Self::bad_request(error.to_string()),
            ConnectError::TooMany { .. } => too_many(error),
            ConnectError::BadMountPath { .. } | ConnectError::VolumeFile { .. } => Self::conflict(error.to_string()),
            ConnectError::Exhausted { exhausted, .. } => exhausted.into(),
            ConnectError::Restore { .. } | ConnectError::Store(_) => Self::internal(error),
        }
    }
}

impl From<ForkError> for ApiError {
    fn from(error: ForkError) -> Self {
        match error {
            ForkError::Source(source) => source.into(),
            ForkError::Copy(copy) => copy.into(),
        }
    }
}

impl From<NetworkError> for ApiError {
    fn from(error: NetworkError) -> Self {
        match error {
            NetworkError::Unknown(unknown) => unknown.into(),
            NetworkError::NotRunning { id, state: SandboxState::Paused } => no_such_sandbox(id),
            NetworkError::NotRunning { .. } => Self::conflict(error.to_string()),
            NetworkError::Apply { .. } | NetworkError::Store(_) => Self::internal(error),
        }
    }
}

impl From<MetricsError> for ApiError {
    fn from(error: MetricsError) -> Self {
        match error {
            MetricsError::Unknown(unknown) => unknown.into(),
            MetricsError::Store(failure) => failure.into(),
        }
    }
}

impl From<ResolveError> for ApiError {
    fn from(error: ResolveError) -> Self {
        match error {
            ResolveError::UnknownTemplate(_) | ResolveError::UnknownTag { .. } => Self::not_found(error.to_string()),
            // 400 is what E2B answers to a build that is not there.
            ResolveError::UnknownBuild { .. } | ResolveError::Malformed { .. } | ResolveError::BadTag { .. } => {
                Self::bad_request(error.to_string())
            }
            ResolveError::Store(_) => Self::internal(error),
        }
    }
}

impl From<TagError> for ApiError {
    fn from(error: TagError) -> Self {
        match error {
            TagError::Resolve(error) => error.into(),
            TagError::NoTag | TagError::Default | TagError::TaggedName(_) => Self::bad_request(error.to_string()),
        }
    }
}

impl From<RegisterError> for ApiError {
    fn from(error: RegisterError) -> Self {
        match error {
            RegisterError::Resolve(error) => error.into(),
            RegisterError::Snapshot(_) => Self::conflict(error.to_string()),
            RegisterError::Size { .. } => Self::bad_request(error.to_string()),
        }
    }
}

impl From<StartBuildError> for ApiError {
    fn from(error: StartBuildError) -> Self {
        match error {
            StartBuildError::Resolve(error) => error.into(),
            StartBuildError::Started(_) => Self::conflict(error.to_string()),
            StartBuildError::TooMany { .. } => too_many(error),
        }
    }
}

impl From<UploadError> for ApiError {
    fn from(error: UploadError) -> Self {
        match error {
            UploadError::Hash(_) => Self::bad_request(error.to_string()),
            UploadError::TooLarge { .. } => Self::new(StatusCode::PAYLOAD_TOO_LARGE, error.to_string()),
            UploadError::Io(ref cause) if cause.kind() == std::io::ErrorKind::StorageFull => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, error.to_string())
            }
            UploadError::Io(_) => Self::internal(error),
        }
    }
}

impl From<RemoveError> for ApiError {
    fn from(error: RemoveError) -> Self {
        match error {
            RemoveError::Resolve(error) => error.into(),
            RemoveError::InUse { .. } => Self::bad_request(error.to_string()),
        }
    }
}

/// A copy that failed, as an entry among copies that did not: what is internal goes to the log here.
pub(super) fn entry(error: CreateError) -> (u16, String) {
    let error = ApiError::from(error);
    if let Some(cause) = error.cause() {
        tracing::error!(cause = chain_of(cause), "A fork failed");
    }
    let (code, message) = error.code_and_message();
    (code, message.to_owned())
}

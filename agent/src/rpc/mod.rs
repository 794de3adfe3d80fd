//! The Connect-RPC side of envd's wire: generated messages, the router, and what all services share.

mod process;

use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use connectrpc::{CompressionPolicy, ConnectError, ConnectRpcService, Limits, RequestContext, Router};

use crate::auth;
use crate::filesystem;
use crate::paths::PathError;
use crate::state::{Agent, Identity};
use crate::users::{User, UserError};

/// Messages and service traits of proto/*.proto.
#[allow(
    unreachable_pub,
    missing_debug_implementations,
    clippy::all,
    clippy::fn_params_excessive_bools,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
pub(crate) mod proto {
    connectrpc::include_generated!("envd.rs");
}

/// One message, stdin chunks included. The SDKs send whole strings, so it is larger than the crate's 4 MiB.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
const KEEPALIVE_DEFAULT: Duration = Duration::from_secs(90);

/// All RPC services, to be mounted behind the plain routes. Never compresses: some clients decode identity alone.
pub(crate) fn service(agent: &Arc<Agent>) -> ConnectRpcService {
    let limits = Limits::default().with_max_request_body_size(MESSAGE_BYTES_MAX).with_max_message_size(MESSAGE_BYTES_MAX);
    let filesystem = filesystem::service::Service { agent: Arc::clone(agent) };
    let services = Router::new().add_service(process::ProcessService::new(Arc::clone(agent))).add_service(Arc::new(filesystem));
    services.into_axum_service().with_limits(limits).with_compression_policy(CompressionPolicy::disabled())
}

/// The user that the call runs as.
pub(crate) fn user(identity: &Identity, ctx: &RequestContext) -> Result<User, ConnectError> {
    Ok(auth::user(identity, ctx.headers())?)
}

/// After how much silence a stream owes its client a keepalive event.
pub(crate) fn keepalive_interval(headers: &HeaderMap) -> Duration {
    let seconds = headers.get(KEEPALIVE_HEADER).and_then(|value| value.to_str().ok()).and_then(|text| text.trim().parse().ok());
    seconds.filter(|seconds| *seconds > 0).map_or(KEEPALIVE_DEFAULT, Duration::from_secs)
}

impl From<UserError> for ConnectError {
    fn from(error: UserError) -> ConnectError {
        match error {
            UserError::Unknown { .. } => ConnectError::unauthenticated(error.to_string()),
            UserError::Read { .. } => ConnectError::internal(error.to_string()),
        }
    }
}

impl From<PathError> for ConnectError {
    fn from(error: PathError) -> ConnectError {
        ConnectError::invalid_argument(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use sha2::{Digest as _, Sha256};

    use super::*;

    #[test]
    fn the_descriptor_was_made_from_the_proto_files_as_they_are() {
        let mut sums = String::new();
        for (name, text) in [
            ("filesystem.proto", include_str!("../../proto/filesystem.proto")),
            ("process.proto", include_str!("../../proto/process.proto")),
        ] {
            for byte in Sha256::digest(text) {
                write!(sums, "{byte:02x}").unwrap();
            }
            writeln!(sums, "  {name}").unwrap();
        }
        assert_eq!(sums, include_str!("../../proto/descriptor.sha256"), "run the protoc command in agent/build.rs");
    }

    #[test]
    fn the_keepalive_interval_is_the_clients_or_90_seconds() {
        let asked = |value: &str| {
            keepalive_interval(&HeaderMap::from_iter([(axum::http::HeaderName::from_static(KEEPALIVE_HEADER), value.parse().unwrap())]))
        };
        assert_eq!(asked("50"), Duration::from_secs(50));
        assert_eq!(asked("0"), KEEPALIVE_DEFAULT);
        assert_eq!(asked("soon"), KEEPALIVE_DEFAULT);
        assert_eq!(keepalive_interval(&HeaderMap::new()), KEEPALIVE_DEFAULT);
    }
}

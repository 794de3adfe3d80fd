//! Request bodies of the control plane: JSON, with or without a length, within a size and a time.

use super::ApiState;
use super::error::ApiError;
use axum::extract::{FromRequest, Request};
use http::StatusCode;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

/// A body that must be there.
pub(super) struct Json<T>(pub(super) T);

/// A body that may be empty, which means all defaults.
pub(super) struct OptionalJson<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<ApiState> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &ApiState) -> Result<Self, ApiError> {
        let bytes = read(request, state).await?;
        parse(&bytes).map(Json)
    }
}

impl<T: DeserializeOwned + Default> FromRequest<ApiState> for OptionalJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &ApiState) -> Result<Self, ApiError> {
        let bytes = read(request, state).await?;
        match bytes.trim_ascii() {
            b"" | b"null" => Ok(Self(T::default())),
            json => parse(json).map(Self),
        }
    }
}

async fn read(request: Request, state: &ApiState) -> Result<Vec<u8>, ApiError> {
    let (size_max, time_max) = (state.config.body_bytes_max, state.config.body_time_max);
    let limit = usize::try_from(size_max.bytes()).unwrap_or(usize::MAX);
    let collected = tokio::time::timeout(time_max, Limited::new(request.into_body(), limit).collect()).await;
    match collected {
        Ok(Ok(body)) => Ok(body.to_bytes().into()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let message = format!("the request body is larger than {size_max} (api.body_bytes_max)");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message))
        }
        Ok(Err(_broken)) => Err(ApiError::bad_request("the request body ended before it was complete")),
        Err(_too_slow) => {
            let message = format!("the request body took longer than {time_max:?} (api.body_time_max)");
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}

/// The value, or a 400 that names the field, line and column.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        match path.as_str() {
            "." | "?" => ApiError::bad_request(format!("the request body is no valid JSON for this call: {}", error.inner())),
            field => ApiError::bad_request(format!("field '{field}' of the request body is invalid: {}", error.inner())),
        }
    })?;
    json.end().map_err(|error| ApiError::bad_request(format!("the request body is no valid JSON for this call: {error}")))?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[expect(dead_code, reason = "only whether it parses matters")]
    struct Example {
        timeout: i64,
        metadata: std::collections::BTreeMap<String, String>,
    }

    fn refused(json: &str) -> String {
        parse::<Example>(json.as_bytes()).unwrap_err().code_and_message().1.to_owned()
    }

    #[test]
    fn malformed_json_is_refused_with_its_place() {
        assert_eq!(
            refused("{\"timeout\": 1,\n  oops}"),
            "the request body is no valid JSON for this call: key must be a string at line 2 column 3"
        );
        assert!(refused("").ends_with("EOF while parsing a value at line 1 column 0"));
        assert!(refused(r#"{"timeout":1,"metadata":{}} x"#).ends_with("trailing characters at line 1 column 29"));
    }

    #[test]
    fn a_field_of_the_wrong_type_is_named() {
        assert_eq!(
            refused(r#"{"timeout":1,"metadata":{"a":1}}"#),
            "field 'metadata.a' of the request body is invalid: invalid type: integer `1`, expected a string at line 1 column 30"
        );
        assert!(refused(r#"{"timeout":"x"}"#).starts_with("field 'timeout' of the request body is invalid: invalid type: string \"x\""));
    }
}

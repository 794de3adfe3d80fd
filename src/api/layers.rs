//! What every answer of the control plane has: a request id, CORS headers, and JSON even where routing itself failed.

use super::error::{ApiError, InternalFailure, Wording, body};
use axum::Router;
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, StatusCode};
use std::error::Error;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Puts the layers around the routes.
pub(super) fn around(routes: Router) -> Router {
    routes.layer(middleware::from_fn(cors)).layer(middleware::from_fn(label))
}

/// Answers what no route takes.
pub(super) fn closed<S: Clone + Send + Sync + 'static>(routes: Router<S>) -> Router<S> {
    routes.fallback(unknown_path).method_not_allowed_fallback(wrong_method)
}

async fn unknown_path(request: Request) -> ApiError {
    ApiError::not_found(format!("{} {} does not exist", request.method(), request.uri().path()))
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} does not take {}", request.uri().path(), request.method()))
}

/// A request's id, for handlers whose answers have it in their body.
#[derive(Debug, Clone)]
pub(super) struct RequestId(String);

impl RequestId {
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Gives the request an id; logs internal errors with it, once, and tells it to the client instead of their text.
async fn label(mut request: Request, next: Next) -> Response {
    let id = new_request_id();
    request.extensions_mut().insert(RequestId(id.clone()));
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = next.run(request).await;
    if let Some(InternalFailure { cause, wording }) = response.extensions_mut().remove() {
        let chain = chain_of(cause.as_ref());
        tracing::error!(request.id = %id, %method, path, "Request {id} failed: {chain}");
        if wording == Wording::Common {
            response = body(response.status(), &format!("internal error; the server's log has more under request id {id}"));
        }
    }
    response.headers_mut().insert(REQUEST_ID, HeaderValue::try_from(id).expect("a request id is hexadecimal"));
    response
}

fn new_request_id() -> String {
    let mut id = [0u8; 8];
    getrandom::fill(&mut id).expect("the kernel's random generator always answers on Linux >= 5.19");
    hex::encode(id)
}

/// An error and what caused it, outermost first.
pub(super) fn chain_of(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Any origin may call: what protects the control plane is the API key, which browsers send only when a page has it.
async fn cors(request: Request, next: Next) -> Response {
    let is_preflight = request.method() == Method::OPTIONS && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let wanted = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let mut response = if is_preflight { StatusCode::NO_CONTENT.into_response() } else { next.run(request).await };
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        HeaderValue::from_static("x-next-token, x-total-running, x-request-id, retry-after, should-retry"),
    );
    if is_preflight {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, PUT, PATCH, DELETE, OPTIONS"));
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.unwrap_or(HeaderValue::from_static("*")));
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("7200"));
    }
    response
}

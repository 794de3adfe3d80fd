//! What the proxy itself answers when no sandbox does: E2B's texts, as JSON, or as a page when a browser navigates.
//!
//! A page also says what the person in front of it can do. SDKs look for `was not found` and `port is not open` in 502 messages: the wording is part of the wire.

use super::address::{AddressError, Target};
use super::forward::ProxyBody;
use http::header::{self, HeaderName};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use serde_json::{Value, json};

/// The header that carries the traffic token.
pub(super) const TRAFFIC_TOKEN_HEADER: &str = "e2b-traffic-access-token";

/// Why a request was not passed into a sandbox, or not answered by it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// Unknown, killed, or paused and not to be woken by traffic.
    #[error("The sandbox was not found")]
    NotFound,
    /// Nothing listens.
    #[error("The sandbox is running but port is not open")]
    PortClosed,
    /// Something listened, and hung up or spoke no HTTP.
    #[error("The service in the sandbox closed the connection without a valid HTTP answer")]
    BadAnswer,
    /// User ports of this sandbox want the traffic token.
    #[error("Sandbox is secured with traffic access token. Token header '{TRAFFIC_TOKEN_HEADER}' is missing")]
    TrafficTokenMissing,
    /// It was another one.
    #[error("Sandbox is secured with traffic access token. Provided token in header '{TRAFFIC_TOKEN_HEADER}' is invalid")]
    TrafficTokenInvalid,
    /// It sleeps, and the request has no right to wake it.
    #[error("This sandbox can't be resumed with the credentials provided. Check your access token and try again.")]
    WakeDenied,
    /// It neither ran nor slept for as long as a request may wait.
    #[error("The sandbox is still transitioning. Try again in a moment.")]
    Transitioning,
    /// It sleeps, and no more sandboxes may run.
    #[error("{0}")]
    NoPlace(String),
    /// It sleeps, and its restore failed; it can be tried again.
    #[error("The sandbox could not be resumed; it stays paused and can be tried again")]
    WakeFailed,
    /// A route of envd's that only this server may use.
    #[error("This endpoint is reserved for the server and is not reachable through the sandbox URL")]
    InternalRoute {
        /// The path asked for.
        path: String,
    },
    /// `CONNECT` would be a tunnel past every check here.
    #[error("the method CONNECT is not proxied")]
    Tunnel,
}

impl Refusal {
    /// Its status on the wire.
    pub(super) const fn status(&self) -> StatusCode {
        match self {
            Self::NotFound | Self::PortClosed | Self::BadAnswer | Self::WakeFailed => StatusCode::BAD_GATEWAY,
            Self::TrafficTokenMissing | Self::TrafficTokenInvalid | Self::WakeDenied => StatusCode::FORBIDDEN,
            Self::Transitioning => StatusCode::CONFLICT,
            Self::NoPlace(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::InternalRoute { .. } => StatusCode::NOT_FOUND,
            Self::Tunnel => StatusCode::METHOD_NOT_ALLOWED,
        }
    }

    /// The answer to a request for `target`.
    pub(super) fn into_response(self, target: &Target, form: Form) -> Response<ProxyBody> {
        let status = self.status();
        match form {
            Form::Page => answer(status, "text/html; charset=utf-8", self.page(target)),
            Form::Json => answer(status, "application/json; charset=utf-8", self.json(target).to_string()),
        }
    }

    /// What the person in front of the browser can do.
    const fn next_step(&self) -> &'static str {
        match self {
            Self::NotFound => "It has ended, sleeps until its client connects again, or the name is mistyped.",
            Self::PortClosed => "Start a server on this port in the sandbox, on any of its addresses, and reload.",
            Self::BadAnswer => "The sandbox's own log of that service says why.",
            Self::TrafficTokenMissing | Self::TrafficTokenInvalid => "The client that created the sandbox has the token.",
            Self::WakeDenied => "Its client can resume it.",
            Self::Transitioning => "Reload in a moment.",
            Self::NoPlace(_) => "End or pause another sandbox, and reload.",
            Self::WakeFailed => "Reload to try again; the server's log says why.",
            Self::InternalRoute { .. } | Self::Tunnel => "Every other path and method is passed on.",
        }
    }

    fn page(&self, target: &Target) -> String {
        let (status, message, name, port) = (self.status(), escape(&self.to_string()), escape(&target.name), target.port);
        format!(
            "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
             <title>{status}</title>\n\
             <body style=\"font:16px/1.5 system-ui,sans-serif;max-width:40rem;margin:15vh auto;padding:0 1rem\">\n\
             <h1 style=\"font-size:1.25rem\">{message}</h1>\n<p>{}</p>\n\
             <p>sandbox <code>{name}</code>, port <code>{port}</code></p>\n</body></html>\n",
            self.next_step()
        )
    }

    fn json(&self, target: &Target) -> Value {
        let (code, message) = (self.status().as_u16(), self.to_string());
        match self {
            Self::InternalRoute { path } => json!({ "message": message, "path": path, "code": code }),
            Self::PortClosed => json!({ "sandboxId": target.name, "message": message, "port": target.port, "code": code }),
            Self::NotFound
            | Self::BadAnswer
            | Self::TrafficTokenMissing
            | Self::TrafficTokenInvalid
            | Self::WakeDenied
            | Self::Transitioning
            | Self::NoPlace(_)
            | Self::WakeFailed
            | Self::Tunnel => json!({ "sandboxId": target.name, "message": message, "code": code }),
        }
    }
}

/// The answer to a request that wants a sandbox and does not say which: plain text, as E2B's.
pub(super) fn bad_address(error: AddressError) -> Response<ProxyBody> {
    answer(StatusCode::BAD_REQUEST, "text/plain; charset=utf-8", format!("{error}\n"))
}

/// The answer to a signed URL on the shared host when no live sandbox's token made the signature.
pub(super) fn unsigned() -> Response<ProxyBody> {
    let body = json!({ "code": 401, "message": "invalid signature: no live sandbox has made it" });
    answer(StatusCode::UNAUTHORIZED, "application/json; charset=utf-8", body.to_string())
}

/// How a refusal is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// To a program.
    Json,
    /// To a person.
    Page,
}

impl Form {
    /// A page for a browser that navigates, JSON for everything else, scripts in browsers included.
    pub(super) fn wanted_by(headers: &HeaderMap) -> Self {
        let has = |name: HeaderName, word: &str| {
            headers.get(name).and_then(|value| value.to_str().ok()).is_some_and(|value| value.contains(word))
        };
        let navigates = match headers.get("sec-fetch-mode") {
            Some(mode) => mode == "navigate",
            None => has(header::USER_AGENT, "Mozilla/") && has(header::ACCEPT, "text/html"),
        };
        match navigates {
            true => Self::Page,
            false => Self::Json,
        }
    }
}

/// Messages and names are ours or `[a-z0-9]`, but for a limit's text; escaped anyway, since the page is served below the sandbox's origin.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// An answer of the proxy's own.
pub(super) fn answer(status: StatusCode, content_type: &'static str, body: String) -> Response<ProxyBody> {
    let mut response = Response::new(ProxyBody::text(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    // Scripts of other origins must be able to read why: the sandbox's own answers carry its own CORS headers.
    response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    async fn shown(refusal: Refusal, headers: &HeaderMap) -> (u16, String, String) {
        let target = Target { name: "nobody".into(), id: None, port: 8000 };
        let response = refusal.into_response(&target, Form::wanted_by(headers));
        let kind = response.headers()[header::CONTENT_TYPE].to_str().unwrap().to_owned();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, kind, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn scripts_get_the_contracts_json() {
        let cases = [
            (Refusal::NotFound, 502, r#"{"code":502,"message":"The sandbox was not found","sandboxId":"nobody"}"#),
            (
                Refusal::PortClosed,
                502,
                r#"{"code":502,"message":"The sandbox is running but port is not open","port":8000,"sandboxId":"nobody"}"#,
            ),
            (
                Refusal::TrafficTokenMissing,
                403,
                r#"{"code":403,"message":"Sandbox is secured with traffic access token. Token header 'e2b-traffic-access-token' is missing","sandboxId":"nobody"}"#,
            ),
            (
                Refusal::InternalRoute { path: "/init".into() },
                404,
                r#"{"code":404,"message":"This endpoint is reserved for the server and is not reachable through the sandbox URL","path":"/init"}"#,
            ),
        ];
        for (refusal, status, body) in cases {
            let shown = shown(refusal, &HeaderMap::new()).await;
            assert_eq!(shown, (status, "application/json; charset=utf-8".to_owned(), body.to_owned()));
        }
    }

    #[tokio::test]
    async fn a_browser_that_navigates_gets_a_page_and_one_that_fetches_gets_json() {
        let mut headers = HeaderMap::new();
        headers.insert("user-agent", HeaderValue::from_static("Mozilla/5.0 (X11)"));
        headers.insert("accept", HeaderValue::from_static("text/html,*/*"));
        let (status, kind, body) = shown(Refusal::NoPlace("<20> run".into()), &headers).await;
        assert_eq!((status, kind.as_str()), (429, "text/html; charset=utf-8"));
        assert!(body.contains("&lt;20&gt; run") && body.contains("pause another sandbox, and reload"), "{body}");
        headers.insert("sec-fetch-mode", HeaderValue::from_static("cors"));
        assert!(shown(Refusal::NotFound, &headers).await.1.starts_with("application/json"));
    }
}

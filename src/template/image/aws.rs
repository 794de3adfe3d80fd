//! ECR's password for an AWS account: one call of its API, signed as AWS wants it (Signature Version 4).

use super::auth::Login;
use super::registry::{RegistryError, Transport};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use time::macros::format_description;

const TARGET: &str = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken";
const CONTENT_TYPE: &str = "application/x-amz-json-1.1";
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// An account's keys.
pub(super) struct Keys<'a> {
    pub(super) access_key_id: &'a str,
    pub(super) secret_access_key: &'a str,
    pub(super) region: &'a str,
}

/// Asks ECR in the keys' region.
pub(super) fn login(transport: &Transport<'_>, keys: &Keys<'_>) -> Result<Login, RegistryError> {
    if keys.region.is_empty() || !keys.region.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        return Err(RegistryError::Garbled("the AWS region of the credentials is none".to_owned()));
    }
    let suffix = if keys.region.starts_with("cn-") { "amazonaws.com.cn" } else { "amazonaws.com" };
    let host = format!("api.ecr.{}.{suffix}", keys.region);
    let date = OffsetDateTime::now_utc().format(format_description!("[year][month][day]T[hour][minute][second]Z"));
    let date = date.map_err(|_| RegistryError::Garbled("this machine's clock has no date".to_owned()))?;
    let headers = [("content-type", CONTENT_TYPE), ("host", host.as_str()), ("x-amz-date", date.as_str()), ("x-amz-target", TARGET)];
    let body = b"{}";
    let authorization = sign(keys, "ecr", "POST", &headers, body);
    let mut answer = transport.post(&format!("https://{host}/"), &headers, &authorization, body)?;
    let bytes = answer.read(ANSWER_BYTES_MAX)?;
    match answer.status {
        200 => password_in(&bytes),
        status @ (400 | 401 | 403) => Err(RegistryError::Denied { status }),
        status => Err(RegistryError::Status { status, what: "ECR's password".to_owned() }),
    }
}

fn password_in(answer: &[u8]) -> Result<Login, RegistryError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer {
        authorization_data: Vec<Data>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Data {
        authorization_token: String,
    }
    let garbled = || RegistryError::Garbled("ECR answers no password".to_owned());
    let answer: Answer = serde_json::from_slice(answer).map_err(|_| garbled())?;
    let token = answer.authorization_data.into_iter().next().ok_or_else(garbled)?.authorization_token;
    let pair = STANDARD.decode(token).ok().and_then(|bytes| String::from_utf8(bytes).ok()).ok_or_else(garbled)?;
    let (username, password) = pair.split_once(':').ok_or_else(garbled)?;
    Ok(Login { username: username.to_owned(), password: password.to_owned() })
}

/// The Authorization header for a request of `/` without a query. `headers` are in order and hold host and x-amz-date.
fn sign(keys: &Keys<'_>, service: &str, method: &str, headers: &[(&str, &str)], body: &[u8]) -> String {
    let date = headers.iter().find(|(name, _)| *name == "x-amz-date").map_or("", |(_, value)| *value);
    let day = date.get(..8).unwrap_or_default();
    let signed = headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
    let canonical: String = headers.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
    let request = format!("{method}\n/\n\n{canonical}\n{signed}\n{}", hex::encode(Sha256::digest(body)));
    let scope = format!("{day}/{}/{service}/aws4_request", keys.region);
    let to_sign = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", hex::encode(Sha256::digest(request)));
    let key = [day, keys.region, service, "aws4_request"]
        .iter()
        .fold(format!("AWS4{}", keys.secret_access_key).into_bytes(), |key, part| mac(&key, part.as_bytes()));
    let signature = hex::encode(mac(&key, to_sign.as_bytes()));
    format!("AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={signed}, Signature={signature}", keys.access_key_id)
}

fn mac(key: &[u8], message: &[u8]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(message);
    mac.finalize().into_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example `post-vanilla` of AWS's test suite for signatures.
    #[test]
    fn the_signature_is_the_one_of_awss_own_example() {
        let keys =
            Keys { access_key_id: "AKIDEXAMPLE", secret_access_key: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", region: "us-east-1" };
        let headers = [("host", "example.amazonaws.com"), ("x-amz-date", "20150830T123600Z")];
        assert_eq!(
            sign(&keys, "service", "POST", &headers, b""),
            "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, SignedHeaders=host;x-amz-date, \
             Signature=5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"
        );
    }

    #[test]
    fn ecrs_password_is_read_out_of_its_answer() {
        let token = STANDARD.encode("AWS:eyJw");
        let login = password_in(format!(r#"{{"authorizationData":[{{"authorizationToken":"{token}"}}]}}"#).as_bytes()).unwrap();
        assert_eq!((login.username.as_str(), login.password.as_str()), ("AWS", "eyJw"));
        assert!(password_in(b"{}").is_err());
    }
}

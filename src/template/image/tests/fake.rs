//! A registry that does what none should: breaks off, lies, leads astray.

use super::*;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};

/// What it is asked.
struct Asked {
    path: String,
    headers: BTreeMap<String, String>,
}

/// What it answers.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Bytes of the body after which the connection ends.
    cut_after: Option<usize>,
}

fn answer(status: u16, body: &[u8]) -> Answer {
    Answer { status, headers: Vec::new(), body: body.to_vec(), cut_after: None }
}

/// Serves until the test's process ends; answers its host.
fn serve(answer_to: impl Fn(&Asked) -> Answer + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            // A client that goes away is the test's business.
            let _ = connection.and_then(|connection| serve_one(connection, &answer_to));
        }
    });
    host
}

fn serve_one(connection: TcpStream, answer_to: &impl Fn(&Asked) -> Answer) -> io::Result<()> {
    let mut reader = BufReader::new(connection.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? <= 2 {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    let answer = answer_to(&Asked { path, headers });
    let mut writer = connection;
    write!(writer, "HTTP/1.1 {} x\r\ncontent-length: {}\r\nconnection: close\r\n", answer.status, answer.body.len())?;
    for (name, value) in &answer.headers {
        write!(writer, "{name}: {value}\r\n")?;
    }
    writer.write_all(b"\r\n")?;
    let end = answer.cut_after.unwrap_or(answer.body.len());
    writer.write_all(&answer.body[..end])
}

/// What an honest registry answers.
fn honest(image: &TestImage, asked: &Asked) -> Answer {
    let name = asked.path.rsplit('/').next().unwrap_or_default();
    let name = if asked.path.contains("/manifests/v1") { image.manifest.as_str() } else { name };
    image.blob(name).map_or_else(|| answer(404, b""), |bytes| answer(200, bytes))
}

fn pull(host: &str) -> (tempfile::TempDir, TemplateConfig, Result<ImageBase, ImageError>, Vec<String>) {
    let data_dir = tempfile::tempdir().unwrap();
    let mut config = config(data_dir.path());
    config.images.plain_http = vec![host.to_owned()];
    let (outcome, said) = resolved(&config, &request(&format!("{host}/team/app:v1")));
    (data_dir, config, outcome, said)
}

#[test]
fn a_token_is_fetched_where_the_registry_says() {
    let image = sample();
    let host = Arc::new(Mutex::new(String::new()));
    let known = Arc::clone(&host);
    let served = serve(move |asked| match asked.headers.get("authorization").map(String::as_str) {
        _ if asked.path.starts_with("/token?service=fake&scope=repository%3Ateam%2Fapp%3Apull") => answer(200, br#"{"token":"t0ken"}"#),
        Some("Bearer t0ken") => honest(&image, asked),
        _ => {
            let realm = format!(r#"Bearer realm="http://{}/token",service="fake",scope="repository:team/app:pull""#, known.lock().unwrap());
            Answer { headers: vec![("www-authenticate", realm)], ..answer(401, b"") }
        }
    });
    host.lock().unwrap().clone_from(&served);
    let (_data_dir, config, outcome, _) = pull(&served);
    assert_is_sample(&config, &outcome.unwrap_or_else(|error| panic!("{}", told(&error))));
}

#[test]
fn a_layer_that_breaks_off_goes_on_where_it_ended() {
    let image = TestImage::of("amd64", &[tar_of(&[("etc/motd", "hello"), ("large", &"0123456789".repeat(30_000))])]);
    let large = image.blobs[0].0.to_string();
    let whole = image.blobs[0].1.clone();
    let host = serve(move |asked| {
        if !asked.path.ends_with(&large) {
            return honest(&image, asked);
        }
        let from: usize = asked.headers.get("range").map_or(0, |range| range["bytes=".len()..].trim_end_matches('-').parse().unwrap());
        let status = if from == 0 { 200 } else { 206 };
        let rest = &whole[from..];
        Answer { cut_after: (rest.len() > 200_000).then_some(100_000), ..answer(status, rest) }
    });
    let (_data_dir, _config, outcome, said) = pull(&host);
    assert_eq!(outcome.unwrap_or_else(|error| panic!("{}", told(&error))).layers.len(), 1);
    assert_eq!(said.iter().filter(|line| line.contains("going on at byte")).count(), 2, "{said:?}");
}

#[tokio::test]
async fn a_pull_that_nobody_waits_for_ends_and_leaves_nothing() {
    let image = TestImage::of("amd64", &[tar_of(&[("large", &"0123456789".repeat(200_000))])]);
    let large = image.blobs[0].0.to_string();
    let host = serve(move |asked| {
        // It arrives in pieces, each as late as a client may be kept waiting.
        let is_large = asked.path.ends_with(&large);
        if is_large {
            std::thread::sleep(Duration::from_millis(200));
        }
        let from: usize = asked.headers.get("range").map_or(0, |range| range["bytes=".len()..].trim_end_matches('-').parse().unwrap());
        let whole = honest(&image, asked);
        match is_large {
            true => Answer { cut_after: Some(1000), ..answer(if from == 0 { 200 } else { 206 }, &whole.body[from..]) },
            false => whole,
        }
    });
    let data_dir = tempfile::tempdir().unwrap();
    let mut config = config(data_dir.path());
    config.images.plain_http = vec![host.clone()];
    let asked = request(&format!("{host}/team/app:v1"));
    let pull = resolve(&asked, &config, &|_| {});
    assert!(tokio::time::timeout(Duration::from_millis(700), pull).await.is_err(), "it was quicker than the connection");
    assert_eq!(layers_left(data_dir.path()), 1, "the layer was on its way");
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while layers_left(data_dir.path()) > 0 {
        assert!(std::time::Instant::now() < deadline, "the pull goes on for nobody");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn an_overloaded_registry_is_asked_again() {
    let image = sample();
    let asked_before = std::sync::atomic::AtomicUsize::new(0);
    let host = serve(move |asked| match asked_before.fetch_add(1, Ordering::Relaxed) {
        0 | 2 => answer(503, b"busy"),
        _ => honest(&image, asked),
    });
    let (_data_dir, _config, outcome, said) = pull(&host);
    assert!(outcome.is_ok() && said.iter().any(|line| line.ends_with("trying again")), "{said:?}");
}

#[test]
fn lies_are_found_out_and_leave_nothing() {
    let refusal = |lie: fn(&TestImage, &Asked) -> Option<Answer>| {
        let image = sample();
        let host = serve(move |asked| lie(&image, asked).unwrap_or_else(|| honest(&image, asked)));
        let (data_dir, _config, outcome, _) = pull(&host);
        assert_eq!(layers_left(data_dir.path()), 0, "something was left");
        told(&outcome.unwrap_err())
    };
    let other_layer = refusal(|image, asked| {
        let is_layer = image.blobs[..2].iter().any(|(digest, _)| asked.path.ends_with(digest.as_str()));
        is_layer.then(|| answer(200, &vec![0; image.blob(&asked.path[asked.path.len() - 71..]).unwrap().len()]))
    });
    assert!(other_layer.contains("should be sha256:"), "{other_layer}");
    let other_manifest = refusal(|image, asked| {
        let header = ("docker-content-digest", image.blobs[0].0.to_string());
        asked.path.contains("/manifests/").then(|| Answer { headers: vec![header], ..honest(image, asked) })
    });
    assert!(other_manifest.contains("its manifest should be"), "{other_manifest}");
    let endless = refusal(|_, asked| asked.path.contains("/manifests/").then(|| answer(200, &vec![b' '; 5 << 20])));
    assert!(endless.contains("larger than 4194304 bytes"), "{endless}");
}

#[test]
fn nobody_is_led_to_a_place_without_tls() {
    for header in ["location", "www-authenticate"] {
        let host = serve(move |_| match header {
            "location" => Answer { headers: vec![(header, "http://elsewhere.example/x".to_owned())], ..answer(307, b"") },
            _ => Answer { headers: vec![(header, r#"Bearer realm="http://elsewhere.example/t""#.to_owned())], ..answer(401, b"") },
        });
        let (_data_dir, _config, outcome, _) = pull(&host);
        let message = told(&outcome.unwrap_err());
        assert!(message.contains("elsewhere.example") && message.contains("without TLS"), "{message}");
    }
}

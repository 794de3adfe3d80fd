//! Against Debian's docker-registry, filled by skopeo: what it does is what registries do.

use super::*;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::time::Instant;

/// bcrypt of `open sesame`.
const PASSWORD_HASH: &str = "$2y$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW";

/// A registry of its own folder and port; ended when dropped.
struct Registry {
    child: Child,
    port: u16,
    folder: tempfile::TempDir,
}

enum Doors {
    Open,
    /// For `me` with the password `open sesame`.
    Locked,
}

impl Registry {
    fn start(doors: Doors) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let mut text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '127.0.0.1:{port}', secret: test}}\n",
            at("storage")
        );
        if let Doors::Locked = doors {
            fs::write(at("htpasswd"), format!("me:{PASSWORD_HASH}\n")).unwrap();
            text.push_str(&format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", at("htpasswd")));
        }
        fs::write(at("config.yml"), text).unwrap();
        let mut command = Command::new("docker-registry");
        command.args(["serve", &at("config.yml")]).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap_or_else(|error| panic!("docker-registry: {error}; make setup-test installs it"));
        let registry = Self { child, port, folder };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen after 20 s");
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn push(&self, images: &[(&str, &TestImage)], name: &str, more: &[&str]) {
        let layout = self.folder.path().join("layout");
        write_layout(&layout, images);
        let source = format!("oci:{}:team/app:v1", layout.display());
        let target = format!("docker://{}/{name}", self.host());
        let mut arguments = vec!["copy", "-q", "--all", "--dest-tls-verify=false"];
        arguments.extend(more);
        arguments.extend([source.as_str(), target.as_str()]);
        run("skopeo", &arguments);
    }

    fn config(&self, data_dir: &Path) -> TemplateConfig {
        let mut config = config(data_dir);
        config.images.plain_http = vec![self.host()];
        config
    }

    fn stop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Ended by the test already, perhaps.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_image_is_pulled_once_and_used_without_its_registry() {
    let mut registry = Registry::start(Doors::Open);
    let other = TestImage::of("arm64", &[tar_of(&[("x", "arm")])]);
    registry.push(&[("arm64", &other), ("amd64", &sample())], "team/app:v1", &[]);
    let data_dir = tempfile::tempdir().unwrap();
    let config = registry.config(data_dir.path());
    let asked = request(&format!("{}/team/app:v1", registry.host()));
    let (base, said) = resolved(&config, &asked);
    let base = base.unwrap_or_else(|error| panic!("{}", told(&error)));
    assert_is_sample(&config, &base);
    assert!(said[0].starts_with("Pulling ") && said.iter().any(|line| line.starts_with("layer 2/2 ")), "{said:?}");
    let (again, said) = resolved(&config, &asked);
    assert_eq!(again.unwrap().layers, base.layers);
    assert!(said.last().unwrap().contains("is up to date"), "{said:?}");
    let by_digest = request(&format!("{}/team/app@{}", registry.host(), base.digest));
    let (pinned, said) = resolved(&config, &by_digest);
    assert_eq!(pinned.unwrap().layers, base.layers);
    assert!(said.iter().filter(|line| line.ends_with("already here")).count() == 2, "{said:?}");
    registry.stop();
    let (offline, said) = resolved(&config, &asked);
    assert_eq!(offline.unwrap().layers, base.layers);
    assert!(said.last().unwrap().contains("using the"), "{said:?}");
}

#[test]
fn what_a_registry_lacks_and_a_registry_that_is_not_there_are_told_apart() {
    let mut registry = Registry::start(Doors::Open);
    let data_dir = tempfile::tempdir().unwrap();
    let config = registry.config(data_dir.path());
    let asked = request(&format!("{}/team/none", registry.host()));
    let message = |config: &TemplateConfig, asked: &ImageRequest| told(&resolved(config, asked).0.unwrap_err());
    assert_eq!(message(&config, &asked), format!("registry {0} has no image {0}/team/none:latest", registry.host()));
    registry.stop();
    let unreachable = message(&config, &asked);
    for part in ["cannot be reached", "team/none:latest", &registry.host(), "template.image_aliases", "template import"] {
        assert!(unreachable.contains(part), "{part}: {unreachable}");
    }
    let without_leave = message(&super::config(data_dir.path()), &asked);
    assert!(!without_leave.contains("has no image"), "plain HTTP was spoken: {without_leave}");
}

#[test]
fn a_locked_registry_opens_to_the_requests_credentials_or_the_login_files() {
    let registry = Registry::start(Doors::Locked);
    registry.push(&[("amd64", &sample())], "team/app:v1", &["--dest-creds", "me:open sesame"]);
    let name = format!("{}/team/app:v1", registry.host());
    let basic = |password: &str| Some(Credentials::Basic { username: "me".into(), password: password.into() });
    let fresh = |credentials: Option<Credentials>, change: &dyn Fn(&mut TemplateConfig)| {
        let data_dir = tempfile::tempdir().unwrap();
        let mut config = registry.config(data_dir.path());
        change(&mut config);
        resolved(&config, &ImageRequest { reference: name.clone(), credentials }).0
    };
    for credentials in [None, basic("wrong")] {
        assert!(matches!(fresh(credentials, &|_| {}), Err(ImageError::Denied { status: 401, .. })));
    }
    assert!(fresh(basic("open sesame"), &|_| {}).is_ok());
    let login = registry.folder.path().join("login.json");
    fs::write(&login, format!(r#"{{"auths":{{"{}":{{"auth":"bWU6b3BlbiBzZXNhbWU="}}}}}}"#, registry.host())).unwrap();
    assert!(fresh(None, &|config| config.images.auth_file = Some(login.clone())).is_ok());
}

#[test]
fn a_mirror_is_asked_first_and_may_fail() {
    let registry = Registry::start(Doors::Open);
    registry.push(&[("amd64", &sample())], "library/app:v1", &[]);
    let data_dir = tempfile::tempdir().unwrap();
    let mut config = registry.config(data_dir.path());
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    config.images.plain_http.push(nobody.to_string());
    let mirrors = vec![format!("http://{nobody}"), format!("http://{}/", registry.host())];
    config.images.mirrors.insert("docker.io".to_owned(), mirrors);
    let (base, said) = resolved(&config, &request("app:v1"));
    assert_is_sample(&config, &base.unwrap_or_else(|error| panic!("{}: {said:?}", told(&error))));
    assert!(said.iter().any(|line| line.contains("does not help")), "{said:?}");
}

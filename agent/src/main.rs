//! `stillbox-agent [--port N]`: reads its control secret from fd 0 and serves. It is made to be pid 1 of a sandbox and
//! works as any other process too, which is how tests run it. What goes wrong before it serves is said on fd 2.

use std::error::Error;
use std::process::ExitCode;

use stillbox_agent::wire::AGENT_PORT;
use stillbox_agent::{pid1, serve};

/// For an image, or a launcher, that sets none.
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stillbox-agent: {error}{}", error.source().map(|cause| format!(": {cause}")).unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let port = parse_port(std::env::args().skip(1))?;
    #[expect(clippy::disallowed_methods, reason = "the agent has no configuration: this is what its processes inherit")]
    let path = std::env::var("PATH").unwrap_or_else(|_| PATH_DEFAULT.to_owned());
    let control_secret = pid1::read_control_secret()?;
    pid1::prepare();
    let listener = serve::listen(port)?;
    pid1::let_go_of_stdio()?;
    Ok(serve::serve(control_secret, path, listener)?)
}

fn parse_port(mut args: impl Iterator<Item = String>) -> Result<u16, String> {
    match (args.next().as_deref(), args.next(), args.next()) {
        (None, ..) => Ok(AGENT_PORT),
        (Some("--port"), Some(port), None) => port.parse().map_err(|_| format!("--port {port} is not a port number")),
        _ => Err("usage: stillbox-agent [--port N] < control-secret".to_owned()),
    }
}

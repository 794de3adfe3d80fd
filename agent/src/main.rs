//! `stillbox-agent`: reads its control secret and serves. See the library for everything else.

use std::io::Read as _;
use std::process::ExitCode;

use stillbox_agent::serve::serve;
use stillbox_agent::wire::AGENT_PORT;

fn main() -> ExitCode {
    let mut secret = String::new();
    drop(std::io::stdin().read_to_string(&mut secret));
    match serve(secret.trim().to_owned(), AGENT_PORT) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

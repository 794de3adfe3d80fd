//! /desktop: this agent drives no desktop. It says so, and which of the programs that one would need are not there.

use std::path::Path;
use std::sync::Arc;

use axum::extract::State;
use serde_json::json;

use super::error::{Code, HopxError};
use crate::state::Agent;

/// HopX's packages, and a program of each.
const NEEDED: [(&str, &str); 5] = [
    ("xvfb", "Xvfb"),
    ("tigervnc-standalone-server", "Xtigervnc"),
    ("xdotool", "xdotool"),
    ("wmctrl", "wmctrl"),
    ("imagemagick", "convert"),
];

/// Whether a folder of `path`, as in PATH, has the program.
pub(super) fn is_there(path: &str, program: &str) -> bool {
    path.split(':').filter(|folder| folder.starts_with('/')).any(|folder| Path::new(folder).join(program).is_file())
}

pub(super) async fn unavailable(State(agent): State<Arc<Agent>>) -> HopxError {
    let identity = agent.identity();
    let missing: Vec<&str> = NEEDED.iter().filter(|(_, program)| !is_there(&identity.path, program)).map(|(package, _)| *package).collect();
    let lack = match missing.as_slice() {
        [] => String::new(),
        missing => format!("; this template also lacks {}", missing.join(", ")),
    };
    HopxError::new(Code::DesktopNotAvailable, format!("desktop automation is not available: this server does not drive desktops{lack}"))
        .with_detail("missing_dependencies", json!(missing))
}

//! Stillbox: sandboxes for untrusted code on one Linux machine.
//!
//! The rooms in reading order; docs/ARCHITECTURE.md is the map and tests/tidy.rs keeps it true.

pub mod model;

pub mod sys;

pub mod hop;

pub mod store;

pub mod runtime;

pub mod sandbox;

pub mod template;

pub mod volume;

pub mod proxy;

pub mod api;

pub mod cli;

pub mod config;

pub mod serve;

pub mod doctor;

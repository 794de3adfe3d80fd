//! The Filesystem service.

//! From a host name or headers to a port inside a sandbox.

//! The proxy as clients see it: a real listener, real connections, and sandboxes that are a table of local servers.

mod lifecycle;
mod passing;
mod tls;
mod world;

use super::is_internal;

#[test]
fn internal_routes_are_recognised_in_every_spelling() {
    for path in ["/init", "//init", "/%69nit", "/./init", "/x/../init", "/INIT", "/init/", "/stillbox/seed", "/fsthaw", "/%2Finit"] {
        assert!(is_internal(path), "{path}");
    }
    for path in ["/", "/health", "/files", "/initial", "/process.Process/Start", "/files/init"] {
        assert!(!is_internal(path), "{path}");
    }
}

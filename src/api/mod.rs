//! The dialects of the control plane.

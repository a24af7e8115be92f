//! The node harness.

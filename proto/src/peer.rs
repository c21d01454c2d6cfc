//! What datacenters say to one another over mutual TLS: the generated code of `sluice/peer/v1/peer.proto`.

#![allow(missing_docs, clippy::all, unreachable_pub)] // Generated; the .proto file is the documentation.

include!("gen/sluice.peer.v1.rs");

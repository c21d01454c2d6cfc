//! The gRPC door for clients: the generated code of `sluice/v1/ingest.proto`, and its description for reflection.

#![allow(missing_docs, clippy::all, unreachable_pub)] // Generated; the .proto file is the documentation.

include!("gen/sluice.v1.rs");

/// The description of the service, as server reflection gives it out.
pub const DESCRIPTION: &[u8] = include_bytes!("gen/sluice.v1.binpb");

//! What the parts of Sluice say to one another.
//!
//! Contract:
//! 1. [`calls`] are the calls between services, as traits: in one process they are made directly, and chunk bytes
//!    are not serialised; between processes and datacenters they travel as gRPC.
//! 2. [`http`] are the JSON bodies of the HTTP door, shared by the edge and the client library.
//! 3. [`problem`] is the one list of reasons for which a request is refused, the same at every door.
//! 4. [`peer`] is the generated code of `peer.proto`: what datacenters say to one another in bulk.
//! 5. [`ingest`] is the generated code of `ingest.proto`, the gRPC door for clients; [`codec`] bounds what is decoded,
//!    [`code`] names what comes of a call.
//! 6. [`trace`] is where in a trace something stands, as it is said with a request.
//! 7. Nothing here decides anything or performs I/O.

pub mod calls;
pub mod code;
pub mod codec;
pub mod gate;
pub mod http;
pub mod ingest;
pub mod peer;
pub mod problem;
pub mod trace;

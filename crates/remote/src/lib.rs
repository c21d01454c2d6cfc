//! The calls between services of one datacenter, from process to process; and what one datacenter's workers pass to
//! another's.
//!
//! Contract:
//! 1. For each trait of [`sluice_proto::calls`], and for the chunk store, there is a pair: what serves it to other processes, and what implements it
//!    by calling such a process. Whoever holds the trait cannot tell the difference, but for the time it takes.
//! 2. Mutual TLS 1.3 always. A process answers the roles that have to ask it, and nobody else ([`Role::answers`]); whoever
//!    acts on a call still verifies its session context itself (G4). The workers of other datacenters may pass on files and
//!    chunks, which then go no further ([`serve_passed`]), and have contexts renewed, as their session services may, and nothing else.
//! 3. A call is one HTTP/1.1 request: arguments and answers are JSON, bytes of files are bodies as they are. A body is asked
//!    for (100) once it is wanted, so that what is refused costs no bytes, and slows down with whoever takes it.
//! 4. A call fails as a [`Refusal`](sluice_proto::problem::Refusal): the other side's own, or `unavailable` when it cannot
//!    be asked. Nothing is tried twice of which the first try may have done something, unless twice is as good as once.
//!    A store's calls fail as its errors, each as it left.
//! 5. Each share of a store that is in another process is one aggregator's at a time ([`Tenures`]), and nothing happens in it,
//!    nor is registered, for one whose time is over.
//! 6. Names are resolved for every connection, none lives longer than a minute or so, idle ones less, and one whose other side has vanished ends within
//!    half a minute: processes may come and go.
//! 7. Everything that comes is bounded, and parsed before it is acted on. Tasks belong to a
//!    [`Shutdown`](sluice_node::shutdown::Shutdown).
//!
//! [`Role::answers`]: sluice_node::role::Role::answers

mod call;
mod caller;
mod door;
mod elsewhere;
mod forms;
mod outgoing;
mod owner;
mod placing;
mod sessions;
mod slots;
mod store;
mod tenants;
mod tenure;
mod workers;

pub use caller::{Caller, CallerConfig};
pub use door::{Answers, Door, DoorError};
pub use elsewhere::{Other, RemoteElsewhere};
pub use owner::Owned;
pub use placing::{RemotePlacing, serve_placing};
pub use sessions::{MovingSessions, RemoteSessions, serve_sessions};
pub use slots::{RemoteSlots, serve_slots};
pub use store::{NoTenure, RemoteKeeper, RemoteStore, serve_keeper, serve_store};
pub use tenants::{RemoteTenants, serve_tenants};
pub use tenure::{Tenure, Tenures};
pub use workers::{RemoteWorkers, serve_leaving, serve_passed, serve_workers};

//! Datacenters apart: each a `sluice dc` process in a network name space of its own, whose links are cut, heal and lose
//! packets, while clients in another name space work; and one whose roles are processes that find each other by name.
//!
//! Needs root, iproute2 and iptables. Where these are not to be had the tests say that they did not run; in CI they fail then.
//! Nothing outside the name spaces that a test makes is ever reached.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod catch_up;
mod names;
mod network;
mod parts;
mod site;
mod weather;

/// Whether datacenters can be put apart here; says so if not.
fn can_be_apart() -> bool {
    match network::obstacle() {
        None => true,
        Some(reason) if std::env::var_os("CI").is_none() => {
            println!("did not run: {reason}");
            false
        }
        Some(reason) => panic!("{reason}"),
    }
}

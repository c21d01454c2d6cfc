//! Whether the certificates of a process are any use to it: asked before it starts, and before it takes others over.

use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use sluice_engine::ids::Timestamp;
use sluice_node::clock::{Clock as _, SystemClock};
use sluice_node::material::{CertificateError, ClusterMaterial};

use crate::failure::Failure;

const RENEW: &str = "`sluice admin key renew` makes certificates anew: copy them to where they are used";

/// Refuses `material`, which is a part of what is in `keys`, if others would refuse one of its certificates now.
pub(crate) fn check(material: &ClusterMaterial, keys: &Path) -> Result<(), Failure> {
    material.check_certificates(keys, SystemClock.now()).map_err(|error| match &error {
        CertificateError::Expired { since, .. } => {
            Failure::usage("certificate-expired", format!("{error}, at {}", shown(*since)), RENEW)
        }
        CertificateError::NotYet { from, .. } => {
            let message = format!("{error}, but from {} on", shown(*from));
            Failure::usage(
                "certificate-not-yet",
                message,
                format!("set the clock of this machine, or {RENEW}"),
            )
        }
        CertificateError::Refused { .. } => Failure::usage("certificate-refused", error.to_string(), RENEW),
    })
}

/// A moment, for people. Certificates name none that is beyond the calendar.
fn shown(moment: Timestamp) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(moment.number())).to_string()
}

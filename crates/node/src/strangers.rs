//! Who is turned away at the doors inside a cluster, in the log.
//!
//! Whoever calls there shows a certificate of the cluster. One that does not count is a mistake or an attack, so each reason
//! is said, but [seldom](Seldom). A door owns its [`Strangers`]; nothing has to be stopped. Whoever calls tells the same of the
//! door by what it [reads](is_about_certificates).

use std::fmt;
use std::io;
use std::net::SocketAddr;

use rustls::{AlertDescription, Error};

use crate::seldom::Seldom;

/// An error with all that caused it, in words.
pub fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let next = cause.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        source = cause.source();
    }
    text
}

/// Whether somebody who was called did not show, or did not take, a certificate: said in words, since libraries in between
/// hand on nothing else. That does not pass by itself.
pub fn is_about_certificates(description: &str) -> bool {
    let description = description.to_ascii_lowercase();
    ["certificate", "unknownca", "decrypterror"].iter().any(|word| description.contains(word))
}

/// Who was turned away at one door.
#[derive(Debug)]
pub struct Strangers {
    door: &'static str,
    /// By the reason, of which there are as many as the code has.
    seen: Seldom<&'static str>,
}

impl Strangers {
    /// Nobody yet, at the door of this name.
    pub fn at(door: &'static str) -> Self {
        Self { door, seen: Seldom::default() }
    }

    /// A handshake failed. Certificates that do not count are worth a warning, on either side; whoever looked in and went
    /// away, or speaks something else, is none of ours.
    pub fn failed(&self, from: Option<SocketAddr>, error: &io::Error) {
        let why = match error.get_ref().and_then(|cause| cause.downcast_ref::<Error>()) {
            Some(Error::InvalidCertificate(_)) => "a caller shows a certificate that does not count",
            Some(Error::NoCertificatesPresented) => "a caller shows no certificate",
            Some(Error::AlertReceived(
                AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnknownCA
                | AlertDescription::DecryptError,
            )) => "a caller does not take the certificate of this door",
            Some(_) | None => {
                tracing::debug!(door = self.door, %error, "a caller's handshake failed");
                return;
            }
        };
        self.turned_away(why, from, error);
    }

    /// Somebody was turned away, for a reason that has few names, and with what else there is to say.
    pub fn turned_away(&self, why: &'static str, from: Option<SocketAddr>, error: &dyn fmt::Display) {
        if let Some(times) = self.seen.met(why) {
            let from = from.map(tracing::field::display);
            tracing::warn!(door = self.door, from, %error, times, "{why}");
        }
    }
}

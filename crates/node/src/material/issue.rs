//! Makes material: a CA of its own and everything that it signs, and what takes their place.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData as _,
};
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sluice_engine::ids::{DcId, KeyId, Timestamp};
use sluice_engine::share::Shares;
use webpki::EndEntityCert;

use super::keys::{Ca, DcKeys, KeyKind, KeySet, Keys, Pair, PrivateKey, SigningMaterial, Stage, TokenKey};
use super::{ClusterMaterial, DcMaterial, Identity, MaterialError, peer_tls_name, role_tls_name};
use crate::clock::random_bytes;
use crate::role::Role;
use crate::token::TokenMint;

/// Certificates are good from an hour ago, for clocks that are behind …
const BACKDATED: Duration = Duration::from_secs(3600);

/// … to in ten years: development clusters are thrown away, not renewed.
const LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);

fn failed(what: &'static str) -> impl Fn(rcgen::Error) -> MaterialError {
    move |error| MaterialError::Issue { what, reason: error.to_string() }
}

pub(super) fn generate(
    name: &str,
    dcs: &[(DcId, &str)],
    now: Timestamp,
) -> Result<ClusterMaterial, MaterialError> {
    let (ca, mut ids) = (new_ca(name, now)?, Vec::new());
    let mut signing = BTreeMap::new();
    for (dc, _) in dcs {
        let (commands, contexts) = (new_signing(&mut ids)?, new_signing(&mut ids)?);
        signing.insert(*dc, DcKeys { commands: Pair::new(commands), contexts: Pair::new(contexts) });
    }
    let set = KeySet {
        revision: 0,
        stages: BTreeMap::new(),
        dcs: signing,
        tokens: Pair::new(new_token_key(name)?),
        tickets: Some(Pair::new(random_bytes())),
        ca: Pair::new(ca),
    };
    let unsigned =
        |dc_name: &str| DcMaterial { name: dc_name.to_owned(), peer: None, roles: BTreeMap::new() };
    let material = ClusterMaterial {
        name: name.to_owned(),
        shares: Shares::ONE,
        dcs: dcs.iter().map(|(dc, dc_name)| (*dc, unsigned(dc_name))).collect(),
        edge: None,
        keys: Arc::new(ArcSwap::from_pointee(Keys::new(name, set)?)),
        changes: Arc::default(),
    };
    reissue(&material, now)
}

/// The same with certificates that are new at `now`, of the CA that issues.
pub(super) fn reissue(material: &ClusterMaterial, now: Timestamp) -> Result<ClusterMaterial, MaterialError> {
    let keys = material.keys.load();
    let ca_key = keys.set.ca.current.key.as_ref().ok_or_else(|| MaterialError::Absent("the CA".into()))?;
    let ca_key = KeyPair::try_from(&ca_key.0[..]).map_err(failed("the CA's key"))?;
    // Who issues is known by its name and key; what else is in the certificate of the CA is not copied.
    let params = ca_parameters(&material.name, now)?;
    let issuer = Issuer::from_params(&params, &ca_key);
    let mut reissued =
        ClusterMaterial { edge: Some(issue_edge(&issuer, &material.name, now)?), ..material.clone() };
    for (dc, part) in &mut reissued.dcs {
        let (peer, roles) = issue_dc(&issuer, &material.name, *dc, now)?;
        (part.peer, part.roles) = (Some(peer), roles);
    }
    Ok(reissued)
}

/// The same one step on in the rotations of these kinds of keys.
pub(super) fn rotate(
    material: &ClusterMaterial,
    kinds: &[KeyKind],
    now: Timestamp,
) -> Result<ClusterMaterial, MaterialError> {
    let mut kinds = kinds.to_vec();
    kinds.sort_unstable();
    kinds.dedup();
    let name = &material.name;
    let rotated = material.clone().try_with_keys(|keys| {
        let of_dcs =
            |keys: &DcKeys| keys.commands.all().chain(keys.contexts.all()).map(|key| key.id).collect();
        let mut ids: Vec<KeyId> = keys.dcs.values().flat_map(|keys| -> Vec<KeyId> { of_dcs(keys) }).collect();
        for kind in &kinds {
            keys.check_step(*kind)?;
            let stage = keys.stages.get(kind).copied();
            match kind {
                KeyKind::Commands | KeyKind::Contexts => {
                    for own in keys.dcs.values_mut() {
                        let pair =
                            if *kind == KeyKind::Commands { &mut own.commands } else { &mut own.contexts };
                        pair.step(stage, || new_signing(&mut ids))?;
                    }
                }
                KeyKind::Tokens => keys.tokens.step(stage, || new_token_key(name))?,
                KeyKind::Tickets => {
                    let tickets = keys.tickets.as_mut();
                    let tickets = tickets.ok_or_else(|| MaterialError::Absent("the TLS tickets".into()))?;
                    tickets.step(stage, || Ok::<_, MaterialError>(random_bytes()))?;
                }
                KeyKind::Ca => keys.ca.step(stage, || new_ca(name, now))?,
            }
            match stage {
                None => keys.stages.insert(*kind, Stage::Next),
                Some(Stage::Next) => keys.stages.insert(*kind, Stage::Previous),
                Some(Stage::Previous) => keys.stages.remove(kind),
            };
        }
        keys.revision += 1;
        Ok(())
    })?;
    // From when a CA issues, all that is shown is its.
    let issues_anew = rotated.stage(KeyKind::Ca) == Some(Stage::Previous) && kinds.contains(&KeyKind::Ca);
    if issues_anew { reissue(&rotated, now) } else { Ok(rotated) }
}

fn new_ca(name: &str, now: Timestamp) -> Result<Ca, MaterialError> {
    let key = KeyPair::generate().map_err(failed("the CA's key"))?;
    let certificate = ca_parameters(name, now)?.self_signed(&key).map_err(failed("the CA"))?.der().clone();
    Ok(Ca { certificate, key: Some(PrivateKey(key.serialize_der())) })
}

/// Whether a key, in PKCS#8, is that of a certificate.
pub(super) fn is_key_of(pkcs8: &[u8], certificate: &CertificateDer<'_>) -> bool {
    let certificate = EndEntityCert::try_from(certificate);
    KeyPair::try_from(pkcs8).ok().zip(certificate.ok()).is_some_and(|(key, certificate)| {
        key.subject_public_key_info() == certificate.subject_public_key_info().as_ref()
    })
}

fn new_token_key(name: &str) -> Result<TokenKey, MaterialError> {
    let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
        .map_err(|_| MaterialError::Issue { what: "the token key", reason: "no randomness".into() })?;
    let mint = TokenMint::new(name, pkcs8.as_ref())
        .map_err(|error| MaterialError::Issue { what: "the token key", reason: error.to_string() })?;
    Ok(TokenKey { public: mint.public(), secret: Some(PrivateKey(pkcs8.as_ref().to_vec())) })
}

fn ca_parameters(name: &str, now: Timestamp) -> Result<CertificateParams, MaterialError> {
    let mut params = parameters(&[], &format!("Sluice CA of {name}"), now)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn issue_edge(issuer: &Issuer<'_, &KeyPair>, name: &str, now: Timestamp) -> Result<Identity, MaterialError> {
    // Below the one name each datacenter can have one of its own, so that clients can tell them apart.
    let names = [
        format!("edge.{name}.sluice"),
        format!("*.edge.{name}.sluice"),
        "localhost".into(),
        "127.0.0.1".into(),
        "::1".into(),
    ];
    issue(issuer, &names, &[ExtendedKeyUsagePurpose::ServerAuth], now)
}

/// A datacenter's certificates: towards its peers, and of each of its roles.
fn issue_dc(
    issuer: &Issuer<'_, &KeyPair>,
    name: &str,
    dc: DcId,
    now: Timestamp,
) -> Result<(Identity, BTreeMap<Role, Identity>), MaterialError> {
    let usages = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let peer = issue(issuer, &[peer_tls_name(name, dc)], &usages, now)?;
    let role = |role| Ok((role, issue(issuer, &[role_tls_name(name, dc, role)], &usages, now)?));
    Ok((peer, Role::ALL.into_iter().map(role).collect::<Result<_, MaterialError>>()?))
}

fn parameters(
    names: &[String],
    common_name: &str,
    now: Timestamp,
) -> Result<CertificateParams, MaterialError> {
    let mut params = CertificateParams::new(names).map_err(failed("a certificate"))?;
    let now: SystemTime = UNIX_EPOCH + Duration::from_millis(now.number());
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + LIFETIME).into();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    Ok(params)
}

fn issue(
    issuer: &Issuer<'_, &KeyPair>,
    names: &[String],
    usages: &[ExtendedKeyUsagePurpose],
    now: Timestamp,
) -> Result<Identity, MaterialError> {
    let key = KeyPair::generate().map_err(failed("a certificate's key"))?;
    let common_name = names.first().map_or("", String::as_str);
    let mut params = parameters(names, common_name, now)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = usages.to_vec();
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, issuer).map_err(failed("a certificate"))?;
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    Identity::new(vec![certificate.der().clone()], key)
        .map_err(|error| MaterialError::Issue { what: "a certificate", reason: error.to_string() })
}

/// A new Ed25519 key. Its id is drawn at random, so that no id is ever used twice without anybody counting.
fn new_signing(ids: &mut Vec<KeyId>) -> Result<SigningMaterial, MaterialError> {
    let seed: [u8; 32] = random_bytes();
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed)
        .map_err(|error| MaterialError::Issue { what: "a signing key", reason: error.to_string() })?;
    let mut public = [0; 32];
    public.copy_from_slice(pair.public_key().as_ref());
    let id = loop {
        let id = KeyId::new(u32::from_be_bytes(random_bytes()));
        if id != KeyId::default() && !ids.contains(&id) {
            break id;
        }
    };
    ids.push(id);
    Ok(SigningMaterial { id, public, seed: Some(seed) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Clock as _, SystemClock};

    #[test]
    fn a_renewal_takes_only_what_everyone_accepts() {
        use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
        let (me, now) = (DcId::new(1), SystemClock.now());
        let material = generate("test", &[(me, "dc-a")], now).unwrap();
        let ca_key = material.keys.load().set.ca.current.key.clone().unwrap();
        let ca_key = KeyPair::try_from(&ca_key.0[..]).unwrap();
        let params = ca_parameters("test", now).unwrap();
        let issuer = Issuer::from_params(&params, &ca_key);
        let renew = |names: &[&str], usages: &[ExtendedKeyUsagePurpose]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let mut fresh = material.clone();
            fresh.dcs.get_mut(&me).unwrap().peer = Some(issue(&issuer, &names, usages, now).unwrap());
            material.renew(&fresh, now)
        };
        let name = "dc-1.peer.test.sluice";
        for (names, usages) in [
            (&["dc-2.peer.test.sluice"][..], &[ServerAuth, ClientAuth][..]),
            (&[name, "dc-2.peer.test.sluice"], &[ServerAuth, ClientAuth]),
            (&[name], &[ServerAuth]),
            (&[name], &[ClientAuth]),
        ] {
            let refused = renew(names, usages).unwrap_err();
            assert!(matches!(&refused, MaterialError::Renewal { whose, .. } if whose == name), "{refused}");
        }
        assert_eq!(renew(&[name], &[ServerAuth, ClientAuth]).unwrap(), 1);

        // Keys of another CA under this one's certificate.
        let other = generate("test", &[(me, "dc-a")], now).unwrap();
        let foreign = other.keys.load().set.ca.current.key.clone();
        let mixed = material.clone().with_keys(|keys| keys.ca.current.key = foreign).unwrap();
        assert!(matches!(mixed.reissued(), Err(MaterialError::Renewal { .. })));
        assert_eq!(other.reissued().unwrap().renew(&other, now).unwrap(), 2 + Role::ALL.len());
    }
}

//! Makes material for development: a CA of its own, and everything that it signs.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustls::pki_types::PrivateKeyDer;
use sluice_engine::ids::{DcId, KeyId};
use sluice_engine::share::Shares;

use super::{
    ClusterMaterial, DcMaterial, Identity, MaterialError, PrivateKey, SigningMaterial, peer_tls_name,
    role_tls_name,
};
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

pub(super) fn generate(name: &str, dcs: &[(DcId, &str)]) -> Result<ClusterMaterial, MaterialError> {
    let ca_key = KeyPair::generate().map_err(failed("the CA's key"))?;
    let params = ca_parameters(name)?;
    let ca = params.self_signed(&ca_key).map_err(failed("the CA"))?.der().clone();
    let issuer = Issuer::from_params(&params, &ca_key);

    let edge = issue_edge(&issuer, name)?;
    let mut ids = Vec::new();
    let mut materials = BTreeMap::new();
    for (dc, dc_name) in dcs {
        let (peer, roles) = issue_dc(&issuer, name, *dc)?;
        let command = signing(&mut ids)?;
        let context = signing(&mut ids)?;
        let material = DcMaterial { name: (*dc_name).to_owned(), command, context, peer: Some(peer), roles };
        materials.insert(*dc, material);
    }

    let token_key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
        .map_err(|_| MaterialError::Issue { what: "the token key", reason: "no randomness".into() })?;
    let mint = TokenMint::new(name, token_key.as_ref())
        .map_err(|error| MaterialError::Issue { what: "the token key", reason: error.to_string() })?;
    Ok(ClusterMaterial {
        name: name.to_owned(),
        shares: Shares::ONE,
        dcs: materials,
        ca,
        ca_key: Some(PrivateKey(ca_key.serialize_der())),
        edge: Some(edge),
        token_public: mint.public(),
        token_key: Some(PrivateKey(token_key.as_ref().to_vec())),
        ticket_secret: Some(random_bytes()),
    })
}

/// The same with new certificates, of the same CA.
pub(super) fn reissue(material: &ClusterMaterial) -> Result<ClusterMaterial, MaterialError> {
    let ca_key = material.ca_key.as_ref().ok_or_else(|| MaterialError::Absent("the CA".into()))?;
    let ca_key = KeyPair::try_from(&ca_key.0[..]).map_err(failed("the CA's key"))?;
    // Who issues is known by its name and key; what else is in the certificate of the CA is not copied.
    let params = ca_parameters(&material.name)?;
    let issuer = Issuer::from_params(&params, &ca_key);
    let mut reissued =
        ClusterMaterial { edge: Some(issue_edge(&issuer, &material.name)?), ..material.clone() };
    for (dc, part) in &mut reissued.dcs {
        let (peer, roles) = issue_dc(&issuer, &material.name, *dc)?;
        (part.peer, part.roles) = (Some(peer), roles);
    }
    Ok(reissued)
}

fn ca_parameters(name: &str) -> Result<CertificateParams, MaterialError> {
    let mut params = parameters(&[], &format!("Sluice CA of {name}"))?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn issue_edge(issuer: &Issuer<'_, &KeyPair>, name: &str) -> Result<Identity, MaterialError> {
    // Below the one name each datacenter can have one of its own, so that clients can tell them apart.
    let names = [
        format!("edge.{name}.sluice"),
        format!("*.edge.{name}.sluice"),
        "localhost".into(),
        "127.0.0.1".into(),
        "::1".into(),
    ];
    issue(issuer, &names, &[ExtendedKeyUsagePurpose::ServerAuth])
}

/// A datacenter's certificates: towards its peers, and of each of its roles.
fn issue_dc(
    issuer: &Issuer<'_, &KeyPair>,
    name: &str,
    dc: DcId,
) -> Result<(Identity, BTreeMap<Role, Identity>), MaterialError> {
    let usages = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let peer = issue(issuer, &[peer_tls_name(name, dc)], &usages)?;
    let role = |role| Ok((role, issue(issuer, &[role_tls_name(name, dc, role)], &usages)?));
    Ok((peer, Role::ALL.into_iter().map(role).collect::<Result<_, MaterialError>>()?))
}

fn parameters(names: &[String], common_name: &str) -> Result<CertificateParams, MaterialError> {
    let mut params = CertificateParams::new(names).map_err(failed("a certificate"))?;
    let now = SystemTime::now();
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
) -> Result<Identity, MaterialError> {
    let key = KeyPair::generate().map_err(failed("a certificate's key"))?;
    let common_name = names.first().map_or("", String::as_str);
    let mut params = parameters(names, common_name)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = usages.to_vec();
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, issuer).map_err(failed("a certificate"))?;
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    Identity::new(vec![certificate.der().clone()], key)
        .map_err(|error| MaterialError::Issue { what: "a certificate", reason: error.to_string() })
}

/// A new Ed25519 key. Its id is drawn at random, so that no id is ever used twice without anybody counting.
fn signing(ids: &mut Vec<KeyId>) -> Result<SigningMaterial, MaterialError> {
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
        let me = DcId::new(1);
        let material = generate("test", &[(me, "dc-a")]).unwrap();
        let ca_key = KeyPair::try_from(&material.ca_key.as_ref().unwrap().0[..]).unwrap();
        let params = ca_parameters("test").unwrap();
        let issuer = Issuer::from_params(&params, &ca_key);
        let renew = |names: &[&str], usages: &[ExtendedKeyUsagePurpose]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let mut fresh = material.clone();
            fresh.dcs.get_mut(&me).unwrap().peer = Some(issue(&issuer, &names, usages).unwrap());
            material.renew(&fresh, SystemClock.now())
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
        let other = generate("test", &[(me, "dc-a")]).unwrap();
        let mixed = ClusterMaterial { ca_key: other.ca_key.clone(), ..material.clone() };
        assert!(matches!(mixed.reissued(), Err(MaterialError::Renewal { .. })));
        assert_eq!(other.reissued().unwrap().renew(&other, SystemClock.now()).unwrap(), 2 + Role::ALL.len());
    }
}

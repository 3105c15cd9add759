//! Keys that the operator makes once if nobody else has: the certificate of the node link and the key that signs
//! callers' tokens. Objects are created, never overwritten, so that two replicas that start together end with the same
//! ones: whoever comes second reads what the first wrote.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use sha2::{Digest as _, Sha256};

use crate::kubeapi::{ApiError, KubeApi};

/// Secret with the certificate and key of the node link.
pub const NODELINK_SECRET: &str = "spaceport-nodelink-tls";
/// ConfigMap with the certificate authority by which agents know the operator, key `ca.crt`.
pub const NODELINK_CA_CONFIG_MAP: &str = "spaceport-nodelink-ca";
/// Secret with the key that signs callers' tokens: `private.pem` (Ed25519, PKCS#8) and `kid`.
pub const TOKEN_KEY_SECRET: &str = "spaceport-token-signing-key";
/// ConfigMap with the public keys of callers' tokens, one PEM a key id.
pub const TOKEN_KEYS_CONFIG_MAP: &str = "spaceport-token-keys";

/// Annotation on the Secret: when its certificate ends.
const NOT_AFTER_ANNOTATION: &str = "spaceport.dev/not-after";
/// How long a certificate is valid, years. The authority's key is thrown away after use, so a long time costs nothing
/// but the certificate's own key, which lies in the same Secret.
const VALID_YEARS: i16 = 10;
/// A certificate with less than this left is made anew at the next start.
const RENEW_BELOW: Duration = Duration::from_secs(365 * 24 * 3600);
/// Tries to agree with another replica that makes the same object; each round one of them has succeeded.
const ROUNDS_MAX: usize = 5;

/// Why there are no credentials.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The API server did not do its part.
    #[error("cannot read or write credentials")]
    Api(#[source] ApiError),
    /// A key or certificate could not be made.
    #[error("cannot make a {what}")]
    Make {
        /// What it was to be.
        what: &'static str,
        /// What failed.
        #[source]
        source: rcgen::Error,
    },
    /// An object exists, but is not what we wrote.
    #[error("{kind} {name} has no usable {key}; delete it and it will be made again")]
    Malformed {
        /// Kind of the object.
        kind: &'static str,
        /// Its name.
        name: &'static str,
        /// The key that is missing or wrong.
        key: &'static str,
    },
    /// Other writers were always faster.
    #[error("gave up on {name}: it changed {ROUNDS_MAX} times while it was looked at")]
    Unsettled {
        /// The object.
        name: &'static str,
    },
}

/// Certificate and key of the node link, PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct ServerCertificate {
    /// The server's certificate.
    pub certificate: String,
    /// Its private key. Not in Debug output.
    pub key: String,
    /// The authority that signed it.
    pub authority: String,
}

impl std::fmt::Debug for ServerCertificate {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ServerCertificate").finish_non_exhaustive()
    }
}

/// A key pair that signs tokens.
struct SigningKey {
    kid: String,
    private_pem: String,
    public_pem: String,
}

/// The node link's certificate: read, or made if there is none or it ends within a year. The authority is published in
/// a ConfigMap for the agents.
///
/// # Errors
/// See [`CredentialsError`].
pub async fn node_link_certificate(
    api: &KubeApi,
    namespace: &str,
    dns_names: &[String],
    now: Timestamp,
) -> Result<ServerCertificate, CredentialsError> {
    let secrets = api.namespace::<Secret>(namespace);
    for _ in 0..ROUNDS_MAX {
        let found = secrets.get(NODELINK_SECRET).await.map_err(CredentialsError::Api)?;
        if let Some(secret) = &found
            && !ends_soon(secret, now)
        {
            let certificate = certificate_of(secret)?;
            publish_authority(api, namespace, &certificate.authority).await?;
            return Ok(certificate);
        }
        let (made, not_after) = make_certificate(dns_names, now)?;
        let version = found.and_then(|secret| secret.metadata.resource_version);
        let secret = certificate_secret(namespace, &made, not_after, version.clone());
        let written = match version {
            Some(_) => secrets.replace(&secret, Duration::from_secs(10)).await,
            None => secrets.create(&secret).await,
        };
        match written {
            Ok(_) => tracing::info!(secret = NODELINK_SECRET, %not_after, "Made the certificate of the node link"),
            // Another replica was faster: its certificate is read in the next round.
            Err(ApiError::Exists { .. } | ApiError::Conflict { .. }) => {}
            Err(error) => return Err(CredentialsError::Api(error)),
        }
    }
    Err(CredentialsError::Unsettled { name: NODELINK_SECRET })
}

fn ends_soon(secret: &Secret, now: Timestamp) -> bool {
    let annotations = secret.metadata.annotations.as_ref();
    let not_after =
        annotations.and_then(|annotations| annotations.get(NOT_AFTER_ANNOTATION)?.parse::<Timestamp>().ok());
    // A Secret without our annotation was put there by an admin, who also cares for its end.
    not_after.is_some_and(|not_after| {
        not_after.duration_since(now) < jiff::SignedDuration::try_from(RENEW_BELOW).unwrap_or_default()
    })
}

fn certificate_of(secret: &Secret) -> Result<ServerCertificate, CredentialsError> {
    Ok(ServerCertificate {
        certificate: text_of(secret, NODELINK_SECRET, "tls.crt")?,
        key: text_of(secret, NODELINK_SECRET, "tls.key")?,
        authority: text_of(secret, NODELINK_SECRET, "ca.crt")?,
    })
}

fn text_of(secret: &Secret, name: &'static str, key: &'static str) -> Result<String, CredentialsError> {
    let value = secret.data.as_ref().and_then(|data| data.get(key));
    value
        .and_then(|value| String::from_utf8(value.0.clone()).ok())
        .filter(|text| !text.is_empty())
        .ok_or(CredentialsError::Malformed { kind: "Secret", name, key })
}

fn certificate_secret(
    namespace: &str,
    made: &ServerCertificate,
    not_after: Timestamp,
    resource_version: Option<String>,
) -> Secret {
    let text = |text: &str| ByteString(text.as_bytes().to_vec());
    Secret {
        metadata: ObjectMeta {
            name: Some(NODELINK_SECRET.to_owned()),
            namespace: Some(namespace.to_owned()),
            resource_version,
            annotations: Some(BTreeMap::from([(NOT_AFTER_ANNOTATION.to_owned(), not_after.to_string())])),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".to_owned()),
        data: Some(BTreeMap::from([
            ("tls.crt".to_owned(), text(&made.certificate)),
            ("tls.key".to_owned(), text(&made.key)),
            ("ca.crt".to_owned(), text(&made.authority)),
        ])),
        ..Secret::default()
    }
}

/// An authority, and a server certificate signed by it. The authority's key is dropped at the end: it can sign nothing
/// else.
fn make_certificate(dns_names: &[String], now: Timestamp) -> Result<(ServerCertificate, Timestamp), CredentialsError> {
    let failed = |what| move |source| CredentialsError::Make { what, source };
    let today = now.to_zoned(jiff::tz::TimeZone::UTC).date();
    let day = |year: i16, day: i8| {
        date_time_ymd(i32::from(year), u8::try_from(today.month()).unwrap_or(1), u8::try_from(day).unwrap_or(1))
    };
    // The first of this month, and ten years later: whole days that exist in every year.
    let (begin, end) = (day(today.year(), 1), day(today.year() + VALID_YEARS, 1));

    let authority_key = KeyPair::generate().map_err(failed("key of the authority"))?;
    let mut authority = CertificateParams::new(Vec::new()).map_err(failed("certificate of the authority"))?;
    authority.distinguished_name.push(DnType::CommonName, "spaceport node link");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (authority.not_before, authority.not_after) = (begin, end);
    let authority_pem = authority.self_signed(&authority_key).map_err(failed("certificate of the authority"))?.pem();

    let key = KeyPair::generate().map_err(failed("key of the node link"))?;
    let mut server = CertificateParams::new(dns_names.to_vec()).map_err(failed("certificate of the node link"))?;
    server.distinguished_name.push(DnType::CommonName, "spaceport-operator");
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    server.use_authority_key_identifier_extension = true;
    (server.not_before, server.not_after) = (begin, end);
    let issuer = Issuer::new(authority, authority_key);
    let certificate = server.signed_by(&key, &issuer).map_err(failed("certificate of the node link"))?.pem();

    let not_after = Timestamp::from_second(end.unix_timestamp()).unwrap_or(now);
    Ok((ServerCertificate { certificate, key: key.serialize_pem(), authority: authority_pem }, not_after))
}

async fn publish_authority(api: &KubeApi, namespace: &str, authority: &str) -> Result<(), CredentialsError> {
    let maps = api.namespace::<ConfigMap>(namespace);
    let data = BTreeMap::from([("ca.crt".to_owned(), authority.to_owned())]);
    let found = maps.get(NODELINK_CA_CONFIG_MAP).await.map_err(CredentialsError::Api)?;
    if found.is_some_and(|map| map.data.as_ref() == Some(&data)) {
        return Ok(());
    }
    maps.apply(&config_map(namespace, NODELINK_CA_CONFIG_MAP, data)).await.map_err(CredentialsError::Api)?;
    Ok(())
}

fn config_map(namespace: &str, name: &str, data: BTreeMap<String, String>) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        data: Some(data),
        ..ConfigMap::default()
    }
}

/// Makes the key that signs callers' tokens, if there is none, and publishes its public half under its key id.
///
/// # Errors
/// See [`CredentialsError`].
pub async fn ensure_token_key(api: &KubeApi, namespace: &str) -> Result<(), CredentialsError> {
    let secrets = api.namespace::<Secret>(namespace);
    for _ in 0..ROUNDS_MAX {
        if let Some(secret) = secrets.get(TOKEN_KEY_SECRET).await.map_err(CredentialsError::Api)? {
            return publish_token_key(api, namespace, &secret).await;
        }
        let key = make_signing_key(rand::random())?;
        let text = |text: &str| ByteString(text.as_bytes().to_vec());
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(TOKEN_KEY_SECRET.to_owned()),
                namespace: Some(namespace.to_owned()),
                ..ObjectMeta::default()
            },
            type_: Some("Opaque".to_owned()),
            data: Some(BTreeMap::from([
                ("private.pem".to_owned(), text(&key.private_pem)),
                ("public.pem".to_owned(), text(&key.public_pem)),
                ("kid".to_owned(), text(&key.kid)),
            ])),
            ..Secret::default()
        };
        match secrets.create(&secret).await {
            Ok(_) => {
                tracing::info!(secret = TOKEN_KEY_SECRET, kid = key.kid, "Made the key that signs callers' tokens")
            }
            Err(ApiError::Exists { .. }) => {}
            Err(error) => return Err(CredentialsError::Api(error)),
        }
    }
    Err(CredentialsError::Unsettled { name: TOKEN_KEY_SECRET })
}

/// Adds the public key to the ConfigMap; keys that others put there stay.
async fn publish_token_key(api: &KubeApi, namespace: &str, secret: &Secret) -> Result<(), CredentialsError> {
    let kid = text_of(secret, TOKEN_KEY_SECRET, "kid")?;
    let public_pem = text_of(secret, TOKEN_KEY_SECRET, "public.pem")?;
    let maps = api.namespace::<ConfigMap>(namespace);
    let found = maps.get(TOKEN_KEYS_CONFIG_MAP).await.map_err(CredentialsError::Api)?;
    if found.and_then(|map| map.data).is_some_and(|data| data.get(&kid) == Some(&public_pem)) {
        return Ok(());
    }
    let data = BTreeMap::from([(kid, public_pem)]);
    maps.apply(&config_map(namespace, TOKEN_KEYS_CONFIG_MAP, data)).await.map_err(CredentialsError::Api)?;
    Ok(())
}

/// An Ed25519 key from 32 random bytes. PKCS#8 version 1 (the seed alone), which every library reads; ring's own
/// generator writes version 2, which older OpenSSL does not.
fn make_signing_key(seed: [u8; 32]) -> Result<SigningKey, CredentialsError> {
    /// RFC 8410: SEQUENCE { version 0, algorithm 1.3.101.112, OCTET STRING { OCTET STRING (32) } }.
    const PKCS8_HEAD: [u8; 16] =
        [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
    let der: Vec<u8> = PKCS8_HEAD.iter().chain(&seed).copied().collect();
    let pair = KeyPair::try_from(der.as_slice())
        .map_err(|source| CredentialsError::Make { what: "key that signs callers' tokens", source })?;
    // 48 bytes of DER are 64 characters of base64: one line.
    let private_pem = format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", STANDARD.encode(&der));
    let digest = Sha256::digest(pair.public_key_raw());
    let kid = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    Ok(SigningKey { kid, private_pem, public_pem: pair.public_key_pem() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signing_key_signs_what_its_public_half_accepts() {
        use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
        let key = make_signing_key([7; 32]).unwrap();
        assert_eq!(key.kid.len(), 16);
        let claims = serde_json::json!({"sub": "bob", "exp": 4_000_000_000_u64});
        let private = EncodingKey::from_ed_pem(key.private_pem.as_bytes()).unwrap();
        let token = encode(&Header::new(Algorithm::EdDSA), &claims, &private).unwrap();
        let public = DecodingKey::from_ed_pem(key.public_pem.as_bytes()).unwrap();
        assert!(decode::<serde_json::Value>(&token, &public, &Validation::new(Algorithm::EdDSA)).is_ok());
        let other = make_signing_key([8; 32]).unwrap();
        let public = DecodingKey::from_ed_pem(other.public_pem.as_bytes()).unwrap();
        assert!(decode::<serde_json::Value>(&token, &public, &Validation::new(Algorithm::EdDSA)).is_err());
    }

    #[test]
    fn certificate_ends_in_ten_years_and_is_kept_until_the_last() {
        let now: Timestamp = "2026-11-21T12:00:00Z".parse().unwrap();
        let (made, not_after) = make_certificate(&["spaceport-operator".to_owned()], now).unwrap();
        assert_eq!(not_after.to_string(), "2036-11-01T00:00:00Z");
        let secret = certificate_secret("ns", &made, not_after, None);
        assert_eq!(certificate_of(&secret).unwrap(), made);
        assert!(!ends_soon(&secret, "2035-10-31T00:00:00Z".parse().unwrap()));
        assert!(ends_soon(&secret, "2035-11-03T00:00:00Z".parse().unwrap()));
        assert!(!format!("{made:?}").contains("KEY"), "keys stay out of logs");
    }
}

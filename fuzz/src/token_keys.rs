//! The public keys of callers' tokens as they stand in their ConfigMap: a key id, and under it a PEM.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use jsonwebtoken::DecodingKey;
use serde_json::json;
use spaceport_core::protocol::UnauthenticatedReason;
use spaceport_operator::identity::{Caller, KeySet, TokenVerifier};
use tokio::sync::watch;

use crate::Verdict;
use crate::token::{ISSUER, KEY_ID, NOW, PUBLIC_KEY, SPACE, signed};

/// Longest key of a ConfigMap, characters.
const KEY_ID_MAX: usize = 253;
/// Bytes of an Ed25519 public key.
const KEY_LENGTH: usize = 32;
/// What stands before them in a DER (RFC 8410).
const DER_HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// A line with the key id, and behind it a PEM, or a DER alone, which gets the frame of a PEM.
///
/// # Panics
/// If a key is neither used nor reported, or what is used is no Ed25519 public key, does not survive being written again,
/// accepts a signature that is not its own, or refuses one that is; or if it changes anything for the key beside it.
pub fn check(bytes: &[u8]) -> Verdict {
    let Some(line) = bytes.iter().position(|byte| *byte == b'\n') else { return Verdict::Refused };
    // A ConfigMap's data is text.
    let key_id: String = String::from_utf8_lossy(&bytes[..line]).chars().take(KEY_ID_MAX).collect();
    let value = &bytes[line + 1..];
    let found = [String::from_utf8_lossy(value).into_owned(), framed(value)].map(|pem| judged(&key_id, &pem));
    if found.contains(&Verdict::Taken) { Verdict::Taken } else { Verdict::Refused }
}

fn judged(key_id: &str, pem: &str) -> Verdict {
    let beside = if key_id == KEY_ID { "k2" } else { KEY_ID };
    let (set, errors) = KeySet::parse(&data(&[(beside, PUBLIC_KEY), (key_id, pem)]));
    let verifier = verifier(set);
    let own = verify(&verifier, beside);
    assert!(own.is_ok(), "the key beside it is good whatever this one is: {own:?}");
    let found = verify(&verifier, key_id);
    match errors.as_slice() {
        [] => {
            assert_ne!(found, Err(UnauthenticatedReason::UnknownKey), "neither used nor reported");
            taken(pem, found);
            Verdict::Taken
        }
        [error] => {
            assert_eq!(found, Err(UnauthenticatedReason::UnknownKey), "used and reported");
            assert!(error.to_string().contains(key_id), "{error} does not name {key_id:?}");
            Verdict::Refused
        }
        more => panic!("{more:?} of one key"),
    }
}

/// `found` is what a token is worth that is signed with our key and names this one.
fn taken(pem: &str, found: Result<Caller, UnauthenticatedReason>) {
    let key = public_key(pem);
    assert_eq!(key.len(), KEY_LENGTH, "this is no Ed25519 public key: {pem}");
    let again = framed(&[DER_HEAD.as_slice(), &key].concat());
    let (set, errors) = KeySet::parse(&data(&[(KEY_ID, again.as_str())]));
    assert!(errors.is_empty() && public_key(&again) == key, "{errors:?} when it is written again: {again}");
    let is_ours = key == public_key(PUBLIC_KEY);
    assert_eq!(found.is_ok(), is_ours, "{found:?} with {pem}");
    if !is_ours {
        assert_eq!(found, Err(UnauthenticatedReason::BadSignature), "with {pem}");
    }
    assert_eq!(verify(&verifier(set), KEY_ID), found, "written again");
}

/// What the library finds in a PEM, of whatever length.
fn public_key(pem: &str) -> Vec<u8> {
    let key = DecodingKey::from_ed_pem(pem.as_bytes()).expect("a key that is used");
    key.try_get_as_bytes().expect("bytes").to_vec()
}

fn framed(der: &[u8]) -> String {
    format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(der))
}

fn data(keys: &[(&str, &str)]) -> BTreeMap<String, String> {
    keys.iter().map(|(key_id, pem)| ((*key_id).to_owned(), (*pem).to_owned())).collect()
}

fn verifier(set: KeySet) -> TokenVerifier {
    let (_, keys) = watch::channel(Arc::new(set));
    TokenVerifier::new(ISSUER, keys)
}

/// What a token is worth that is in order, signed with our key, and names this one.
fn verify(verifier: &TokenVerifier, key_id: &str) -> Result<Caller, UnauthenticatedReason> {
    let header = json!({"typ": "JWT", "alg": "EdDSA", "kid": key_id});
    let claims = json!({
        "iss": ISSUER, "aud": SPACE, "sub": "bob", "jti": "j2", "root_jti": "j1", "exp": NOW + 60, "max_ms": 60_000,
        "max_calls": 1,
    });
    let token = signed(header.to_string().as_bytes(), claims.to_string().as_bytes());
    verifier.verify(&token, SPACE, Timestamp::from_second(NOW).expect("a time"))
}

//! The `X-IP-Token` that a visitor presents. Header and claims are made up and signed with a key that the verifier knows,
//! so that what comes behind the signature is reached.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use jsonwebtoken::crypto::sign;
use jsonwebtoken::{Algorithm, EncodingKey};
use serde_json::{Value, json};
use spaceport_core::ids::CookieId;
use spaceport_core::protocol::UnauthenticatedReason;
use spaceport_operator::identity::{Caller, KeySet, TokenVerifier};
use tokio::sync::watch;

use crate::Verdict;

/// Signs nothing but what is made up here.
const PRIVATE_KEY: &str = "-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIDjvbBG8H65pNqurg42Iz4AVXlWYy7ZD3ahY92m1oo+e
-----END PRIVATE KEY-----
";
pub(crate) const PUBLIC_KEY: &str = "-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEA+L10FllTmBpQ6FfEJif0zCrWjeZptSsZ2mhoNPvFhhw=
-----END PUBLIC KEY-----
";
pub(crate) const KEY_ID: &str = "k1";
pub(crate) const ISSUER: &str = "spaceport-gateway";
/// The Space that the token is presented by.
pub(crate) const SPACE: &str = "0b1c7c4e-space";
/// When it is presented, seconds since the epoch.
pub(crate) const NOW: i64 = 1_800_000_000;
/// Largest budget that a page can store; what a token says beyond it, of which nobody comes near, counts as this.
const STORED_MAX: u64 = i64::MAX.unsigned_abs();

struct Keys {
    private: EncodingKey,
    verifier: TokenVerifier,
}

/// Two lines, header and claims, to be signed; or one, a whole token.
///
/// # Panics
/// If a token is good that should not be, says another thing than its claims, or is good with a changed signature, for
/// another Space, or at its end.
pub fn check(bytes: &[u8]) -> Verdict {
    let Some(line) = bytes.iter().position(|byte| *byte == b'\n') else {
        let verified = verify(&String::from_utf8_lossy(bytes), SPACE, NOW);
        // Nobody but `signed` has the key; of the seeds none is a whole good token.
        assert!(verified.is_err(), "made up without the key: {verified:?}");
        return Verdict::Refused;
    };
    let (header, claims) = (&bytes[..line], &bytes[line + 1..]);
    let token = signed(header, claims);
    let Ok(caller) = verify(&token, SPACE, NOW) else { return Verdict::Refused };
    says(&caller, header, claims);
    other_times_and_places(&token, &caller);
    let again = signed(br#"{"typ":"JWT","alg":"EdDSA","kid":"k1"}"#, claims_of(&caller).to_string().as_bytes());
    assert_eq!(verify(&again, SPACE, NOW), Ok(caller), "printed and parsed");
    Verdict::Taken
}

/// A token that is good says what its claims say, by another parser.
fn says(caller: &Caller, header: &[u8], claims: &[u8]) {
    // A claim that nobody reads may hold what is no text.
    let parsed = |json: &[u8]| serde_json::from_str::<Value>(&String::from_utf8_lossy(json));
    let header = parsed(header).expect("a good token has a header");
    assert_eq!((header["alg"].as_str(), header["kid"].as_str()), (Some("EdDSA"), Some(KEY_ID)));
    let claims = parsed(claims).expect("a good token has claims");
    let ours = claims_of(caller);
    for name in ["iss", "aud", "sub", "jti", "root_jti", "exp", "cookie"] {
        assert_eq!(claims[name], ours[name], "{name}");
    }
    for (name, ours) in [("max_ms", caller.max_ms), ("max_calls", caller.max_calls)] {
        let claimed = claims[name].as_u64().map(|claimed| claimed.min(STORED_MAX));
        assert_eq!(claimed, Some(ours.min(STORED_MAX)), "{name}");
    }
    assert_eq!(
        caller.cookie.is_some(),
        caller.account.is_guests(),
        "a visitor is of a guest page, and the other way round"
    );
    assert!(!caller.account.as_str().is_empty() && !caller.root_jti.is_empty());
    assert!(caller.expires.as_second() > NOW, "it has ended");
}

fn other_times_and_places(token: &str, caller: &Caller) {
    assert_eq!(verify(token, SPACE, caller.expires.as_second()), Err(UnauthenticatedReason::Expired));
    assert_eq!(verify(token, "another-space", NOW), Err(UnauthenticatedReason::WrongAudience));
    let (signed, signature) = token.rsplit_once('.').expect("three parts");
    let mut bytes = URL_SAFE_NO_PAD.decode(signature).expect("base64");
    bytes[0] ^= 1;
    let forged = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(bytes));
    assert_eq!(verify(&forged, SPACE, NOW), Err(UnauthenticatedReason::BadSignature));
}

fn claims_of(caller: &Caller) -> Value {
    json!({
        "iss": ISSUER, "aud": SPACE, "sub": caller.account.as_str(), "jti": caller.jti, "root_jti": caller.root_jti,
        "exp": caller.expires.as_second(), "max_ms": caller.max_ms, "max_calls": caller.max_calls,
        "cookie": caller.cookie.as_ref().map(CookieId::as_str),
    })
}

fn keys() -> &'static Keys {
    static KEYS: OnceLock<Keys> = OnceLock::new();
    KEYS.get_or_init(|| {
        let (set, errors) = KeySet::parse(&BTreeMap::from([(KEY_ID.to_owned(), PUBLIC_KEY.to_owned())]));
        assert!(errors.is_empty(), "{errors:?}");
        let (_, keys) = watch::channel(Arc::new(set));
        Keys {
            private: EncodingKey::from_ed_pem(PRIVATE_KEY.as_bytes()).expect("a key"),
            verifier: TokenVerifier::new(ISSUER, keys),
        }
    })
}

pub(crate) fn signed(header: &[u8], claims: &[u8]) -> String {
    let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let signature = sign(message.as_bytes(), &keys().private, Algorithm::EdDSA).expect("a signature");
    format!("{message}.{signature}")
}

fn verify(token: &str, space_uid: &str, now: i64) -> Result<Caller, UnauthenticatedReason> {
    keys().verifier.verify(token, space_uid, Timestamp::from_second(now).expect("a time"))
}

//! Who a call is made for: the `X-IP-Token` that the gateway mints (docs/rules.md) and a Space presents.
//!
//! A token is checked for shape, key, signature, issuer, time and audience here. Whether its account exists and what is
//! left of its budget only the broker knows, who counts per `root_jti`. Tokens are never logged (invariant 10).

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt as _;
use jiff::Timestamp;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, crypto, decode, decode_header};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::watcher;
use serde::Deserialize;
use spaceport_core::ids::{AccountName, CookieId};
use spaceport_core::protocol::UnauthenticatedReason;
use spaceport_shell::error_chain;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::credentials::TOKEN_KEYS_CONFIG_MAP;
use crate::fault::{self, Fault};
use crate::kubeapi::KubeApi;

/// Longest token that is looked at, bytes. Ours are about 500; an `act` chain of a few Spaces stays far below.
const TOKEN_LENGTH_MAX: usize = 8192;
/// Longest PEM of a public key that is looked at, bytes. Ours have 113; the parser takes a frame of the stack for each level of
/// what is nested in one.
const PEM_LENGTH_MAX: usize = 1024;
/// Bytes of an Ed25519 public key.
const KEY_LENGTH: usize = 32;

/// Longest id of a cookie or of the token that a call began with, characters (the schema's bound).
const ID_LENGTH_MAX: usize = 64;
/// Longest name of a guest page: it is a label on receipts.
const GUEST_NAME_MAX: usize = 63;

/// Public keys by key id.
#[derive(Clone, Default)]
pub struct KeySet {
    keys: BTreeMap<String, DecodingKey>,
}

/// Checks tokens against the keys that are valid at the moment.
#[derive(Clone)]
pub struct TokenVerifier {
    issuer: String,
    keys: watch::Receiver<Arc<KeySet>>,
}

/// What a good token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The account to charge (`sub`).
    pub account: AccountName,
    /// The visitor (`cookie`), if that is the page of an address prefix; then always there, and never otherwise (L1).
    pub cookie: Option<CookieId>,
    /// Id of this token.
    pub jti: String,
    /// Id of the token that the visitor's call began with: budgets are counted by it, however often a Space calls on.
    pub root_jti: String,
    /// From here on it is worth nothing (`exp`).
    pub expires: Timestamp,
    /// Weighted milliseconds that calls with this root may reserve together.
    pub max_ms: u64,
    /// Calls that may be made with this root.
    pub max_calls: u64,
}

/// Why a key of the ConfigMap is not used.
#[derive(Debug, thiserror::Error)]
#[error("key {kid} is not an Ed25519 public key in PEM form")]
pub struct KeyError {
    kid: String,
    #[source]
    source: jsonwebtoken::errors::Error,
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    aud: String,
    sub: String,
    jti: String,
    root_jti: String,
    exp: i64,
    max_ms: u64,
    max_calls: u64,
    cookie: Option<String>,
}

/// The visitor of a token. Where the account is a guest page both have to be well-formed: the page is made by their names.
fn visitor(claims: &Claims) -> Result<Option<CookieId>, UnauthenticatedReason> {
    let account = AccountName::new(&claims.sub);
    let Some(cookie) = claims.cookie.as_ref() else {
        return if account.is_guests() { Err(UnauthenticatedReason::NotAToken) } else { Ok(None) };
    };
    let is_plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    let hash = claims.sub.strip_prefix(AccountName::GUEST_PREFIX).unwrap_or_default();
    let is_page = !hash.is_empty() && is_plain(hash) && claims.sub.len() <= GUEST_NAME_MAX;
    if is_page && is_id(cookie) { Ok(Some(CookieId::new(cookie))) } else { Err(UnauthenticatedReason::NotAToken) }
}

/// It can be a row's name on a page.
fn is_id(text: &str) -> bool {
    !text.is_empty() && text.len() <= ID_LENGTH_MAX && text.bytes().all(|byte| byte.is_ascii_graphic())
}

// === impl KeySet ===

impl KeySet {
    /// Parses the ConfigMap's data, key id to PEM. What is no key is left out and reported.
    pub fn parse(data: &BTreeMap<String, String>) -> (Self, Vec<KeyError>) {
        let mut set = Self::default();
        let mut errors = Vec::new();
        for (kid, pem) in data {
            match public_key(pem) {
                Ok(key) => drop(set.keys.insert(kid.clone(), key)),
                Err(source) => errors.push(KeyError { kid: kid.clone(), source }),
            }
        }
        (set, errors)
    }
}

/// A key that signatures can be checked with. The library takes whatever bits it finds in a PEM for one: it looks at them with
/// the first token that names the key, and panics if they are too few.
fn public_key(pem: &str) -> Result<DecodingKey, jsonwebtoken::errors::Error> {
    if pem.len() > PEM_LENGTH_MAX {
        return Err(ErrorKind::InvalidKeyFormat.into());
    }
    let key = DecodingKey::from_ed_pem(pem.as_bytes())?;
    if key.try_get_as_bytes()?.len() != KEY_LENGTH {
        return Err(ErrorKind::InvalidEddsaKey.into());
    }
    // An error is of the key, which must be a point of the curve; no signature at all is just not a good one.
    crypto::verify("", b"", &key, Algorithm::EdDSA)?;
    Ok(key)
}

// === impl TokenVerifier ===

impl TokenVerifier {
    /// A verifier for tokens of one issuer, with keys that may change.
    pub fn new(issuer: impl Into<String>, keys: watch::Receiver<Arc<KeySet>>) -> Self {
        Self { issuer: issuer.into(), keys }
    }

    /// What the token says, if it is good for this Space now.
    ///
    /// # Errors
    /// The first reason in this order: not one of ours, key not known, signature, time, audience. `UnknownAccount` and
    /// `Exhausted` are the broker's to find.
    pub fn verify(&self, token: &str, space_uid: &str, now: Timestamp) -> Result<Caller, UnauthenticatedReason> {
        if token.len() > TOKEN_LENGTH_MAX {
            return Err(UnauthenticatedReason::NotAToken);
        }
        let header = decode_header(token).map_err(|_| UnauthenticatedReason::NotAToken)?;
        let kid = header.kid.filter(|_| header.alg == Algorithm::EdDSA).ok_or(UnauthenticatedReason::NotAToken)?;
        let keys = Arc::clone(&self.keys.borrow());
        let key = keys.keys.get(&kid).ok_or(UnauthenticatedReason::UnknownKey)?;
        let claims = decode::<Claims>(token, key, &signature_only()).map_err(|error| match error.kind() {
            ErrorKind::InvalidSignature => UnauthenticatedReason::BadSignature,
            _ => UnauthenticatedReason::NotAToken,
        })?;
        self.judge(claims.claims, space_uid, now)
    }

    fn judge(&self, claims: Claims, space_uid: &str, now: Timestamp) -> Result<Caller, UnauthenticatedReason> {
        // Signed with a key of ours, but for another purpose.
        if claims.iss != self.issuer || claims.sub.is_empty() || !is_id(&claims.root_jti) {
            return Err(UnauthenticatedReason::NotAToken);
        }
        let expires = Timestamp::from_second(claims.exp).map_err(|_| UnauthenticatedReason::NotAToken)?;
        if now >= expires {
            return Err(UnauthenticatedReason::Expired);
        }
        if claims.aud != space_uid && !fault::is(Fault::AnyAudience) {
            return Err(UnauthenticatedReason::WrongAudience);
        }
        let cookie = visitor(&claims)?;
        Ok(Caller {
            cookie,
            account: AccountName::new(claims.sub),
            jti: claims.jti,
            root_jti: claims.root_jti,
            expires,
            // A page stores what an int64 holds, of which nobody comes near.
            max_ms: claims.max_ms.min(i64::MAX.unsigned_abs()),
            max_calls: claims.max_calls.min(i64::MAX.unsigned_abs()),
        })
    }
}

/// Only shape and signature: the library would read the clock itself and give a minute of grace.
fn signature_only() -> Validation {
    let mut validation = Validation::new(Algorithm::EdDSA);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_aud = false;
    validation
}

/// Keeps the keys as the ConfigMap has them, until `stop`. Without the ConfigMap no token is good.
pub async fn watch_keys(api: KubeApi, namespace: String, keys: watch::Sender<Arc<KeySet>>, stop: CancellationToken) {
    let config = watcher::Config::default().fields(&format!("metadata.name={TOKEN_KEYS_CONFIG_MAP}"));
    let mut events = std::pin::pin!(api.namespace::<ConfigMap>(&namespace).watch(config));
    // A list begins with Init and ends with InitDone: only then it is known that there is no ConfigMap.
    let mut listed = None;
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = stop.cancelled() => return,
        };
        match event {
            Some(Ok(watcher::Event::Init)) => listed = None,
            Some(Ok(watcher::Event::InitApply(map))) => listed = Some(map),
            Some(Ok(watcher::Event::InitDone)) => publish(&keys, listed.take()),
            Some(Ok(watcher::Event::Apply(map))) => publish(&keys, Some(map)),
            Some(Ok(watcher::Event::Delete(_))) => publish(&keys, None),
            Some(Err(error)) => tracing::warn!(error = %error_chain(&error), "Cannot watch the token keys"),
            None => return,
        }
    }
}

fn publish(keys: &watch::Sender<Arc<KeySet>>, map: Option<ConfigMap>) {
    let (set, errors) = KeySet::parse(&map.and_then(|map| map.data).unwrap_or_default());
    for error in errors {
        tracing::warn!(error = %error_chain(&error), "A token key is not used");
    }
    tracing::info!(keys = set.keys.len(), "Token keys taken");
    keys.send_replace(Arc::new(set));
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use jsonwebtoken::{EncodingKey, Header, encode};
    use rcgen::{KeyPair, PKCS_ED25519};
    use serde_json::{Value, json};

    use super::*;

    const SPACE: &str = "0b1c7c4e-space";
    const NOW: i64 = 1_800_000_000;

    struct Mint {
        private: EncodingKey,
        verifier: TokenVerifier,
    }

    fn mint() -> Mint {
        let pair = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let data = BTreeMap::from([("k1".to_owned(), pair.public_key_pem()), ("broken".to_owned(), "pem".to_owned())]);
        let (set, errors) = KeySet::parse(&data);
        assert_eq!(errors.len(), 1);
        let (_, keys) = watch::channel(Arc::new(set));
        let private = EncodingKey::from_ed_pem(pair.serialize_pem().as_bytes()).unwrap();
        Mint { private, verifier: TokenVerifier::new("spaceport-gateway", keys) }
    }

    fn claims() -> Value {
        json!({"iss": "spaceport-gateway", "aud": SPACE, "sub": "bob", "jti": "j2", "root_jti": "j1", "exp": NOW + 60,
               "max_ms": 60_000, "max_calls": 1, "act": {"sub": "space-a"}})
    }

    fn with(key: &str, value: Value) -> Value {
        let mut claims = claims();
        claims[key] = value;
        claims
    }

    fn without(key: &str) -> Value {
        let mut claims = claims();
        claims.as_object_mut().unwrap().remove(key);
        claims
    }

    fn guest(page: &str, cookie: &str) -> Value {
        let mut claims = with("sub", json!(page));
        claims["cookie"] = json!(cookie);
        claims
    }

    #[test]
    fn a_guests_token_names_the_address_prefix_and_the_visitor() {
        let mint = mint();
        let caller = mint.verify(&mint.sign(Some("k1"), &guest("guest-0af3", "c_1"))).unwrap();
        assert_eq!((caller.account.as_str(), caller.cookie), ("guest-0af3", Some(CookieId::new("c_1"))));
    }

    impl Mint {
        fn sign(&self, kid: Option<&str>, claims: &Value) -> String {
            let mut header = Header::new(Algorithm::EdDSA);
            header.kid = kid.map(str::to_owned);
            encode(&header, claims, &self.private).unwrap()
        }

        fn verify(&self, token: &str) -> Result<Caller, UnauthenticatedReason> {
            self.verifier.verify(token, SPACE, Timestamp::from_second(NOW).unwrap())
        }
    }

    #[test]
    fn good_token_names_its_caller() {
        let mint = mint();
        let caller = mint.verify(&mint.sign(Some("k1"), &claims())).unwrap();
        assert_eq!(caller.account.as_str(), "bob");
        assert_eq!((caller.jti.as_str(), caller.root_jti.as_str()), ("j2", "j1"));
        assert_eq!((caller.max_ms, caller.max_calls), (60_000, 1));
        assert_eq!(caller.expires.as_second(), NOW + 60);
    }

    #[test]
    fn each_fault_has_its_own_reason() {
        let mint = mint();
        let table = [
            ("issuer", with("iss", json!("elsewhere")), UnauthenticatedReason::NotAToken),
            ("no account", with("sub", json!("")), UnauthenticatedReason::NotAToken),
            ("no root", without("root_jti"), UnauthenticatedReason::NotAToken),
            ("too long a root", with("root_jti", json!("r".repeat(65))), UnauthenticatedReason::NotAToken),
            ("no name of a root", with("root_jti", json!("a b")), UnauthenticatedReason::NotAToken),
            ("no budget", without("max_ms"), UnauthenticatedReason::NotAToken),
            ("negative budget", with("max_ms", json!(-1)), UnauthenticatedReason::NotAToken),
            ("audiences", with("aud", json!([SPACE, "other"])), UnauthenticatedReason::NotAToken),
            ("no end", without("exp"), UnauthenticatedReason::NotAToken),
            ("endless", with("exp", json!(i64::MAX)), UnauthenticatedReason::NotAToken),
            ("ended just now", with("exp", json!(NOW)), UnauthenticatedReason::Expired),
            ("a guest page without its visitor", with("sub", json!("guest-0af3")), UnauthenticatedReason::NotAToken),
            ("a visitor of an account", with("cookie", json!("c1")), UnauthenticatedReason::NotAToken),
            ("a visitor without a name", guest("guest-0af3", ""), UnauthenticatedReason::NotAToken),
            ("too long a name of a visitor", guest("guest-0af3", &"c".repeat(65)), UnauthenticatedReason::NotAToken),
            ("no address prefix", guest("guest-", "c1"), UnauthenticatedReason::NotAToken),
            ("no name of an object", guest("guest-A/b", "c1"), UnauthenticatedReason::NotAToken),
            ("another Space's", with("aud", json!("other")), UnauthenticatedReason::WrongAudience),
        ];
        for (what, claims, reason) in table {
            assert_eq!(mint.verify(&mint.sign(Some("k1"), &claims)), Err(reason), "{what}");
        }
    }

    #[test]
    fn keys_and_signatures_are_told_apart() {
        let (ours, theirs) = (mint(), mint());
        assert_eq!(ours.verify(&ours.sign(Some("k2"), &claims())), Err(UnauthenticatedReason::UnknownKey));
        assert_eq!(ours.verify(&ours.sign(None, &claims())), Err(UnauthenticatedReason::NotAToken));
        assert_eq!(ours.verify(&theirs.sign(Some("k1"), &claims())), Err(UnauthenticatedReason::BadSignature));
        let token = ours.sign(Some("k1"), &claims());
        let (head, signature) = token.rsplit_once('.').unwrap();
        let (header, _) = head.split_once('.').unwrap();
        let other = ours.sign(Some("k1"), &with("sub", json!("eve")));
        let payload = other.split('.').nth(1).unwrap();
        let spliced = format!("{header}.{payload}.{signature}");
        assert_eq!(ours.verify(&spliced), Err(UnauthenticatedReason::BadSignature));
    }

    #[test]
    fn other_algorithms_and_other_strings_are_no_tokens() {
        let mint = mint();
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some("k1".to_owned());
        let symmetric = encode(&header, &claims(), &EncodingKey::from_secret(b"guess")).unwrap();
        let long = "a".repeat(TOKEN_LENGTH_MAX + 1);
        let unsigned = "eyJhbGciOiJub25lIiwia2lkIjoiazEifQ.e30.";
        for text in [symmetric.as_str(), "", ".", "..", "hf_abcdef", "a.b.c", unsigned, long.as_str()] {
            assert_eq!(mint.verify(text), Err(UnauthenticatedReason::NotAToken));
        }
    }

    #[test]
    fn what_no_signature_can_be_checked_with_is_no_key() {
        let pem = |key: &[u8]| {
            let length = u8::try_from(key.len()).unwrap();
            let head = [0x30, length + 10, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, length + 1, 0];
            let der = STANDARD.encode([&head[..], key].concat());
            format!("-----BEGIN PUBLIC KEY-----\n{der}\n-----END PUBLIC KEY-----\n")
        };
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap().public_key_raw().to_vec();
        let mut no_point = [0; KEY_LENGTH];
        no_point[0] = 2;
        let long = [&key[..], &[0]].concat();
        let data = [("good", &key[..]), ("short", &key[1..]), ("long", &long[..]), ("no point", &no_point[..])];
        let mut data: BTreeMap<_, _> = data.into_iter().map(|(kid, key)| (kid.to_owned(), pem(key))).collect();
        data.insert("endless".to_owned(), format!("{}{}", " ".repeat(PEM_LENGTH_MAX), pem(&key)));
        let (set, errors) = KeySet::parse(&data);
        assert_eq!(set.keys.keys().collect::<Vec<_>>(), ["good"]);
        assert_eq!(errors.len(), data.len() - 1);
    }

    #[test]
    fn without_keys_no_token_is_good() {
        let mint = mint();
        let token = mint.sign(Some("k1"), &claims());
        let (_, keys) = watch::channel(Arc::new(KeySet::default()));
        let verifier = TokenVerifier::new("spaceport-gateway", keys);
        let now = Timestamp::from_second(NOW).unwrap();
        assert_eq!(verifier.verify(&token, SPACE, now), Err(UnauthenticatedReason::UnknownKey));
    }
}

//! Tokens that name a caller, signed with the key of the cluster as the gateway will (X-IP-Token).

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::json;

use crate::kubectl::{Kubectl, at};

/// What a token says; the defaults are those of a sane gateway.
#[derive(Clone, Debug)]
pub struct Token {
    /// GPUAccount that pays.
    pub account: String,
    /// uid of the Space it may be spent in.
    pub audience: String,
    /// Seconds from now until it expires; negative: already expired.
    pub lifetime_s: i64,
    /// Weighted GPU milliseconds it is worth.
    pub max_ms: u64,
    /// Calls it is worth.
    pub max_calls: u64,
    /// Identity of the call.
    pub jti: String,
    /// The visitor, where the account is the page of an address prefix.
    pub cookie: Option<String>,
}

impl Token {
    /// One call by `account` in the Space with this uid.
    pub fn one_call(account: &str, audience: &str) -> Self {
        Self {
            account: account.to_owned(),
            audience: audience.to_owned(),
            lifetime_s: 900,
            max_ms: 600_000,
            max_calls: 1,
            jti: ulid::Ulid::generate().to_string(),
            cookie: None,
        }
    }

    /// One call by a visitor who is not signed in: `page` is `guest-<hash of the address prefix>`.
    pub fn one_call_of_guest(page: &str, cookie: &str, audience: &str) -> Self {
        Self { cookie: Some(cookie.to_owned()), ..Self::one_call(page, audience) }
    }

    /// Signs it with the key from the cluster's Secret.
    pub fn sign(&self, kubectl: &Kubectl) -> Result<String> {
        Signer::read(kubectl)?.sign(self)
    }
}

/// The cluster's key, read once for many tokens.
pub(crate) struct Signer {
    header: Header,
    key: EncodingKey,
}

impl Signer {
    pub(crate) fn read(kubectl: &Kubectl) -> Result<Self> {
        let secret =
            kubectl.json(&["--namespace", "spaceport-system", "get", "secret", "spaceport-token-signing-key"])?;
        let field = |name: &str| -> Result<Vec<u8>> {
            let text = at(&secret, &format!("/data/{name}"))
                .as_str()
                .with_context(|| format!("the signing key has no {name}"))?;
            STANDARD.decode(text).with_context(|| format!("{name} of the signing key is not base64"))
        };
        let mut header = Header::new(Algorithm::EdDSA);
        header.kid = Some(String::from_utf8(field("kid")?)?);
        let key = EncodingKey::from_ed_pem(&field("private.pem")?).context("the signing key is not an Ed25519 key")?;
        Ok(Self { header, key })
    }

    pub(crate) fn sign(&self, token: &Token) -> Result<String> {
        let mut claims = json!({
            "iss": "spaceport-gateway",
            "aud": token.audience,
            "sub": token.account,
            "jti": token.jti,
            "root_jti": token.jti,
            "exp": now_s() + token.lifetime_s,
            "max_ms": token.max_ms,
            "max_calls": token.max_calls,
        });
        if let Some(cookie) = &token.cookie {
            claims["cookie"] = json!(cookie);
        }
        encode(&self.header, &claims, &self.key).context("the token cannot be signed")
    }
}

#[allow(clippy::disallowed_methods)] // Tokens expire in real time.
fn now_s() -> i64 {
    jiff::Timestamp::now().as_second()
}

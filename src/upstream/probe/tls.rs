//! A TLS handshake that reads the certificate and does not check it.
//!
//! Invariants
//! - Any certificate is accepted, also if it is expired or for another name: its content is reported, and nothing
//!   secret is sent.
//! - The mailbox must not send anything before our first byte of TLS: anything that comes then is about the PROXY
//!   header.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use jiff::Timestamp;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{AlertDescription, ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::io::InspectReader;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{Certificate, Clock, LOOK, ProbeError, Target, harmless, harmless_error};

/// How many of the mailbox's first bytes are kept, to be shown.
const NOTED: usize = 64;

/// How many names of a certificate are kept.
const NAMES: usize = 100;

/// Does the TLS handshake. The header, if one is due, has been sent.
pub(super) async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    target: &Target,
    clock: Clock,
) -> Result<(TlsStream<impl AsyncRead + AsyncWrite + Unpin>, Certificate), ProbeError> {
    if target.header {
        look_for_complaints(&mut stream, clock).await?;
    }
    let said = Said::default();
    let noting = said.clone();
    let stream = InspectReader::new(stream, move |bytes: &[u8]| noting.note(bytes));
    let connecting = TlsConnector::from(config()).connect(server_name(&target.host), stream);
    match timeout_at(clock.deadline, connecting).await {
        Ok(Ok(tls)) => {
            let certificate = leaf(tls.get_ref().1.peer_certificates())?;
            Ok((tls, certificate))
        }
        Ok(Err(error)) => Err(why(Some(&error), &said.bytes(), target.header, clock)),
        Err(_) => Err(why(None, &said.bytes(), target.header, clock)),
    }
}

/// Waits a moment for the alert of a mailbox that took the header for TLS. If we sent our hello at once, the
/// mailbox might close with unread bytes, and the resulting reset would destroy its alert.
async fn look_for_complaints<S: AsyncRead + Unpin>(stream: &mut S, clock: Clock) -> Result<(), ProbeError> {
    let mut said = [0; NOTED];
    match timeout_at(clock.deadline.min(Instant::now() + LOOK), stream.read(&mut said)).await {
        Err(_) => Ok(()), // silence, as it should be
        Ok(Ok(0) | Err(_)) => Err(ProbeError::ClosedSilently { header: true }),
        Ok(Ok(count)) => Err(match alert(&said[..count]) {
            Some(alert) => ProbeError::HeaderTaken { said: alert_text(alert) },
            None => not_tls(&said[..count], true),
        }),
    }
}

/// Why a handshake failed; `None` is a time-out.
fn why(error: Option<&io::Error>, said: &[u8], header: bool, clock: Clock) -> ProbeError {
    let by_rustls = error.and_then(io::Error::get_ref).is_some_and(|inner| inner.is::<rustls::Error>());
    match (error, said, alert(said)) {
        (None, [], _) => ProbeError::Silent { limit: clock.limit },
        (Some(_), [], _) if !by_rustls => ProbeError::ClosedSilently { header },
        (_, _, Some(alert)) if header && is_about_junk(alert) => {
            ProbeError::HeaderTaken { said: alert_text(alert) }
        }
        (_, [first, ..], None) if !is_tls(*first) => not_tls(said, header),
        (Some(error), ..) if error.kind() == io::ErrorKind::UnexpectedEof => {
            ProbeError::Tls("the mailbox closed the connection in the middle of it".to_owned())
        }
        (Some(error), ..) => ProbeError::Tls(harmless_error(error)),
        (None, ..) => ProbeError::Tls(format!("it did not end within {:?}", clock.limit)),
    }
}

/// Text is another protocol. What is neither text nor TLS can only be a server's reaction to the header.
fn not_tls(said: &[u8], header: bool) -> ProbeError {
    let line = said.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let is_text = line.trim_ascii().iter().all(|byte| matches!(byte, b' '..=b'~' | b'\t'));
    match header && !is_text {
        true => ProbeError::HeaderTaken { said: harmless(line) },
        false => ProbeError::WrongProtocol { found: harmless(line) },
    }
}

/// Whether this is the first byte of a TLS record.
fn is_tls(first: u8) -> bool {
    (0x14..=0x18).contains(&first)
}

/// The alert, if that is what the mailbox said first (RFC 8446, section 6).
fn alert(said: &[u8]) -> Option<AlertDescription> {
    match said {
        [0x15, 0x03, _, 0, 2, _, description, ..] => Some(AlertDescription::from(*description)),
        _ => None,
    }
}

/// Whether an alert says that we do not speak TLS, which we do.
fn is_about_junk(alert: AlertDescription) -> bool {
    use AlertDescription::{DecodeError, RecordOverflow, UnexpectedMessage};
    matches!(alert, DecodeError | RecordOverflow | UnexpectedMessage)
}

fn alert_text(alert: AlertDescription) -> String {
    format!("TLS alert {} ({alert:?})", u8::from(alert))
}

/// The server name for the handshake; none is sent for an address.
pub(crate) fn server_name(host: &str) -> ServerName<'static> {
    let none = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
    ServerName::try_from(host.to_owned()).unwrap_or(none)
}

/// One configuration for all connections that only read the certificate; without resumption, since then no
/// certificate is sent.
pub(crate) fn config() -> Arc<ClientConfig> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    let make = || {
        let provider = rustls::crypto::ring::default_provider();
        let schemes = provider.signature_verification_algorithms.supported_schemes();
        let mut config = ClientConfig::builder_with_provider(provider.into())
            .with_safe_default_protocol_versions()
            .expect("ring has what TLS 1.2 and 1.3 need")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(LookOnly { schemes }))
            .with_no_client_auth();
        config.resumption = Resumption::disabled();
        Arc::new(config)
    };
    Arc::clone(CONFIG.get_or_init(make))
}

/// Accepts every certificate and every signature made with it: checking the signature needs a certificate of
/// version 3, and some are older.
#[derive(Debug)]
struct LookOnly {
    schemes: Vec<SignatureScheme>,
}

impl ServerCertVerifier for LookOnly {
    fn verify_server_cert(
        &self,
        _: &CertificateDer,
        _: &[CertificateDer],
        _: &ServerName,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.clone()
    }
}

/// What is of interest in the mailbox's own certificate.
fn leaf(chain: Option<&[CertificateDer]>) -> Result<Certificate, ProbeError> {
    let Some(der) = chain.and_then(<[_]>::first) else {
        return Err(ProbeError::Tls("the mailbox showed no certificate".to_owned()));
    };
    certificate(der).map_err(|error| ProbeError::Tls(format!("its certificate cannot be read: {error}")))
}

fn certificate(der: &[u8]) -> Result<Certificate, String> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| harmless_error(&error))?;
    let alternative = certificate.subject_alternative_name().map_err(|error| harmless_error(&error))?;
    let general = alternative.iter().flat_map(|extension| &extension.value.general_names);
    let mut names: Vec<String> = general.filter_map(name).take(NAMES).collect();
    if names.is_empty() {
        let common = certificate.subject().iter_common_name();
        names.extend(
            common.filter_map(|name| name.as_str().ok()).map(|name| harmless(name.as_bytes())).take(1),
        );
    }
    // A certificate that never expires ends with the year 9999, hours after jiff's last moment.
    let not_after = certificate.validity().not_after.timestamp();
    let not_after = Timestamp::from_second(not_after).unwrap_or(Timestamp::MAX);
    Ok(Certificate { names, not_after })
}

/// A name that a client would compare with the one it dialled.
fn name(name: &GeneralName) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some(harmless(name.as_bytes())),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            let v6 = <[u8; 16]>::try_from(*bytes).map(IpAddr::from);
            v4.or(v6).ok().map(|address| address.to_string())
        }
        _ => None,
    }
}

/// The mailbox's first bytes, which rustls does not show.
#[derive(Clone, Debug, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, more: &[u8]) {
        let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = NOTED - noted.len();
        noted.extend_from_slice(&more[..more.len().min(room)]);
    }
}

#[cfg(test)]
mod tests;

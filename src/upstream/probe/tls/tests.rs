use rcgen::{CertificateParams, DnType, KeyPair, SanType};

use super::*;

fn der(params: CertificateParams) -> Vec<u8> {
    params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

/// For the subject alternative names, valid to the end of a year.
fn params(names: &[&str], year: i32) -> CertificateParams {
    let mut params =
        CertificateParams::new(names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>()).unwrap();
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(year, 12, 31);
    params.distinguished_name.push(DnType::CommonName, "common.example.test");
    params
}

#[test]
fn dns_names_and_addresses_are_noted_and_nothing_else() {
    let mut params = params(&["mail.example.test", "*.example.test", "192.0.2.7", "2001:db8::7"], 2040);
    params.subject_alt_names.push(SanType::Rfc822Name("post@example.test".try_into().unwrap()));
    let names = certificate(&der(params)).unwrap().names;
    assert_eq!(names, ["mail.example.test", "*.example.test", "192.0.2.7", "2001:db8::7"]);
}

#[test]
fn without_alternative_names_it_is_the_common_name() {
    assert_eq!(certificate(&der(params(&[], 2040))).unwrap().names, ["common.example.test"]);
}

#[test]
fn the_last_moment_is_noted_past_or_not() {
    for (year, expected) in [(2021, "2021-12-31T00:00:00Z"), (2090, "2090-12-31T00:00:00Z")] {
        let noted = certificate(&der(params(&["a.test"], year))).unwrap();
        assert_eq!(noted.not_after.to_string(), expected);
    }
}

#[test]
fn a_certificate_for_ever_has_the_last_moment_there_is() {
    let noted = certificate(&der(params(&["a.test"], 9999))).unwrap();
    assert_eq!(noted.not_after, Timestamp::MAX);
}

#[test]
fn what_a_certificate_says_is_harmless() {
    let mut params = params(&[], 2040);
    params.distinguished_name.push(DnType::CommonName, "\u{1b}[31mred\n".to_owned() + &"x".repeat(300));
    let names = certificate(&der(params)).unwrap().names;
    assert!(names[0].starts_with("?[31mred xxx"), "{names:?}");
    assert!(names[0].len() < 210);
}

#[test]
fn garbage_is_no_certificate() {
    certificate(b"").unwrap_err();
    certificate(&[0x30; 500]).unwrap_err();
    assert!(matches!(leaf(None), Err(ProbeError::Tls(_))));
}

#[test]
fn an_address_or_a_strange_name_is_not_asked_for_by_name() {
    assert_eq!(server_name("stalwart").to_str(), "stalwart");
    assert_eq!(server_name("100.64.0.7").to_str(), "100.64.0.7");
    assert_eq!(server_name("what is this").to_str(), "0.0.0.0");
}

//! Each rule, passing and failing, against a DNS server on loopback.

use super::*;
use crate::doctor::report::Grade::{self, Fail, Pass, Warn};
use crate::doctor::test_dns::{Server, Zone};

const V4: &str = "203.0.113.7";
const V6: &str = "2001:db8::7";

/// A domain without any mistake.
const GOOD: [(&str, &str, &str); 10] = [
    ("example.com", "MX", "10 mx.example.com"),
    ("mx.example.com", "A", V4),
    ("mx.example.com", "AAAA", V6),
    ("7.113.0.203.in-addr.arpa", "PTR", "mx.example.com"),
    ("7.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa", "PTR", "mx.example.com"),
    ("_mta-sts.example.com", "TXT", "v=STSv1; id=20260101"),
    ("mta-sts.example.com", "CNAME", "www.example.com"),
    ("www.example.com", "A", V4),
    ("autoconfig.example.com", "A", V4),
    ("unrelated.example.com", "TXT", "v=STSv1"),
];

/// The good domain without the records of these names and types, and with others.
fn changed(without: &[(&str, &str)], with: &[(&'static str, &'static str, &'static str)]) -> Server {
    let kept = GOOD.iter().filter(|(name, kind, _)| !without.contains(&(name, kind)));
    let table: Vec<_> = kept.chain(with).copied().collect();
    Zone::new(&table).serve()
}

fn listening(addresses: &str) -> Config {
    let text = format!("[[listener]]\nprotocol = 'smtp'\nlisten = [{addresses}]");
    Config::parse(&text, Some("stalwart"), &|_| None).unwrap()
}

fn both() -> Config {
    listening("'0.0.0.0:25', '[::]:25'")
}

fn own(addresses: &[&str]) -> Addresses {
    Addresses { public: addresses.iter().map(|address| address.parse().unwrap()).collect(), given: true }
}

async fn look(server: &Server, own: &Addresses, config: &Config) -> Vec<Check> {
    let resolver = Resolver::new(Some(server.address())).unwrap();
    check("example.com", own, config, &resolver).await
}

async fn changes(
    without: &[(&str, &str)],
    with: &[(&'static str, &'static str, &'static str)],
) -> Vec<Check> {
    look(&changed(without, with), &own(&[V4, V6]), &both()).await
}

/// There is exactly one check of that name, with that outcome and these words; and no other is
/// worse than a pass unless it is named.
#[track_caller]
fn only(checks: &[Check], name: &str, outcome: Grade, words: &str) {
    let named: Vec<&Check> = checks.iter().filter(|check| check.name == name).collect();
    let [check] = named[..] else { panic!("not one {name}: {checks:#?}") };
    assert_eq!(check.outcome, outcome, "{check:?}");
    let said = format!("{}; {}", check.finding, check.remedy.as_deref().unwrap_or_default());
    assert!(said.contains(words), "{words:?} is missing from {check:?}");
    let others: Vec<&Check> =
        checks.iter().filter(|check| check.name != name && check.outcome != Pass).collect();
    assert!(others.is_empty(), "{others:#?}");
}

#[tokio::test]
async fn a_domain_with_which_all_is_well() {
    let checks = changes(&[], &[]).await;
    assert!(checks.iter().all(|check| check.outcome == Pass && check.remedy.is_none()), "{checks:#?}");
    let names: Vec<&str> = checks.iter().map(|check| &*check.name).collect();
    let expected = [
        "mx",
        "mx-address mx.example.com",
        "mx-here",
        "reverse-dns 203.0.113.7",
        "reverse-dns 2001:db8::7",
        "mta-sts",
        "autoconfig",
    ];
    assert_eq!(names, expected);
    assert!(checks[2].finding.contains("mx.example.com is this machine"));
}

#[tokio::test]
async fn without_mx_the_domain_itself_is_the_host() {
    let checks = changes(&[("example.com", "MX")], &[("example.com", "A", V4)]).await;
    only(&checks, "mx", Warn, "no MX record");
    assert!(checks.iter().any(|check| check.name == "mx-here" && check.outcome == Pass));
}

#[tokio::test]
async fn a_null_mx_takes_no_mail() {
    let checks = changes(&[("example.com", "MX")], &[("example.com", "MX", "0 .")]).await;
    only(&checks, "mx", Fail, "takes no mail (null MX, RFC 7505)");
}

#[tokio::test]
async fn an_mx_must_not_be_an_alias_or_an_address() {
    let alias =
        [("alias.example.com", "CNAME", "mx.example.com"), ("example.com", "MX", "10 alias.example.com")];
    let checks = changes(&[("example.com", "MX")], &alias).await;
    only(&checks, "mx-address alias.example.com", Warn, "is an alias (CNAME)");
    let checks = changes(&[], &[("example.com", "MX", "20 203.0.113.7")]).await;
    only(&checks, "mx-address 203.0.113.7", Fail, "names the address 203.0.113.7, not a host");
}

#[tokio::test]
async fn a_mail_host_needs_an_address() {
    let checks = changes(&[], &[("example.com", "MX", "20 gone.example.com")]).await;
    only(&checks, "mx-address gone.example.com", Fail, "has no address");
}

#[tokio::test]
async fn mail_has_to_come_to_this_machine() {
    let elsewhere = [("mx.example.com", "A", "198.51.100.1")];
    let without = [("mx.example.com", "A"), ("mx.example.com", "AAAA"), ("7.113.0.203.in-addr.arpa", "PTR")];
    let with = [elsewhere[0], ("7.113.0.203.in-addr.arpa", "PTR", "www.example.com")];
    let server = changed(&without, &with);
    only(
        &look(&server, &own(&[V4]), &both()).await,
        "mx-here",
        Fail,
        "no mail host of example.com (mx.example.com)",
    );
    only(&look(&server, &own(&[]), &both()).await, "mx-here", Warn, "--address");
    // A second host elsewhere is not a mistake.
    let backup = [("example.com", "MX", "20 b.example.net"), ("b.example.net", "AAAA", "2001:db8::99")];
    let checks = changes(&[], &backup).await;
    assert!(checks.iter().all(|check| check.outcome == Pass), "{checks:#?}");
}

#[tokio::test]
async fn what_is_published_has_to_be_served() {
    let server = changed(&[], &[]);
    let v4_only = listening("'0.0.0.0:25'");
    let checks = look(&server, &own(&[V4, V6]), &v4_only).await;
    only(&checks, "mx-served 2001:db8::7", Fail, "no mail listener accepts connections there");
    let checks = look(&server, &own(&[V4]), &v4_only).await;
    only(&checks, "mx-served 2001:db8::7", Warn, "not an address of this machine");
}

#[tokio::test]
async fn a_reverse_name_has_to_lead_back() {
    let reverse = "7.113.0.203.in-addr.arpa";
    let checks = changes(&[(reverse, "PTR")], &[]).await;
    only(&checks, "reverse-dns 203.0.113.7", Warn, "has no name (PTR record); ask the provider");
    let checks = changes(&[(reverse, "PTR")], &[(reverse, "PTR", "host-7.example.net")]).await;
    only(
        &checks,
        "reverse-dns 203.0.113.7",
        Warn,
        "named host-7.example.net, but that name does not have this address",
    );
    // One of several is enough.
    let checks = changes(&[], &[(reverse, "PTR", "host-7.example.net")]).await;
    assert!(checks.iter().all(|check| check.outcome == Pass), "{checks:#?}");
}

#[tokio::test]
async fn an_announced_policy_has_to_be_somewhere() {
    let announced = ("_mta-sts.example.com", "TXT");
    only(&changes(&[("mta-sts.example.com", "CNAME")], &[]).await, "mta-sts", Fail, "has no address");
    only(&changes(&[announced], &[]).await, "mta-sts", Pass, "not used");
    let without_id = [(announced.0, announced.1, "v=STSv1;")];
    only(&changes(&[announced], &without_id).await, "mta-sts", Warn, "has no id");
    let second = [(announced.0, announced.1, "v=STSv1; id=2")];
    only(&changes(&[], &second).await, "mta-sts", Warn, "2 policies, so senders use none");
    let other = [(announced.0, announced.1, "something else")];
    only(&changes(&[], &other).await, "mta-sts", Pass, "announced");
}

#[tokio::test]
async fn names_for_mail_programs_are_optional() {
    let checks = changes(&[("autoconfig.example.com", "A")], &[]).await;
    only(&checks, "autoconfig", Warn, "neither autoconfig.example.com nor autodiscover.example.com");
    let discover = [("autodiscover.example.com", "CNAME", "www.example.com")];
    let checks = changes(&[("autoconfig.example.com", "A")], &discover).await;
    only(&checks, "autoconfig", Pass, "published: autodiscover.example.com");
}

#[tokio::test]
async fn a_failing_question_does_not_end_the_others() {
    let checks = changes(&[], &[("example.com", "SERVFAIL", "")]).await;
    only(&checks, "mx", Fail, "cannot answer: error response: Server Failure");
    assert!(checks.iter().any(|check| check.name == "autoconfig"), "{checks:#?}");
}

#[tokio::test]
async fn a_silent_server_is_one_failure_that_names_it() {
    let silent = Zone::new(&[("example.com", "SILENT", "")]).serve();
    let checks = look(&silent, &own(&[V4, V6]), &both()).await;
    assert_eq!(checks.len(), 1, "{checks:#?}");
    only(&checks, "dns-server", Fail, &format!("the DNS server {} does not answer", silent.address()));
    // Only the first question with its repetitions was asked, none of the other eleven.
    let asked = silent.questions();
    assert!((1..=8).contains(&asked), "{asked} questions to a silent server");
    // A server that does not exist is reported at once.
    let gone = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let resolver = Resolver::new(Some(gone)).unwrap();
    let checks = check("example.com", &own(&[V4]), &both(), &resolver).await;
    only(&checks, "dns-server", Fail, &format!("the DNS server {gone} does not answer"));
}

//! The PROXY protocol header: (client, local) addresses to bytes.
//!
//! Rules, from <https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt> and from the receivers we support:
//! - The client's true family decides. A v4-mapped IPv6 address is IPv4; where
//!   the two addresses still differ in family, both become IPv6, since the crate
//!   `ppp` would otherwise write UNKNOWN and hide the client.
//! - Never UNKNOWN or UNSPEC: Postfix refuses them, since they would bypass its access controls.
//! - No TLV. Stalwart takes the TLS TLV (0x20) as proof that the client uses TLS, and an older Dovecot reads at
//!   most 232 bytes.
//! - v1 is at most 107 bytes (section 2.1), v2 without TLVs at most 52.
//! - A probe stands for no client and sends [`LOCAL`], in v2 even where the listener sends v1, since v1 has no
//!   LOCAL.
//!
//! Deliberately not here: parsing headers, and deciding whether a header is sent (see `connection.rs`).

use std::net::{IpAddr, SocketAddr};

use ppp::{v1, v2};

use crate::protocol::ProxyProtocol;

/// The v2 header of a connection that stands for no client (section 2.2): receivers then use our own address. Its
/// length is 0, since some Dovecot versions fail on LOCAL with an address block.
pub const LOCAL: [u8; 16] = *b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// The header for a client that connected to `local`, as seen on our own
/// socket. `None` if the listener wants none.
///
/// ```
/// use tailwart_edge::protocol::ProxyProtocol;
/// use tailwart_edge::protocol::proxy_header::proxy_header;
///
/// let (client, local) = ("192.0.2.7:50123".parse()?, "198.51.100.1:25".parse()?);
/// let header = proxy_header(ProxyProtocol::V1, client, local);
/// assert_eq!(header.as_deref(), Some(&b"PROXY TCP4 192.0.2.7 198.51.100.1 50123 25\r\n"[..]));
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
pub fn proxy_header(protocol: ProxyProtocol, client: SocketAddr, local: SocketAddr) -> Option<Vec<u8>> {
    let pair = same_family(client, local);
    match protocol {
        ProxyProtocol::Off => None,
        ProxyProtocol::V1 => Some(v1::Addresses::from(pair).to_string().into_bytes()),
        ProxyProtocol::V2 => Some(
            v2::Builder::with_addresses(v2::Version::Two | v2::Command::Proxy, v2::Protocol::Stream, pair)
                .build()
                .expect("two addresses fit a v2 header"),
        ),
    }
}

/// Both addresses in one family, without scope or flow.
fn same_family(client: SocketAddr, local: SocketAddr) -> (SocketAddr, SocketAddr) {
    match (client.ip().to_canonical(), local.ip().to_canonical()) {
        (a @ IpAddr::V4(_), b @ IpAddr::V4(_)) | (a @ IpAddr::V6(_), b @ IpAddr::V6(_)) => {
            (SocketAddr::new(a, client.port()), SocketAddr::new(b, local.port()))
        }
        (a, b) => (SocketAddr::new(mapped(a), client.port()), SocketAddr::new(mapped(b), local.port())),
    }
}

fn mapped(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        IpAddr::V6(_) => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(protocol: ProxyProtocol, client: &str, local: &str, expected: &[u8]) {
        let header = proxy_header(protocol, client.parse().unwrap(), local.parse().unwrap()).unwrap();
        assert_eq!(header, expected, "{}", String::from_utf8_lossy(&header));
    }

    const V2_TCP4: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c";
    const V2_TCP6: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\x00\x24";

    #[test]
    fn v1_ipv4() {
        check(
            ProxyProtocol::V1,
            "192.0.2.7:50123",
            "198.51.100.1:25",
            b"PROXY TCP4 192.0.2.7 198.51.100.1 50123 25\r\n",
        );
    }

    #[test]
    fn v1_ipv6() {
        check(
            ProxyProtocol::V1,
            "[2001:db8::7]:50123",
            "[2001:db8::1]:25",
            b"PROXY TCP6 2001:db8::7 2001:db8::1 50123 25\r\n",
        );
    }

    #[test]
    fn v1_extreme_ports() {
        check(
            ProxyProtocol::V1,
            "0.0.0.0:0",
            "255.255.255.255:65535",
            b"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n",
        );
    }

    #[test]
    fn v1_longest_is_within_the_specifications_limit() {
        let ip = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        let address: SocketAddr = format!("[{ip}]:65535").parse().unwrap();
        let header = proxy_header(ProxyProtocol::V1, address, address).unwrap();
        assert_eq!(header, format!("PROXY TCP6 {ip} {ip} 65535 65535\r\n").into_bytes());
        assert!(header.len() <= 107, "{}", header.len());
    }

    #[test]
    fn v2_ipv4() {
        let expected = [V2_TCP4, &[192, 0, 2, 7, 198, 51, 100, 1, 0xc3, 0xcb, 0, 25]].concat();
        check(ProxyProtocol::V2, "192.0.2.7:50123", "198.51.100.1:25", &expected);
    }

    #[test]
    fn v2_ipv6() {
        let source = [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
        let destination = [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let expected = [V2_TCP6, &source, &destination, &[0xc3, 0xcb, 0x03, 0xe1]].concat();
        check(ProxyProtocol::V2, "[2001:db8::7]:50123", "[2001:db8::1]:993", &expected);
    }

    #[test]
    fn v4_mapped_addresses_become_ipv4() {
        let plain = proxy_header(
            ProxyProtocol::V1,
            "192.0.2.7:1".parse().unwrap(),
            "198.51.100.1:25".parse().unwrap(),
        );
        check(ProxyProtocol::V1, "[::ffff:192.0.2.7]:1", "[::ffff:198.51.100.1]:25", &plain.unwrap());
    }

    #[test]
    fn a_mixed_pair_becomes_ipv6_and_never_unknown() {
        let header = proxy_header(
            ProxyProtocol::V1,
            "192.0.2.7:1".parse().unwrap(),
            "[2001:db8::1]:25".parse().unwrap(),
        );
        let header = String::from_utf8(header.unwrap()).unwrap();
        assert_eq!(header, "PROXY TCP6 ::ffff:192.0.2.7 2001:db8::1 1 25\r\n");
        let header = proxy_header(
            ProxyProtocol::V2,
            "[2001:db8::1]:25".parse().unwrap(),
            "192.0.2.7:1".parse().unwrap(),
        );
        assert_eq!(header.unwrap()[..16], *V2_TCP6);
    }

    #[test]
    fn a_scope_is_dropped() {
        check(
            ProxyProtocol::V1,
            "[fe80::7%3]:50123",
            "[fe80::1%3]:25",
            b"PROXY TCP6 fe80::7 fe80::1 50123 25\r\n",
        );
    }

    #[test]
    fn local_is_what_the_library_makes_of_it() {
        let made = v2::Builder::new(
            v2::Version::Two | v2::Command::Local,
            v2::AddressFamily::Unspecified | v2::Protocol::Unspecified,
        );
        assert_eq!(made.build().unwrap(), LOCAL);
        let parsed = v2::Header::try_from(&LOCAL[..]).unwrap();
        assert_eq!((parsed.command, parsed.length()), (v2::Command::Local, 0));
    }

    #[test]
    fn off_is_no_header() {
        assert_eq!(
            proxy_header(ProxyProtocol::Off, "192.0.2.7:1".parse().unwrap(), "192.0.2.8:2".parse().unwrap()),
            None
        );
    }
}

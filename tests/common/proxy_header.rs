//! PROXY headers by hand, after the specification and apart from the crate's own code, which it is
//! to check.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};

const V2_SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const V1_LONGEST: usize = 107;

/// The two ends of a connection, as somebody took them out of a PROXY header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

impl Seen {
    /// Reads `SOURCE PORT DESTINATION PORT`, as our HAProxy and nginx write it.
    pub fn parse(text: &str) -> Option<Seen> {
        let fields: Vec<&str> = text.split_whitespace().collect();
        let [source, source_port, destination, destination_port] = fields[..] else { return None };
        Some(Seen {
            source: address(source, source_port)?,
            destination: address(destination, destination_port)?,
        })
    }
}

fn address(ip: &str, port: &str) -> Option<SocketAddr> {
    Some(SocketAddr::new(ip.parse().ok()?, port.parse().ok()?))
}

/// A v1 header. Both addresses must be of one family.
pub fn v1(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
    assert_eq!(source.is_ipv4(), destination.is_ipv4(), "one family");
    let (from, to) = (source.ip(), destination.ip());
    format!("PROXY {family} {from} {to} {} {}\r\n", source.port(), destination.port()).into_bytes()
}

/// A v2 header with the PROXY command and no TLVs. Both addresses must be of one family.
pub fn v2(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let (family, addresses) = match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (0x11, [from.octets(), to.octets()].concat()),
        (IpAddr::V6(from), IpAddr::V6(to)) => (0x21, [from.octets(), to.octets()].concat()),
        _ => panic!("one family"),
    };
    let ports = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
    let length = u16::try_from(addresses.len() + ports.len()).expect("at most 36");
    [&V2_SIGNATURE[..], &[0x21, family], &length.to_be_bytes(), &addresses, &ports].concat()
}

/// The v2 header of a health check: LOCAL, without addresses.
pub fn v2_local() -> Vec<u8> {
    [&V2_SIGNATURE[..], &[0x20, 0, 0, 0]].concat()
}

/// Reads exactly one header of either version from a stream, and not a byte more. The bytes are as
/// they came.
pub fn read(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut header = vec![0; V2_SIGNATURE.len()];
    stream.read_exact(&mut header)?;
    if header == V2_SIGNATURE {
        let fixed = read_more(stream, &mut header, 4)?;
        let length = u16::from_be_bytes([fixed[2], fixed[3]]);
        read_more(stream, &mut header, length.into())?;
        return Ok(header);
    }
    if !header.starts_with(b"PROXY ") {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("no PROXY header: {}", header.escape_ascii()),
        ));
    }
    while !header.ends_with(b"\r\n") && header.len() < V1_LONGEST {
        read_more(stream, &mut header, 1)?;
    }
    Ok(header)
}

fn read_more(stream: &mut impl Read, header: &mut Vec<u8>, count: usize) -> io::Result<Vec<u8>> {
    let mut more = vec![0; count];
    stream.read_exact(&mut more)?;
    header.extend_from_slice(&more);
    Ok(more)
}

/// What a header says; none for LOCAL, for UNKNOWN and for what is no header.
pub fn decode(header: &[u8]) -> Option<Seen> {
    if let Some(rest) = header.strip_prefix(&V2_SIGNATURE) {
        return decode_v2(rest);
    }
    let line = std::str::from_utf8(header).ok()?.strip_suffix("\r\n")?;
    let fields: Vec<&str> = line.split(' ').collect();
    let ["PROXY", family, from, to, from_port, to_port] = fields[..] else { return None };
    let seen = Seen { source: address(from, from_port)?, destination: address(to, to_port)? };
    let v4 = family == "TCP4";
    (seen.source.is_ipv4() == v4 && seen.destination.is_ipv4() == v4 && (v4 || family == "TCP6"))
        .then_some(seen)
}

/// Version and command, family, length, addresses; TLVs after them are passed over.
fn decode_v2(rest: &[u8]) -> Option<Seen> {
    let (&[command, family, _, _], addresses) = rest.split_first_chunk::<4>()?;
    let pair = |size: usize| {
        Some((addresses.get(..size)?, addresses.get(size..2 * size)?, addresses.get(2 * size..)?))
    };
    let (source, destination, ports): (IpAddr, IpAddr, &[u8]) = match (command, family) {
        (0x21, 0x11) => {
            let (from, to, ports) = pair(4)?;
            (<[u8; 4]>::try_from(from).ok()?.into(), <[u8; 4]>::try_from(to).ok()?.into(), ports)
        }
        (0x21, 0x21) => {
            let (from, to, ports) = pair(16)?;
            (<[u8; 16]>::try_from(from).ok()?.into(), <[u8; 16]>::try_from(to).ok()?.into(), ports)
        }
        _ => return None,
    };
    let &[a, b, c, d] = ports.first_chunk::<4>()?;
    Some(Seen {
        source: SocketAddr::new(source, u16::from_be_bytes([a, b])),
        destination: SocketAddr::new(destination, u16::from_be_bytes([c, d])),
    })
}

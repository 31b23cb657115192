//! Finds addresses that cannot all be bound: the same one twice, or one and the wildcard of its
//! family and port.
//!
//! Invariant: linear in the number of addresses, so that a file full of them stays quick to refuse.
//! `[::]` listeners are IPv6 only and so never clash with an IPv4 address; port 0 (any free port)
//! clashes with nothing.
//!
//! Deliberately not here: ports that other programs use. Only binding can find those.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, SocketAddr};

use super::mistakes::{Mistakes, Place};

/// An address that a listener or the admin listener wants to bind.
#[derive(Clone)]
pub(super) struct Claim {
    pub address: SocketAddr,
    /// The address for messages, as the file has it.
    pub shown: String,
    pub place: Place,
    /// Whose address it is: `listener[2]` or `admin`.
    pub owner: String,
}

impl Claim {
    /// An address that is not in the file.
    pub fn by_default(address: SocketAddr, place: Place, owner: String) -> Claim {
        Claim { address, shown: format!("the default {address}"), place, owner }
    }
}

/// Reports every claim that an earlier one makes impossible.
pub(super) fn report_clashes(claims: &[Claim], mistakes: &mut Mistakes) {
    // By port and family: the first claim of all, and the first claim with the wildcard address.
    let mut first: HashMap<(u16, bool), &Claim> = HashMap::new();
    let mut wildcard: HashMap<(u16, bool), &Claim> = HashMap::new();
    let mut exact: HashMap<(u16, IpAddr), &Claim> = HashMap::new();
    for claim in claims.iter().filter(|claim| claim.address.port() != 0) {
        let (ip, port) = (claim.address.ip(), claim.address.port());
        let group = (port, ip.is_ipv6());
        let earlier = match exact.entry((port, ip)) {
            Entry::Occupied(same) => Some(*same.get()),
            Entry::Vacant(vacant) => {
                vacant.insert(claim);
                if ip.is_unspecified() { first.get(&group) } else { wildcard.get(&group) }.copied()
            }
        };
        if let Some(earlier) = earlier {
            report(claim, earlier, mistakes);
        }
        first.entry(group).or_insert(claim);
        if ip.is_unspecified() {
            wildcard.entry(group).or_insert(claim);
        }
    }
}

fn report(claim: &Claim, earlier: &Claim, mistakes: &mut Mistakes) {
    let line = earlier.place.at.on_line();
    let of = if earlier.owner == claim.owner { String::new() } else { format!(" of {}", earlier.owner) };
    let (shown, other) = (&claim.shown, &earlier.shown);
    mistakes.add(
        &claim.place,
        &format!("{shown} clashes with {other}{of}{line}; expected an address still free"),
    );
}

//! What to set in a mail server so that it takes the PROXY header from this edge.

use std::net::IpAddr;

/// One line for the operator of a mailbox that takes the header for commands:
/// what to set there, so that it trusts this edge and nobody else.
pub fn advice(tailnet_addresses: &[IpAddr]) -> String {
    let mut networks: Vec<String> = tailnet_addresses.iter().map(network).collect();
    if networks.is_empty() {
        networks.push("EDGE_TAILNET_ADDRESS".to_owned()); // the advice is useful without the address too
    }
    format!(
        "let the mail server take the PROXY protocol from {listed}; \
         Stalwart 0.15: server.listener.<id>.proxy.override = true and \
         server.listener.<id>.proxy.trusted-networks = {networks:?}, or server.proxy.trusted-networks for every \
         listener; Stalwart 0.16: overrideProxyTrustedNetworks of the listener (Settings, Network, Listeners), \
         or proxyTrustedNetworks of the system settings for every listener; \
         Postfix: -o smtpd_upstream_proxy_protocol=haproxy for the port in master.cf, or \
         postscreen_upstream_proxy_protocol = haproxy in main.cf where postscreen has the port; \
         Dovecot: haproxy = yes in the inet_listener, and haproxy_trusted_networks = {spaced}",
        listed = networks.join(" and "),
        spaced = networks.join(" "),
    )
}

/// The network of one address alone.
fn network(address: &IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(v4) => format!("{v4}/32"),
        IpAddr::V6(v6) => format!("{v6}/128"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advice_names_every_setting_and_the_exact_addresses() {
        let advice = advice(&["100.64.0.7".parse().unwrap(), "fd7a:115c:a1e0::7".parse().unwrap()]);
        for part in [
            "from 100.64.0.7/32 and fd7a:115c:a1e0::7/128; ",
            "server.listener.<id>.proxy.override = true",
            r#"server.listener.<id>.proxy.trusted-networks = ["100.64.0.7/32", "fd7a:115c:a1e0::7/128"]"#,
            "server.proxy.trusted-networks",
            "overrideProxyTrustedNetworks",
            "proxyTrustedNetworks",
            "-o smtpd_upstream_proxy_protocol=haproxy",
            "postscreen_upstream_proxy_protocol = haproxy",
            "haproxy = yes",
            "haproxy_trusted_networks = 100.64.0.7/32 fd7a:115c:a1e0::7/128",
        ] {
            assert!(advice.contains(part), "{part}: {advice}");
        }
        assert!(!advice.contains('\n'));
    }

    #[test]
    fn without_an_address_the_advice_has_a_gap_to_fill() {
        assert!(advice(&[]).contains("haproxy_trusted_networks = EDGE_TAILNET_ADDRESS"));
    }
}

//! The page at `/` in a real browser: readable without script, in light and dark, on a telephone; it
//! shows what `/status` says, and what others say cannot become anything but text.
//!
//! The pictures are in cargo's directory for test files, for people to look at.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;

use tailwart_edge::admin::status::Status;

use crate::common::chromium::{View, look, measure};
use crate::common::edge::{Builder, Edge, Listener};
use crate::common::http;
use crate::common::net::{client_from, connect, echoes, free_addr};
use crate::common::sink::{Taken, takes_mail};
use crate::common::stub::{self, Stub};
use crate::common::wait::eventually;
use crate::setup::{LIMIT, Setup, becomes, holds, start_with, without_probe};

/// What a mailbox may say; a browser must neither run nor load any of it.
const HOSTILE: &str = "<script>document.title='owned'</script><img src=http://127.0.0.1:9/x> \"'&";

const WIDE: View = View { width: 1280, height: 1500, dark: false, script: true };

/// The least contrast of text that people can be asked to read (WCAG 2, level AA).
const LEGIBLE: f64 = 4.5;

fn picture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("page-{name}.png"))
}

fn url(edge: &Edge) -> String {
    format!("http://{}/", edge.addr("admin"))
}

fn status(edge: &Edge) -> Status {
    let body = http::get(edge.addr("admin"), "/status").body;
    serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}"))
}

/// An edge with something of everything: a mailbox that is well and one that is not, sessions, clients
/// that are held, failures.
struct Busy {
    setup: Setup,
    _clients: Vec<TcpStream>,
    _stubs: [Stub; 2],
}

fn busy() -> Busy {
    let hostile = Stub::start(takes_mail(HOSTILE, &Taken::default()));
    let echo = Stub::start(stub::echo_after_header);
    let gone: SocketAddr = free_addr();
    let listeners = [
        Listener::new("smtp", "smtp", 25),
        Listener::new("submissions", "submissions", 465).set("hold", r#""1s""#),
        Listener::new("imaps", "imaps", 993),
        Listener::new("web", "tcp", 443),
    ];
    let forwards = [(25, hostile.addr), (465, gone), (993, gone), (443, echo.addr)];
    let setup = start_with(&forwards, &listeners, |edge: Builder| {
        edge.set("probe", "interval", r#""500ms""#).set("probe", "fall", "1")
    });
    let edge = &setup.edge;
    let failed = connect(edge.addr("submissions"));
    (&failed).read_to_end(&mut Vec::new()).expect("an orderly end");
    let mut clients: Vec<TcpStream> = (0..3).map(|_| echoes(edge.addr("web"))).collect();
    clients.push(client_from("127.0.0.7", edge.addr("smtp")));
    clients.extend((0..2).map(|_| client_from("127.0.0.8", edge.addr("imaps"))));
    holds(edge, 2);
    becomes(edge, 200, r#""ready":true"#);
    let is_known = || {
        let status = status(edge);
        let probed = status.upstreams.iter().all(|upstream| upstream.probe.probed.is_some());
        probed && status.upstreams.iter().any(|upstream| upstream.path.is_some())
    };
    assert!(eventually(LIMIT, is_known), "{}", edge.log().tail());
    Busy { setup, _clients: clients, _stubs: [hostile, echo] }
}

#[test]
fn it_shows_what_the_status_says_and_asks_for_nothing() {
    let busy = busy();
    let edge = &busy.setup.edge;
    let seen = look(&url(edge), WIDE, &picture("light"));
    assert_eq!(seen.console, Vec::<String>::new());
    // More than one load is not wanted by the page in this time; each is of itself.
    assert!(!seen.requests.is_empty() && seen.requests.iter().all(|asked| *asked == url(edge)), "{seen:?}");

    let status = status(edge);
    let shown = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let mut expected = vec![status.node.name.clone(), ">ready<".into(), status.version.clone()];
    expected.extend(status.warnings.iter().map(|warning| shown(warning)));
    for listener in &status.listeners {
        expected.extend([listener.name.clone(), listener.upstream.clone()]);
        expected.extend(listener.addresses.iter().map(ToString::to_string));
    }
    expected.extend(status.connections.iter().map(|connection| connection.client.to_string()));
    expected.extend(status.failures.iter().flat_map(|failure| [failure.end.clone(), shown(&failure.why)]));
    expected.extend(status.clients.iter().map(|client| client.client.to_string()));
    assert_eq!((status.open, status.held, status.failures.len()), (6, 2, 1), "{status:?}");
    for text in expected {
        assert!(seen.dom.contains(&text), "{text:?} is missing from:\n{}", seen.dom);
    }
    // As text, and neither as an element nor as a deed.
    assert!(
        seen.dom.contains("220 &lt;script&gt;document.title='owned'&lt;/script&gt;&lt;img src="),
        "{}",
        seen.dom
    );
    assert!(
        !seen.dom.contains("<script") && !seen.dom.contains("<img") && !seen.dom.contains("<title>owned")
    );

    let plain = look(&url(edge), View { script: false, ..WIDE }, &picture("without-script"));
    assert_eq!(plain.console, Vec::<String>::new());
    assert!(plain.dom.contains(">ready<") && plain.dom.contains("127.0.0.8:"), "{}", plain.dom);
    let dark = look(&url(edge), View { dark: true, ..WIDE }, &picture("dark"));
    assert_eq!(dark.console, Vec::<String>::new());
}

#[test]
fn it_is_legible_in_light_and_dark_and_fits_a_telephone() {
    let busy = busy();
    let html = http::get(busy.setup.edge.addr("admin"), "/").body;
    for (width, height) in [(360, 1800), (768, 1400), (1280, 1300)] {
        for dark in [false, true] {
            let name = format!("{width}-{}", if dark { "dark" } else { "light" });
            let measured = measure(&html, width, height, dark, &picture(&name));
            assert!(measured.texts > 100, "{name}: {measured:?}");
            assert_eq!(measured.overflow, 0, "{name}: {measured:?}");
            assert!(measured.least_contrast >= LEGIBLE, "{name}: {measured:?}");
        }
    }
}

#[test]
fn its_figures_are_those_of_the_moment() {
    let echo = Stub::start(stub::echo_after_header);
    let listener = Listener::new("web", "tcp", 2525);
    let Setup { edge, tailnet } = start_with(&[(2525, echo.addr)], &[listener], without_probe);
    let open = |count: usize| format!("<dt>connections</dt><dd>{count}</dd>");
    let before = look(&url(&edge), WIDE, &picture("idle"));
    assert!(before.dom.contains(&open(0)) && before.dom.contains(">ready<"), "{}", before.dom);
    let _client = echoes(edge.addr("web"));
    tailnet.set_tags(crate::setup::EDGE, &["tag:other"]);
    becomes(&edge, 503, "the node does not hold");
    let after = look(&url(&edge), WIDE, &picture("not-ready"));
    assert!(after.dom.contains(&open(1)) && after.dom.contains(">not ready<"), "{}", after.dom);
    assert!(after.dom.contains("the node does not hold tag:reverse-proxy"), "{}", after.dom);
}

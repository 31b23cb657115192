//! The smallest program that uses tailwart-edge as a library: it joins a tailnet, opens a stream to a
//! peer, and prints what the peer sends first.
//!
//!     TS_AUTHKEY=tskey-auth-... cargo run --example embed -- ./state stalwart 25
//!
//! The directory keeps the node's identity, so a second start needs no key. The key has to carry the
//! default tag, `tag:reverse-proxy`. With `TS_CONTROL_URL` it joins a Headscale. A mailbox that
//! demands a PROXY header does not greet without one: see `tailwart_edge::protocol::proxy_header`.

use std::error::Error;

use tailwart_edge::config::{self, Config};
use tailwart_edge::tailnet::credential::Sources;
use tailwart_edge::tailnet::{JoinError, Node, forget_environment};
use tokio::io::AsyncReadExt;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [state_dir, host, port] = &arguments[..] else {
        return Err("usage: embed STATE_DIR HOST PORT".into());
    };
    let environment = |name: &str| std::env::var(name).ok();
    let sources = Sources::capture(&environment, None);

    let mut settings = Config::without_file(Some(host), &environment)?.tailnet;
    settings.state_dir = state_dir.into();
    settings.hostname = "tailwart-embed".into();

    // Otherwise Tailscale itself would take a key from the environment. Changing the environment is safe
    // only while there is a single thread, so this comes before the runtime.
    forget_environment();
    let runtime = tokio::runtime::Runtime::new()?;
    print!("{}", runtime.block_on(greeting(settings, sources, host, port.parse()?))?);
    Ok(())
}

/// Joins, connects to a port of a peer, and reads what the peer sends first.
async fn greeting(
    settings: config::Tailnet,
    sources: Sources,
    host: &str,
    port: u16,
) -> Result<String, Box<dyn Error>> {
    let node = Node::start(&settings)?;
    match node.up(settings.join_timeout).await {
        // The first time: enrol with the credential of the environment.
        Err(JoinError::NotEnrolled { .. }) => {
            let credential = sources.read()?.ok_or_else(|| node.not_enrolled())?;
            node.enrol(&credential, settings.join_timeout).await?;
        }
        outcome => outcome?,
    }
    // A `TailnetStream` is an `AsyncRead` and `AsyncWrite`.
    let mut stream = node.connect(host, port).await?;
    let mut buffer = [0; 512];
    let count = stream.read(&mut buffer).await?;
    // The stream is closed before the node, so that the peer sees an orderly end.
    drop(stream);
    node.close().await;
    Ok(String::from_utf8_lossy(&buffer[..count]).into_owned())
}

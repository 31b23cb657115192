//! The least that uses tailwart-edge as a library: join a tailnet, open a stream to a peer, and
//! print what it says first.
//!
//!     TS_AUTHKEY=tskey-auth-... cargo run --example embed -- ./state stalwart 25
//!
//! The directory keeps the node's identity, so a second start needs no key. The key has to carry the
//! default tag, `tag:reverse-proxy`. With `TS_CONTROL_URL` it joins a Headscale. A mailbox that
//! demands a PROXY header greets nobody without: see `tailwart_edge::protocol::proxy_header`.

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

    // Tailscale would take a key from there by itself. Only safe while there is a single thread, so
    // before the runtime.
    forget_environment();
    let runtime = tokio::runtime::Runtime::new()?;
    print!("{}", runtime.block_on(greeting(settings, sources, host, port.parse()?))?);
    Ok(())
}

/// Joins, and reads what a port of a peer sends before it is spoken to.
async fn greeting(
    settings: config::Tailnet,
    sources: Sources,
    host: &str,
    port: u16,
) -> Result<String, Box<dyn Error>> {
    let node = Node::start(&settings)?;
    match node.up(settings.join_timeout).await {
        // The first time: with what the environment has.
        Err(JoinError::NotEnrolled { .. }) => {
            let credential = sources.read()?.ok_or_else(|| node.not_enrolled())?;
            node.enrol(&credential, settings.join_timeout).await?;
        }
        outcome => outcome?,
    }
    // A `TailnetStream` is an `AsyncRead` and `AsyncWrite` as any other.
    let mut stream = node.connect(host, port).await?;
    let mut buffer = [0; 512];
    let count = stream.read(&mut buffer).await?;
    // Closed before the node, so that the peer sees an orderly end.
    drop(stream);
    node.close().await;
    Ok(String::from_utf8_lossy(&buffer[..count]).into_owned())
}

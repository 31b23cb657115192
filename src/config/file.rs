//! Reads the file, or says in one sentence why not.
//!
//! Invariant: however large the file is, at most 64 KiB of it are held.
//!
//! Deliberately not here: anything about the text.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use super::mistakes::At;

/// The largest file read. Five hundred listeners fit; what is larger is another
/// file.
const MAX_BYTES: u64 = 64 * 1024;

/// The text of the file, or what is wrong with it and where.
pub(super) fn read(path: &Path) -> Result<String, (At, String)> {
    let bytes = read_bytes(path).map_err(|problem| (At::File, problem))?;
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..offset].iter().filter(|byte| **byte == b'\n').count();
        let byte = error.as_bytes()[offset];
        (At::Line(line), format!("not UTF-8: byte 0x{byte:02X} at offset {offset}; save the file as UTF-8"))
    })
}

fn read_bytes(path: &Path) -> Result<Vec<u8>, String> {
    let file = File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            "no such file; check --config or TAILWART_CONFIG, or leave both out".to_owned()
        }
        _ => format!("cannot open the file: {error}"),
    })?;
    let metadata = file.metadata().map_err(|error| format!("cannot examine the file: {error}"))?;
    if metadata.is_dir() {
        return Err("is a directory; expected a TOML file".to_owned());
    }
    if metadata.len() > MAX_BYTES {
        return Err(format!("has {} bytes; expected at most {MAX_BYTES} (64 KiB)", metadata.len()));
    }
    // The length of a pipe (`--config <(...)`) or a device is not known beforehand, so reading is
    // bounded as well.
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot read the file: {error}"))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("has more than {MAX_BYTES} bytes; expected at most that (64 KiB)"));
    }
    Ok(bytes)
}

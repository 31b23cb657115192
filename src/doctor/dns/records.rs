//! What single records of the DNS hold.

use hickory_resolver::proto::rr::{Name, RData, Record};

pub(super) fn mail_exchange(record: &Record) -> Option<(u16, &Name)> {
    match &record.data {
        RData::MX(mx) => Some((mx.preference, &mx.exchange)),
        _ => None,
    }
}

pub(super) fn pointer(record: &Record) -> Option<String> {
    match &record.data {
        RData::PTR(name) => Some(plain(&name.0)),
        _ => None,
    }
}

pub(super) fn text(record: &Record) -> Option<String> {
    match &record.data {
        RData::TXT(txt) => Some(String::from_utf8_lossy(&txt.txt_data.concat()).into_owned()),
        _ => None,
    }
}

/// A name in lower case, without the dot at the end.
pub(super) fn plain(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}

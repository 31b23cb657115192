//! Walks the tables of a file, noting where every value stands.
//!
//! Invariants: every key asked for counts as known, and [`Table::finish`] reports all others, so
//! the list of allowed keys in a message cannot differ from what is read; a wrong value is reported
//! once, here, and reads as absent. Tables and list items are counted from 1: `listener[1]` is the first
//! `[[listener]]` of the file.
//!
//! Deliberately not here: what the keys are and what their values mean (see `sections`,
//! `listeners`, `values`).

use std::ops::{Range, RangeInclusive};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::mistakes::{At, Mistakes, Place, key_shown, quoted, shown};
use super::values::{Kind, substitute};

/// Keys that people try, and where the setting really is.
const ELSEWHERE: [(&str, &str, &str); 12] = [
    ("tailnet", "auth_key", "set auth_key_file here or TS_AUTHKEY in the environment"),
    ("tailnet", "authkey", "set auth_key_file here or TS_AUTHKEY in the environment"),
    ("upstream", "port", "set upstream_port of a [[listener]]"),
    ("upstream", "connect_timeout", "set timeouts.connect"),
    ("upstream", "idle_timeout", "set idle_timeout of a [[listener]]"),
    ("timeouts", "idle", "set idle_timeout of a [[listener]]"),
    ("upstream", "hosts", "set host to one host or to an array of them"),
    ("limits", "hold", "set timeouts.hold, and limits.hold_max"),
    ("timeouts", "join", "set tailnet.join_timeout"),
    ("listener", "port", "set listen and upstream_port"),
    ("listener", "host", "set upstream"),
    ("", "listeners", "write [[listener]] before each one"),
];

/// One table of the file, or the place where one may be.
pub(super) struct Table<'t> {
    entries: Option<&'t DeTable<'t>>,
    place: Place,
    known: Vec<&'static str>,
}

/// A value together with where and how it was written.
pub(super) struct Found<T> {
    pub value: T,
    pub place: Place,
    /// The value as the file has it, ready for a message.
    pub shown: String,
}

impl<'t> Table<'t> {
    pub fn root(entries: &'t DeTable<'t>) -> Table<'t> {
        Table { entries: Some(entries), place: Place { at: At::File, key: String::new() }, known: Vec::new() }
    }

    /// Where `key` of this table is, or where it is missing: on the line of the table's head.
    pub fn place(&self, key: &str) -> Place {
        let key =
            if self.place.key.is_empty() { key.to_owned() } else { format!("{}.{key}", self.place.key) };
        Place { at: self.place.at, key }
    }

    /// Whether the file has the key, with a good value or not. Makes it known.
    pub fn has(&mut self, key: &'static str) -> bool {
        self.raw(key).is_some()
    }

    /// This table's own key path.
    pub fn path(&self) -> &str {
        &self.place.key
    }

    /// Whether the key's value is an array. Makes the key known.
    pub fn is_array(&mut self, key: &'static str) -> bool {
        self.raw(key).is_some_and(|value| value.get_ref().is_array())
    }

    /// A string of the given kind.
    pub fn get<T>(&mut self, key: &'static str, kind: &Kind<T>, mistakes: &mut Mistakes) -> Option<Found<T>> {
        let value = self.raw(key)?;
        string(value, self.place(key), kind, mistakes)
    }

    /// An array of strings of the given kind; an empty one is a mistake. Good items are returned
    /// without the bad.
    pub fn list<T>(
        &mut self,
        key: &'static str,
        kind: &Kind<T>,
        mistakes: &mut Mistakes,
    ) -> Option<Vec<Found<T>>> {
        let value = self.raw(key)?;
        let mut place = self.place(key);
        place.at = mistakes.line(&value.span());
        let expected = kind.expected;
        let Some(items) = value.get_ref().as_array() else {
            let found = scalar(value, mistakes.text);
            mistakes
                .add(&place, &format!("{found} is not an array; expected an array of strings: {expected}"));
            return None;
        };
        if items.is_empty() {
            mistakes.add(&place, &format!("empty; expected at least one string: {expected}"));
        }
        Some(items.iter().filter_map(|item| string(item, place.clone(), kind, mistakes)).collect())
    }

    /// A whole number within `range`; `what` names it for the message.
    pub fn number(
        &mut self,
        key: &'static str,
        range: RangeInclusive<u32>,
        what: &str,
        mistakes: &mut Mistakes,
    ) -> Option<u32> {
        let value = self.raw(key)?;
        let mut place = self.place(key);
        place.at = mistakes.line(&value.span());
        let found = scalar(value, mistakes.text);
        let problem = match value.get_ref() {
            DeValue::Integer(number) => {
                match u32::from_str_radix(number.as_str(), number.radix()).ok().filter(|n| range.contains(n))
                {
                    Some(number) => return Some(number),
                    None => format!("{found} is out of range"),
                }
            }
            other => format!("{found} is {}", type_name(other)),
        };
        mistakes
            .add(&place, &format!("{problem}; expected {what} from {} to {}", range.start(), range.end()));
        None
    }

    /// `true` or `false`.
    pub fn switch(&mut self, key: &'static str, mistakes: &mut Mistakes) -> Option<bool> {
        let value = self.raw(key)?;
        if let DeValue::Boolean(on) = value.get_ref() {
            return Some(*on);
        }
        let place = Place { at: mistakes.line(&value.span()), ..self.place(key) };
        let (found, kind) = (scalar(value, mistakes.text), type_name(value.get_ref()));
        mistakes.add(&place, &format!("{found} is {kind}; expected true or false, without quotes"));
        None
    }

    /// A table below this one; an absent one reads as empty.
    pub fn table(&mut self, key: &'static str, mistakes: &mut Mistakes) -> Table<'t> {
        let mut place = self.place(key);
        let mut entries = None;
        if let Some(value) = self.raw(key) {
            place.at = mistakes.line(&value.span());
            entries = value.get_ref().as_table();
            if entries.is_none() {
                let found = type_name(value.get_ref());
                mistakes.add(&place, &format!("{found}; expected a table, written [{}]", place.key));
            }
        }
        Table { entries, place, known: Vec::new() }
    }

    /// An array of tables, `None` if absent.
    pub fn tables(&mut self, key: &'static str, mistakes: &mut Mistakes) -> Option<Vec<Table<'t>>> {
        let value = self.raw(key)?;
        let mut place = self.place(key);
        place.at = mistakes.line(&value.span());
        let items = value.get_ref().as_array().map(|items| &items[..]).unwrap_or_default();
        if items.is_empty() {
            let found =
                if value.get_ref().is_array() { "an empty array" } else { type_name(value.get_ref()) };
            mistakes.add(
                &place,
                &format!("{found}; expected tables, each written [[{0}]] in double brackets", place.key),
            );
        }
        let tables = items.iter().enumerate().filter_map(|(index, item)| {
            let at = mistakes.line(&item.span());
            let place = Place { at, key: format!("{}[{}]", place.key, index + 1) };
            let entries = item.get_ref().as_table();
            if entries.is_none() {
                mistakes.add(&place, &format!("{}; expected a table", type_name(item.get_ref())));
                return None;
            }
            Some(Table { entries, place, known: Vec::new() })
        });
        Some(tables.collect())
    }

    /// Reports the keys nobody asked for.
    pub fn finish(self, mistakes: &mut Mistakes) {
        for (key, _) in self.entries.into_iter().flat_map(|entries| entries.iter()) {
            let name: &str = key.get_ref();
            if self.known.contains(&name) {
                continue;
            }
            let place = Place { at: mistakes.line(&key.span()), ..self.place(&key_shown(name)) };
            let advice = self.advice(name).map(|advice| format!(" ({advice})")).unwrap_or_default();
            let known = self.known.join(", ");
            mistakes.add(&place, &format!("unknown key{advice}; allowed here: {known}"));
        }
    }

    /// What was probably meant by an unknown key.
    fn advice(&self, key: &str) -> Option<String> {
        let table = self.place.key.split('[').next().unwrap_or_default();
        if let Some((_, _, advice)) = ELSEWHERE.iter().find(|(t, k, _)| (*t, *k) == (table, key)) {
            return Some((*advice).to_owned());
        }
        // Comparing is quadratic in the length, and a key much longer than ours is no slip of one.
        if key.len() > 32 {
            return None;
        }
        let near = self.known.iter().map(|known| (strsim::osa_distance(known, key), known));
        let (distance, nearest) = near.min()?;
        (distance <= 1 + nearest.len() / 4).then(|| format!("did you mean {nearest}?"))
    }

    fn raw(&mut self, key: &'static str) -> Option<&'t Spanned<DeValue<'t>>> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        self.entries?.get(key)
    }
}

/// The string in `value` with its variables replaced, understood as `kind`.
fn string<T>(
    value: &Spanned<DeValue>,
    mut place: Place,
    kind: &Kind<T>,
    mistakes: &mut Mistakes,
) -> Option<Found<T>> {
    place.at = mistakes.line(&value.span());
    let Some(written) = value.get_ref().as_str() else {
        let found = scalar(value, mistakes.text);
        let kind_found = type_name(value.get_ref());
        mistakes.add(&place, &format!("{found} is {kind_found}; expected a string: {}", kind.expected));
        return None;
    };
    let shown = quoted(written);
    let text = match substitute(written, mistakes.env) {
        Ok(text) => text,
        Err(problems) => {
            for problem in problems {
                mistakes.add(&place, &format!("{shown} {problem}"));
            }
            return None;
        }
    };
    match (kind.parse)(&text) {
        Ok(value) => Some(Found { value, place, shown }),
        Err(problem) => {
            let replaced = if text == written { "" } else { " with its variables replaced" };
            mistakes.add(&place, &format!("{shown}{replaced} {problem}; expected {}", kind.expected));
            None
        }
    }
}

/// A value for a message as the file has it; arrays and tables may be long, so only their type is
/// told.
fn scalar(value: &Spanned<DeValue>, text: &str) -> String {
    let span: Range<usize> = value.span();
    match value.get_ref() {
        DeValue::String(written) => quoted(written),
        DeValue::Array(_) => "[...]".to_owned(),
        DeValue::Table(_) => "{...}".to_owned(),
        _ => shown(text.get(span).unwrap_or_default()),
    }
}

fn type_name(value: &DeValue) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

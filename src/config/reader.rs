//! Reads the tables of a file, and remembers the line of every value.
//!
//! Invariants: every key that is asked for counts as known, and [`Table::finish`] reports all others. So the list
//! of allowed keys in a message is always the list of keys that are read. A wrong value is reported once, here,
//! and is then treated as absent. Tables are counted from 1: `listener[1]` is the first `[[listener]]` of the file.
//!
//! Deliberately not here: what the keys are and what their values mean (see `sections`,
//! `listeners`, `values`).

use std::borrow::Cow;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Env;
use super::keys::Key;
use super::mistakes::{At, Mistakes, Place, key_shown, quoted, shown};
use super::values::{Takes, substitute};

/// Wrong keys that people try (table and key), and the advice for each.
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

/// A valid value, with its place and the text as written.
pub(super) struct Found<T> {
    pub value: T,
    pub place: Place,
    /// The value as the file has it, ready for a message.
    pub shown: String,
}

impl<T> Found<T> {
    pub fn value(self) -> T {
        self.value
    }
}

impl<'t> Table<'t> {
    pub fn root(entries: &'t DeTable<'t>) -> Table<'t> {
        Table { entries: Some(entries), place: Place { at: At::File, key: String::new() }, known: Vec::new() }
    }

    /// Where `key` of this table is, or where it is missing: on the line of the table's head.
    pub fn place<T>(&self, key: &Key<T>) -> Place {
        self.place_of(key.name())
    }

    /// Whether the file has the key, with a valid value or not. The key counts as known from then on.
    pub fn has<T>(&mut self, key: &Key<T>) -> bool {
        self.value_of(key).is_some()
    }

    /// This table's own key path.
    pub fn path(&self) -> &str {
        &self.place.key
    }

    /// The key's value, else its default.
    pub fn get<T>(&mut self, key: &Key<T>, mistakes: &mut Mistakes) -> T {
        self.find(key, mistakes).map_or_else(|| key.default(), Found::value)
    }

    /// The key's value, if the file has a valid one.
    pub fn find<T>(&mut self, key: &Key<T>, mistakes: &mut Mistakes) -> Option<Found<T>> {
        let value = self.value_of(key)?;
        read(value, self.place(key), key, mistakes)
    }

    /// The valid items of an array. An empty array is a mistake. If the key also takes a single string, that string
    /// counts as an array of one.
    pub fn list<T>(&mut self, key: &Key<T>, mistakes: &mut Mistakes) -> Option<Vec<Found<T>>> {
        let value = self.value_of(key)?;
        let place = Place { at: mistakes.line(&value.span()), ..self.place(key) };
        let takes = &key.description.takes;
        let items = match (value.get_ref().as_array(), takes) {
            (Some(items), _) => &items[..],
            (None, Takes::Strings(_)) => {
                let shown = value_shown(value, mistakes.text);
                let problem = format!("{shown} is not an array; expected an array of strings: {takes}");
                mistakes.add(&place, &problem);
                return None;
            }
            (None, _) => std::slice::from_ref(value),
        };
        if items.is_empty() {
            mistakes.add(&place, &format!("empty; expected at least one string: {takes}"));
        }
        Some(items.iter().filter_map(|item| read(item, place.clone(), key, mistakes)).collect())
    }

    /// A table below this one; an absent one reads as empty.
    pub fn table(&mut self, name: &'static str, mistakes: &mut Mistakes) -> Table<'t> {
        let mut place = self.place_of(name);
        let mut entries = None;
        if let Some(value) = self.raw(name) {
            place.at = mistakes.line(&value.span());
            entries = value.get_ref().as_table();
            if entries.is_none() {
                let what = type_name(value.get_ref());
                mistakes.add(&place, &format!("{what}; expected a table, written [{}]", place.key));
            }
        }
        Table { entries, place, known: Vec::new() }
    }

    /// An array of tables, `None` if absent.
    pub fn tables(&mut self, name: &'static str, mistakes: &mut Mistakes) -> Option<Vec<Table<'t>>> {
        let value = self.raw(name)?;
        let mut place = self.place_of(name);
        place.at = mistakes.line(&value.span());
        let items = value.get_ref().as_array().map(|items| &items[..]).unwrap_or_default();
        if items.is_empty() {
            let what = if value.get_ref().is_array() { "an empty array" } else { type_name(value.get_ref()) };
            mistakes.add(
                &place,
                &format!("{what}; expected tables, each written [[{0}]] in double brackets", place.key),
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

    /// Reports the keys that nobody has asked for.
    pub fn finish(self, mistakes: &mut Mistakes) {
        for (key, _) in self.entries.into_iter().flat_map(|entries| entries.iter()) {
            let name: &str = key.get_ref();
            if self.known.contains(&name) {
                continue;
            }
            let place = Place { at: mistakes.line(&key.span()), ..self.place_of(&key_shown(name)) };
            let advice = self.advice(name).map(|advice| format!(" ({advice})")).unwrap_or_default();
            let known = self.known.join(", ");
            mistakes.add(&place, &format!("unknown key{advice}; allowed here: {known}"));
        }
    }

    /// What was probably meant by an unknown key.
    fn advice(&self, name: &str) -> Option<String> {
        if let Some((_, _, advice)) = ELSEWHERE.iter().find(|(t, k, _)| (*t, *k) == (self.name(), name)) {
            return Some((*advice).to_owned());
        }
        // Comparing takes time quadratic in the length, and a much longer key is not a typing mistake.
        if name.len() > 32 {
            return None;
        }
        let near = self.known.iter().map(|known| (strsim::osa_distance(known, name), known));
        let (distance, nearest) = near.min()?;
        (distance <= 1 + nearest.len() / 4).then(|| format!("did you mean {nearest}?"))
    }

    fn place_of(&self, name: &str) -> Place {
        let key =
            if self.place.key.is_empty() { name.to_owned() } else { format!("{}.{name}", self.place.key) };
        Place { at: self.place.at, key }
    }

    /// This table's name, as it stands in the paths of keys.
    fn name(&self) -> &str {
        self.place.key.split('[').next().unwrap_or_default()
    }

    fn value_of<T>(&mut self, key: &Key<T>) -> Option<&'t Spanned<DeValue<'t>>> {
        let path = key.description.path;
        debug_assert_eq!(
            path.rsplit_once('.').unwrap_or(("", path)).0,
            self.name(),
            "{path} is of another table"
        );
        self.raw(key.name())
    }

    fn raw(&mut self, name: &'static str) -> Option<&'t Spanned<DeValue<'t>>> {
        if !self.known.contains(&name) {
            self.known.push(name);
        }
        self.entries?.get(name)
    }
}

/// Parses a value for `key`. A wrong value is reported, and gives `None`.
fn read<T>(
    value: &Spanned<DeValue>,
    place: Place,
    key: &Key<T>,
    mistakes: &mut Mistakes,
) -> Option<Found<T>> {
    let place = Place { at: mistakes.line(&value.span()), ..place };
    let shown = value_shown(value, mistakes.text);
    let text = match text_of(value.get_ref(), &key.description.takes, mistakes.env) {
        Ok(text) => text,
        Err(problems) => {
            for problem in problems {
                mistakes.add(&place, &format!("{shown} {problem}"));
            }
            return None;
        }
    };
    match key.understand(&text) {
        Ok(value) => Some(Found { value, place, shown }),
        Err(problem) => {
            let is_as_written = value.get_ref().as_str().is_none_or(|written| written == text);
            let replaced = if is_as_written { "" } else { " with its variables replaced" };
            mistakes.add(&place, &format!("{shown}{replaced} {problem}"));
            None
        }
    }
}

/// A value as text, with its variables replaced. The errors are texts that follow the value as written.
fn text_of<'v>(value: &'v DeValue, takes: &Takes, env: Env) -> Result<Cow<'v, str>, Vec<String>> {
    let what = type_name(value);
    let problem = match (takes, value) {
        (Takes::String(_) | Takes::Strings(_), DeValue::String(written)) => return substitute(written, env),
        (Takes::Switch, DeValue::Boolean(on)) => return Ok(on.to_string().into()),
        (Takes::Number(_, from, to), DeValue::Integer(number)) => {
            match u32::from_str_radix(number.as_str(), number.radix()) {
                Ok(number) if (*from..=*to).contains(&number) => return Ok(number.to_string().into()),
                _ => format!("is out of range; expected {takes}"),
            }
        }
        (Takes::String(_) | Takes::Strings(_), _) => format!("is {what}; expected a string: {takes}"),
        (Takes::Switch, _) => format!("is {what}; expected {takes}, without quotes"),
        (Takes::Number(..), _) => format!("is {what}; expected {takes}"),
    };
    Err(vec![problem])
}

/// A value for a message, as it is written in the file. Arrays and tables may be long, so only their kind is shown.
fn value_shown(value: &Spanned<DeValue>, text: &str) -> String {
    match value.get_ref() {
        DeValue::String(written) => quoted(written),
        DeValue::Array(_) => "[...]".to_owned(),
        DeValue::Table(_) => "{...}".to_owned(),
        _ => shown(text.get(value.span()).unwrap_or_default()),
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

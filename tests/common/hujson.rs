//! Human JSON, in which policies of a tailnet are written.

use jsonc_parser::{ParseOptions, parse_to_serde_value};
use serde_json::Value;

/// JSON with comments and trailing commas, and no more than that.
const HUMAN_JSON: ParseOptions = ParseOptions {
    allow_comments: true,
    allow_trailing_commas: true,
    allow_loose_object_property_names: false,
    allow_missing_commas: false,
    allow_single_quoted_strings: false,
    allow_hexadecimal_numbers: false,
    allow_unary_plus_numbers: false,
    allow_bare_decimal_point_numbers: false,
    allow_non_finite_numbers: false,
    allow_extended_string_escapes: false,
};

pub fn parse(text: &str) -> Result<Value, String> {
    parse_to_serde_value(text, &HUMAN_JSON).map_err(|error| error.to_string())
}

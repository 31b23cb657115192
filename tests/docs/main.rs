//! The book (`docs/`) and the other Markdown files say what is true: links lead somewhere, blocks
//! are what the program they are for takes, commands exist, and the reference pages are what the code
//! says.
//!
//! What a block is for is said after its three backticks; `blocks.rs` has the list, and a kind that
//! is not on it fails. Nothing here asks the network.

#[path = "../common/mod.rs"]
mod common;

mod blocks;
mod book;
mod commands;
mod errors;
mod floors;
mod links;
mod pages;
mod reference;

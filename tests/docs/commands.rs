//! Every command line with this program in it uses commands and flags that there are.

use clap::Parser;
use clap::error::ErrorKind;
use tailwart_edge::cli::Cli;

use crate::pages;

const PROGRAM: &str = "tailwart-edge";

/// The arguments of each call of this program in a piece of shell.
fn calls(shell: &str) -> Vec<Vec<String>> {
    let joined = shell.replace("\\\n", " ");
    let mut calls = Vec::new();
    for line in joined.lines() {
        let words = shlex::split(line).unwrap_or_default();
        let is_end = |word: &String| ["|", "||", "&&", ";", "&"].contains(&&**word);
        calls.extend(words.split(is_end).filter_map(call));
    }
    calls
}

/// The arguments, if a command calls this program.
fn call(words: &[String]) -> Option<Vec<String>> {
    let mut words = words.iter().map(String::as_str).peekable();
    loop {
        match words.next()? {
            "sudo" => {
                while let Some(flag) = words.next_if(|word| word.starts_with('-')) {
                    if flag == "-u" {
                        words.next();
                    }
                }
            }
            "exec" | "env" | "time" => {}
            word if word.split('/').next_back() == Some(PROGRAM) => break,
            word if is_assignment(word) => {}
            _ => return None,
        }
    }
    let is_redirection =
        |word: &str| word.trim_start_matches(|c: char| c.is_ascii_digit()).starts_with(['<', '>']);
    Some(words.take_while(|word| !is_redirection(word)).map(str::to_owned).collect())
}

fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
}

fn check(arguments: &[String]) -> Result<(), String> {
    let line = std::iter::once(PROGRAM).chain(arguments.iter().map(String::as_str));
    match Cli::try_parse_from(line) {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => Ok(()),
        // Its name alone, as in a heading.
        Err(error) if error.kind() == ErrorKind::MissingRequiredArgument && arguments.len() == 1 => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn every_command_exists() {
    let (mut in_blocks, mut in_text, mut wrong) = (0, 0, Vec::new());
    for page in pages::all() {
        let blocks = page.blocks().into_iter().filter(|block| block.kind == "sh");
        for arguments in blocks.flat_map(|block| calls(&block.code)) {
            in_blocks += 1;
            wrong.extend(check(&arguments).err().map(|error| format!("{}: {error}", page.name())));
        }
        let code = page.inline_code();
        // The name alone is the program, or its user, or its unit.
        for arguments in code.iter().flat_map(|code| calls(code)).filter(|arguments| !arguments.is_empty()) {
            in_text += 1;
            wrong.extend(check(&arguments).err().map(|error| format!("{}: {error}", page.name())));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(in_blocks >= 15 && in_text >= 10, "{in_blocks} calls in blocks, {in_text} in sentences");
}

#[test]
fn calls_are_found_and_judged() {
    let shell = "# tailwart-edge serve\nTS_AUTHKEY=x sudo -u mail ./dist/tailwart-edge run \\\n  --upstream a > log\n\
                 systemctl restart tailwart-edge && tailwart-edge status --json | jq .held\n";
    let found = calls(shell);
    assert_eq!(found, [vec!["run", "--upstream", "a"], vec!["status", "--json"]]);
    assert_eq!(found.iter().map(|call| check(call)).collect::<Vec<_>>(), [Ok(()), Ok(())]);
    assert!(check(&["run".to_owned(), "--port".to_owned()]).is_err());
}

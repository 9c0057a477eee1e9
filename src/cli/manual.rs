//! The manual pages and the shell completions below packaging/, generated from the definition of the command line, the
//! table of keys, and configs/default.toml. The test fails if they differ; `make manual` rewrites them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::Cli;
use crate::config::{LIVE_KEYS, documented_keys};

/// Sections common to the commands that connect to a running daemon.
const CLIENT_SECTIONS: &str = "\
Exit status:
  0  done
  1  the daemon refused, or the command failed
  2  the command line is wrong
  3  no daemon listens on the control socket

Environment:
  GENBLK_CONTROL  the control socket, unless --socket is given

Files:
  /run/genblk/control.sock  the control socket, if the [control] table of the
                            daemon's configuration names it
";

/// The pages by their file names.
fn pages() -> BTreeMap<String, String> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let shown: Vec<Command> = command.get_subcommands().filter(|sub| !sub.is_hide_set()).cloned().collect();
    let names: Vec<String> = shown.iter().map(|sub| format!("genblk-{}", sub.get_name())).collect();
    let mut pages = BTreeMap::new();
    let others = names.iter().map(|name| format!("{name}(1)")).collect::<Vec<_>>().join(", ");
    pages.insert("man/genblk.1".to_owned(), page(command, &format!("{others}, genblk.toml(5)"), ""));
    for (sub, name) in shown.into_iter().zip(&names) {
        let is_client = sub.get_arguments().any(|arg| arg.get_id() == "socket");
        let common = if is_client { CLIENT_SECTIONS } else { "" };
        pages.insert(format!("man/{name}.1"), page(sub, "genblk(1), genblk.toml(5)", common));
    }
    pages.insert("man/genblk.toml.5".to_owned(), configuration_page());
    for (shell, file) in [(Shell::Bash, "genblk.bash"), (Shell::Zsh, "_genblk"), (Shell::Fish, "genblk.fish")] {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "genblk", &mut script);
        let script = String::from_utf8(script).unwrap();
        let lines = script.lines().map(|line| line.trim_end().to_owned() + "\n");
        pages.insert(format!("completions/{file}"), lines.collect());
    }
    pages
}

/// The page of a command. Sections at the end of its help text become sections of the page.
fn page(mut command: Command, see_also: &str, common: &str) -> String {
    let after = command.get_after_long_help().or(command.get_after_help()).map(ToString::to_string).unwrap_or_default();
    let usage = command.render_usage().to_string();
    let has_subcommands = command.has_subcommands();
    let man = Man::new(command.after_help("").after_long_help(""))
        .manual("genblk manual")
        .source(format!("genblk {}", env!("CARGO_PKG_VERSION")));
    let mut bytes = Vec::new();
    man.render_title(&mut bytes).unwrap();
    man.render_name_section(&mut bytes).unwrap();
    // clap_mangen's own synopsis drops the "..." and the "--" of arguments.
    let mut synopsis = Roff::new();
    sections(&mut synopsis, &usage.replacen("Usage: ", "Synopsis:\n  ", 1).replace("\n       ", "\n  "));
    bytes.extend(synopsis.to_roff().into_bytes());
    man.render_description_section(&mut bytes).unwrap();
    man.render_options_section(&mut bytes).unwrap();
    if has_subcommands {
        man.render_subcommands_section(&mut bytes).unwrap();
    }
    let mut roff = Roff::new();
    sections(&mut roff, &after);
    sections(&mut roff, common);
    roff.control("SH", ["SEE ALSO"]).text([roman(see_also)]);
    String::from_utf8(bytes).unwrap() + &roff.to_roff()
}

/// Writes a text of headings, each followed by indented lines, as sections with unchanged lines.
fn sections(roff: &mut Roff, text: &str) {
    let mut is_open = false;
    for line in text.lines() {
        match line.strip_suffix(':').filter(|heading| !heading.starts_with(' ')) {
            Some(heading) => {
                if is_open {
                    roff.control("fi", []);
                }
                roff.control("SH", [heading.to_uppercase().as_str()]).control("nf", []);
                is_open = true;
            }
            None => {
                roff.text([roman(line.strip_prefix("  ").unwrap_or(line))]);
            }
        }
    }
    if is_open {
        roff.control("fi", []);
    }
}

/// The comments of configs/default.toml: at its head, above each key, and at its end.
struct CommentedDefaults {
    head: Vec<String>,
    by_key: BTreeMap<String, Vec<String>>,
    end: Vec<String>,
}

impl CommentedDefaults {
    fn parse_embedded() -> Self {
        let text = include_str!("../../configs/default.toml");
        let (mut comments, mut prefix) = (Vec::new(), "");
        let (mut head, mut by_key) = (Vec::new(), BTreeMap::new());
        for line in text.lines() {
            match line {
                "[[device]]" => head = std::mem::take(&mut comments),
                "[device.cache]" => prefix = "cache.",
                "[device.limits]" => {
                    prefix = "limits.";
                    by_key.insert("limits".to_owned(), std::mem::take(&mut comments));
                }
                _ if line.starts_with('[') => panic!("{line}: no page has this table"),
                "" if comments.is_empty() => {}
                "" => comments.push(String::new()),
                _ => match (line.strip_prefix('#'), line.split_once(" = ")) {
                    (Some(comment), _) => comments.push(comment.strip_prefix(' ').unwrap_or(comment).to_owned()),
                    (None, Some((key, _))) => {
                        by_key.insert(format!("{prefix}{key}"), std::mem::take(&mut comments));
                    }
                    (None, None) => panic!("{line}: neither a comment nor a key"),
                },
            }
        }
        Self { head, by_key, end: comments }
    }
}

/// The name of a key without its table.
fn short_name(key: &str) -> &str {
    key.rsplit_once('.').map_or(key, |(_, short)| short)
}

/// The page of the configuration file.
fn configuration_page() -> String {
    let comments = CommentedDefaults::parse_embedded();
    let mut roff = Roff::new();
    let source = format!("genblk {}", env!("CARGO_PKG_VERSION"));
    roff.control("TH", ["genblk.toml", "5", "", &source, "genblk manual"]);
    roff.control("SH", ["NAME"]).text([roman("genblk.toml - configuration file of genblk")]);
    roff.control("SH", ["SYNOPSIS"]).text([bold("genblk --config"), roman(" "), roman("/etc/genblk.toml")]);
    roff.control("SH", ["DESCRIPTION"]);
    // A reader of the page does not need this.
    let head = comments.head.join("\n").replace("A test keeps this file equal to the code. ", "");
    prose(&mut roff, &head.lines().map(str::to_owned).collect::<Vec<_>>());
    for (heading, table) in [("DEVICE", ""), ("CACHE OF A DEVICE", "cache"), ("LIMITS OF A DEVICE", "limits")] {
        roff.control("SH", [heading]);
        let shown = if table.is_empty() { "[[device]]".to_owned() } else { format!("[device.{table}]") };
        roff.text([roman("Keys of a "), bold(shown), roman(" table:")]);
        prose(&mut roff, comments.by_key.get(table).map_or(&[], Vec::as_slice));
        for key in documented_keys().filter(|key| key.name.split_once('.').map_or("", |(first, _)| first) == table) {
            let text = comments.by_key.get(key.name).unwrap_or_else(|| panic!("{}: no comment", key.name));
            let short = short_name(key.name);
            roff.control("SS", [short]);
            prose(&mut roff, text);
            roff.control("PP", []);
            let default = key.default.map_or_else(|| "It is required".to_owned(), |value| format!("Default: {value}"));
            let change = if LIVE_KEYS.contains(&key.name) {
                "It can change while the disk is served: genblk-set(1)."
            } else {
                "A change takes effect after detach and attach."
            };
            roff.text([roman(format!("Takes {}. {default}. {change}", key.values))]);
        }
    }
    roff.control("SH", ["CONTROL"]);
    prose(&mut roff, &comments.end);
    roff.control("SH", ["EXAMPLE"]).control("nf", []);
    for line in include_str!("../../configs/database.toml").lines() {
        roff.text([roman(line)]);
    }
    roff.control("fi", []);
    roff.control("SH", ["SEE ALSO"]).text([roman("genblk(1), genblk-set(1), genblk-reload(1)")]);
    roff.to_roff()
}

/// Writes comments as paragraphs. Indented lines are a list: a word, at least two spaces, and its meaning.
fn prose(roff: &mut Roff, lines: &[String]) {
    let mut is_new = true;
    for line in lines {
        let text = line.trim();
        match line.len() - line.trim_start().len() {
            _ if text.is_empty() => is_new = true,
            0 => {
                if std::mem::take(&mut is_new) {
                    roff.control("PP", []);
                }
                // Lines of a table are commented out.
                let is_table =
                    text.starts_with('[') || text.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '));
                if is_table {
                    roff.control("nf", []).text([roman(text)]).control("fi", []);
                } else {
                    roff.text([roman(text)]);
                }
            }
            2 if let Some((word, meaning)) = text.split_once("  ") => {
                roff.control("TP", []).text([bold(word)]).text([roman(meaning.trim_start())]);
                is_new = true;
            }
            _ => {
                roff.text([roman(text)]);
            }
        }
    }
}

#[test]
fn manual_and_completions_match_the_command_line_and_the_keys() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging");
    let pages = pages();
    if std::env::var_os("GENBLK_WRITE_MANUAL").is_some() {
        for kind in ["man", "completions"] {
            let _ = fs::remove_dir_all(folder.join(kind));
            fs::create_dir_all(folder.join(kind)).unwrap();
        }
        pages.iter().for_each(|(path, text)| fs::write(folder.join(path), text).unwrap());
    }
    let differ: Vec<_> = pages
        .iter()
        .filter(|(path, text)| fs::read_to_string(folder.join(path)).ok().as_ref() != Some(*text))
        .collect();
    let differ: Vec<_> = differ.into_iter().map(|(path, _)| path).collect();
    assert!(differ.is_empty(), "run \"make manual\" to rewrite them: {differ:?}");
    for kind in ["man", "completions"] {
        for file in fs::read_dir(folder.join(kind)).unwrap() {
            let name = format!("{kind}/{}", file.unwrap().file_name().display());
            assert!(pages.contains_key(&name), "{name} belongs to no command: \"make manual\" removes it");
        }
    }
}

#[test]
fn every_manual_page_has_its_sections() {
    let pages = pages();
    for command in ["list", "stat", "top", "exporter", "recover", "take-over"] {
        let page = &pages[&format!("man/genblk-{command}.1")];
        for heading in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "SEE ALSO"] {
            assert!(
                page.contains(&format!(".SH {heading}\n")) || page.contains(&format!(".SH \"{heading}\"\n")),
                "{command}: {heading}"
            );
        }
    }
    assert!(!pages.contains_key("man/genblk-disk-process.1"), "it is no command for people");
    let synopsis = r"genblk freeze [OPTIONS] <DEVICE> [\-\- <COMMAND>...]";
    assert!(pages["man/genblk-freeze.1"].contains(synopsis), "{}", pages["man/genblk-freeze.1"]);
    let keys = &pages["man/genblk.toml.5"];
    for key in documented_keys() {
        let short = short_name(key.name);
        assert!(keys.contains(&format!(".SS {short}\n")), "{}", key.name);
    }
    assert!(keys.contains("Takes an integer from 1 to 8. Default: 1. A change takes effect after"), "{keys}");
    assert!(keys.contains("Default: 250. It can change while the disk is served"), "{keys}");
    assert!(!keys.contains("A test keeps"), "{keys}");
}

//! The documents name tests that exist, and the table of what survives has a test in each row.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where tests are.
const SOURCES: [&str; 5] = ["control", "criu-hooks", "node-agent", "shim", "tests"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The files below a folder whose names end like this.
fn files(folder: &Path, end: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&path, end));
        } else if path.to_string_lossy().ends_with(end) {
            found.push(path);
        }
    }
    found
}

/// What is a name all through: of a function, or of an option.
fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.chars().all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_')
}

/// The names of tests in a text, each in backticks: no other name in the documents has four words or more, but a few
/// options.
fn named(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2).filter(|name| is_name(name) && name.matches('_').count() >= 3)
}

/// The names of the functions in a source, those among them that a macro makes of a test.
fn functions(source: &str) -> impl Iterator<Item = &str> {
    source.lines().filter_map(|line| {
        if let Some(test) = line.strip_prefix("on_a_node!(") {
            return test.split(',').next();
        }
        let (before, rest) = line.split_once("fn ")?;
        let name = rest.split(['(', '<']).next()?;
        let is_definition = before.split_whitespace().all(|word| word.starts_with("pub") || word == "async");
        (is_definition && is_name(name)).then_some(name)
    })
}

fn all_functions() -> HashSet<String> {
    let sources = SOURCES.iter().flat_map(|name| files(&root().join(name), ".rs"));
    sources
        .flat_map(|path| functions(&fs::read_to_string(path).unwrap()).map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

#[test]
fn every_test_that_the_documents_name_exists() {
    let root = root();
    let exist = all_functions();
    let options = fs::read_to_string(root.join("shim/src/options.rs")).unwrap();
    let pages = files(&root.join("docs"), ".md").into_iter().chain([root.join("README.md")]);
    let mut missing = Vec::new();
    let mut count = 0;
    for page in pages {
        for name in named(&fs::read_to_string(&page).unwrap()) {
            if options.contains(&format!(" {name}: ")) {
                continue;
            }
            count += 1;
            if !exist.contains(name) {
                missing.push(format!("{}: {name}", page.display()));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(count > 50, "only {count} names of tests were found: is this still how they are written?");
}

#[test]
fn every_row_of_what_survives_names_a_test() {
    let text = fs::read_to_string(root().join("docs/depths.md")).unwrap();
    let (_, section) = text.split_once("## What survives").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let rows: Vec<_> =
        section.lines().filter(|line| line.starts_with("| ") && !line.contains("| test |")).collect();
    assert!(rows.len() > 10, "{rows:#?}");
    for row in rows {
        assert!(named(row).count() > 0, "no test is named for {row}");
    }
}

#[test]
fn names_are_found_in_sources_and_in_documents() {
    let source = "fn one() {}\n    pub async fn two<T>() {}\n// a fn no() {}\non_a_node!(three, async || {";
    assert_eq!(functions(source).collect::<Vec<_>>(), ["one", "two", "three"]);
    let text = "`a_b_c_d` and `a_b` and `A_b_c_d` or a_b_c_e";
    assert_eq!(named(text).collect::<Vec<_>>(), ["a_b_c_d"]);
}

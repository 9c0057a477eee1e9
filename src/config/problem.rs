//! Problems of a configuration: line, key and reason, and the word that was probably meant.

use std::fmt;

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line of the file, from 1; `None` on the command line.
    pub line: Option<usize>,
    /// Column of a syntax error, in characters from 1.
    pub column: Option<usize>,
    /// The key with its full path (`device[1].cache.size`) or the option (`--cache-size`); empty for syntax errors.
    pub key: String,
    /// The problem, and the valid values.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
            if let Some(column) = self.column {
                write!(f, "{column}:")?;
            }
            f.write_str(" ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Problem {}

/// A heading with the number of problems in `source`, then a line for each.
pub(crate) fn report(source: &str, problems: &[Problem]) -> String {
    let count = problems.len();
    let mut text = format!("{count} {} in {source}", if count == 1 { "problem" } else { "problems" });
    for problem in problems {
        // FILE:LINE: is the form that editors and terminals turn into a link.
        let prefix = if problem.line.is_some() { format!("{source}:") } else { String::new() };
        text.push_str(&format!("\n{prefix}{problem}"));
    }
    text
}

/// The candidate that `word` is most likely a misspelling of, if one is close.
pub(super) fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (edit_distance(word, candidate), candidate))
        // One typo in three letters still looks like the word; more would be a guess.
        .filter(|(distance, candidate)| *distance <= (candidate.len() / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Edit distance between two words: letters inserted, deleted, substituted, or swapped with their neighbour (optimal
/// string alignment).
fn edit_distance(left: &str, right: &str) -> usize {
    let left: Vec<char> = left.chars().collect();
    let right: Vec<char> = right.chars().collect();
    let mut rows: Vec<Vec<usize>> = vec![(0..=right.len()).collect()];
    for i in 1..=left.len() {
        let mut row = vec![i];
        for j in 1..=right.len() {
            let changed = rows[i - 1][j - 1] + usize::from(left[i - 1] != right[j - 1]);
            let mut best = changed.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && left[i - 1] == right[j - 2] && left[i - 2] == right[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[left.len()][right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_edit_distance_counts_typing_mistakes() {
        let cases = [
            ("size", "size", 0),
            ("sise", "size", 1),
            ("szie", "size", 1),
            ("", "ab", 2),
            ("read-only", "read_only", 1),
        ];
        for (left, right, edits) in cases {
            assert_eq!(edit_distance(left, right), edits, "{left} {right}");
            assert_eq!(edit_distance(right, left), edits, "{right} {left}");
        }
    }

    #[test]
    fn only_a_similar_word_is_suggested() {
        let words = ["socket", "serial", "poll_us"];
        assert_eq!(nearest("sockte", words.into_iter()), Some("socket"));
        assert_eq!(nearest("poll_ms", words.into_iter()), Some("poll_us"));
        assert_eq!(nearest("colour", words.into_iter()), None);
    }

    #[test]
    fn a_report_gives_file_line_and_column_of_each_problem() {
        let file = Problem { line: Some(3), column: Some(7), key: String::new(), message: "bad".into() };
        let option = Problem { line: None, column: None, key: "--fd".into(), message: "worse".into() };
        assert_eq!(report("a.toml", &[file]), "1 problem in a.toml\na.toml:3:7: bad");
        assert_eq!(report("the command line", &[option]), "1 problem in the command line\n--fd: worse");
    }
}

//! Tables, and short numbers: three digits and a letter.

/// Columns of text, the first ones aligned to the left, the others to the right.
#[derive(Debug)]
pub(super) struct TextTable {
    rows: Vec<Vec<String>>,
    left: usize,
}

impl TextTable {
    /// A table with this header, of which the first `left` columns are aligned to the left.
    pub fn new(header: &[&str], left: usize) -> Self {
        Self { rows: vec![header.iter().map(|&title| title.to_owned()).collect()], left }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The lines of the table, with or without the header; columns separated by tabs for programs.
    pub fn render(&self, with_header: bool, with_tabs: bool) -> String {
        let rows = if with_header { &self.rows[..] } else { &self.rows[1..] };
        if with_tabs {
            return rows.iter().map(|row| row.join("\t") + "\n").collect();
        }
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|column| self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max())
            .map(Option::unwrap_or_default)
            .collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
                if column < self.left { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
        };
        rows.iter().map(line).collect()
    }
}

/// Whether numbers are exact or short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Numbers {
    /// Three digits and a letter.
    #[default]
    Short,
    /// Bytes and nanoseconds.
    Exact,
}

impl Numbers {
    /// A count or a rate of counts: `48.2k`.
    pub fn count(self, value: f64) -> String {
        match self {
            Self::Short => short(value, 1000.0, &["", "k", "M", "G", "T", "P"]),
            Self::Exact => format!("{value:.3}").trim_end_matches('0').trim_end_matches('.').to_owned(),
        }
    }

    /// Bytes in powers of 1024: `61.2M`.
    pub fn bytes(self, value: u64) -> String {
        #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
        match self {
            Self::Short => short(value as f64, 1024.0, &["", "K", "M", "G", "T", "P"]),
            Self::Exact => value.to_string(),
        }
    }

    /// A time: `142u`; `-` if there is none.
    pub fn time(self, ns: Option<u64>) -> String {
        #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
        match (self, ns) {
            (_, None) => "-".to_owned(),
            (Self::Short, Some(ns)) => short(ns as f64, 1000.0, &["n", "u", "m", "s"]),
            (Self::Exact, Some(ns)) => ns.to_string(),
        }
    }
}

/// A value in the greatest of the units in which it is at least 1; three digits.
fn short(value: f64, step: f64, units: &[&str]) -> String {
    let (mut value, mut unit) = (value, 0);
    // A value that rounds up to the next unit is shown in that unit.
    while value >= step - 0.5 && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    let decimals = usize::from(value < 99.95 && (value.fract() != 0.0 || unit > 0) && value != 0.0);
    format!("{value:.decimals$}{}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_print_as_three_digits_and_a_unit_prefix() {
        let counts = [(0.0, "0"), (7.0, "7"), (0.5, "0.5"), (999.0, "999"), (999.7, "1.0k"), (48_213.0, "48.2k")];
        for (value, text) in counts {
            assert_eq!(Numbers::Short.count(value), text);
        }
        assert_eq!(Numbers::Short.bytes(64 << 20), "64.0M");
        assert_eq!(Numbers::Short.bytes(200 << 30), "200G");
        assert_eq!(Numbers::Short.bytes(0), "0");
        assert_eq!(Numbers::Short.time(Some(1100)), "1.1u");
        assert_eq!(Numbers::Short.time(Some(142_000)), "142u");
        assert_eq!(Numbers::Short.time(None), "-");
        assert_eq!(Numbers::Exact.time(Some(142_000)), "142000");
        assert_eq!(Numbers::Exact.count(0.25), "0.25");
        assert_eq!(Numbers::Exact.count(300.0), "300");
    }

    #[test]
    fn columns_are_aligned_for_people_and_tab_separated_for_programs() {
        let mut table = TextTable::new(&["disk", "r/s"], 1);
        table.row(vec!["a".to_owned(), "100".to_owned()]);
        assert_eq!(table.render(true, false), "disk  r/s\na     100\n");
        assert_eq!(table.render(false, true), "a\t100\n");
    }
}

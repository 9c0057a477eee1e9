//! The table of results.

use super::algorithms::Algorithm;
use super::{Cell, Level};

/// Miss ratios in percent: a block of rows for each workload, a column for each level and size. `cells` are those of
/// [`super::measure`], one workload after the other.
pub fn render(cells: &[Cell], sizes_permille: &[u32]) -> String {
    let mut text = header(sizes_permille);
    for workload in cells.chunk_by(|a, b| a.workload == b.workload) {
        for algorithm in Algorithm::ALL {
            let name = if algorithm == Algorithm::Genblk { workload[0].workload.as_str() } else { "" };
            text += &format!("{name:<13}{:<7}", algorithm.name());
            for level in workload.chunk_by(|a, b| a.level == b.level) {
                text += "|";
                level.iter().for_each(|cell| text += &format!("{:>6.1}", cell.of(algorithm)));
            }
            text += "\n";
        }
    }
    text
}

fn header(sizes_permille: &[u32]) -> String {
    let width = 6 * sizes_permille.len();
    let mut levels = " ".repeat(20);
    let mut sizes = "size, % of footprint".to_string();
    for level in Level::ALL {
        levels += &format!("|{:>width$}", level.name());
        sizes += "|";
        sizes_permille.iter().for_each(|&permille| sizes += &format!("{:>6}", f64::from(permille) / 10.0));
    }
    format!("{levels}\n{sizes}\n")
}

//! The comparison as a picture: a bar for each row, to the right where genblk is better than the best peer. Readable on
//! light and dark ground.

use std::fmt::Write;

use crate::figures::RowResult;
use crate::report::show;

const WIDTH: f64 = 800.0;
/// Where the bars' ground begins, and its end.
const LEFT: f64 = 330.0;
const RIGHT: f64 = WIDTH - 60.0;
const TOP: f64 = 56.0;
const STEP: f64 = 26.0;
/// Ends of the axis: times better than the best peer, on a logarithmic scale.
const LEAST: f64 = 0.25;
const MOST: f64 = 32.0;

const STYLE: &str = "
text { font: 13px system-ui, sans-serif; fill: #24292f }
.small { font-size: 11px; fill: #57606a }
.line { stroke: #d0d7de }
.one { stroke: #57606a }
.good { fill: #2da44e }
.bad { fill: #cf222e }
.limit { stroke: #24292f; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .small { fill: #9198a1 }
  .line { stroke: #3d444d }
  .one { stroke: #9198a1 }
  .good { fill: #3fb950 }
  .bad { fill: #f85149 }
  .limit { stroke: #e6edf3 }
}
";

/// Where a ratio stands.
fn x(ratio: f64) -> f64 {
    let share = (ratio.clamp(LEAST, MOST) / LEAST).log2() / (MOST / LEAST).log2();
    LEFT + share * (RIGHT - LEFT)
}

/// The picture.
pub fn svg(rows: &[RowResult<'_>]) -> String {
    let bars: Vec<&RowResult<'_>> = rows.iter().filter(|row| row.advantage().is_some()).collect();
    let bottom = TOP + STEP * bars.len() as f64;
    let height = bottom + 34.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"genblk against the best peer\">\n<style>{STYLE}</style>\n\
         <text x=\"8\" y=\"20\">genblk against the best peer of each row</text>\n\
         <text x=\"8\" y=\"38\" class=\"small\">times better, logarithmic; the stroke is the limit where there is one</text>\n"
    );
    let mut ratio = LEAST;
    while ratio <= MOST {
        let (at, class) = (x(ratio), if (ratio - 1.0).abs() < f64::EPSILON { "one" } else { "line" });
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{bottom}\" class=\"{class}\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" class=\"small\">{ratio}x</text>",
            bottom + 16.0
        );
        ratio *= 2.0;
    }
    for (at, row) in bars.iter().enumerate() {
        bar(&mut svg, row, TOP + STEP * at as f64);
    }
    svg + "</svg>\n"
}

fn bar(svg: &mut String, row: &RowResult<'_>, y: f64) {
    let Some(ratio) = row.advantage() else { return };
    let (from, to) = (x(ratio).min(x(1.0)), x(ratio).max(x(1.0)));
    let class = if ratio >= 1.0 { "good" } else { "bad" };
    let (name, unit) = (row.row.key, row.row.measures[0].name());
    let baseline = y + 17.0;
    let _ = writeln!(
        svg,
        "<text x=\"8\" y=\"{baseline}\">{name} <tspan class=\"small\">{unit}</tspan></text>\
         <rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"16\" rx=\"2\" class=\"{class}\"/>\
         <text x=\"{:.1}\" y=\"{baseline}\" class=\"small\">{}x</text>",
        y + 5.0,
        to - from,
        to + 6.0,
        show(Some(ratio))
    );
    if let Some(limit) = row.limit_advantage() {
        let at = x(limit);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{:.1}\" x2=\"{at:.1}\" y2=\"{:.1}\" class=\"limit\"/>",
            y + 3.0,
            y + 23.0
        );
    }
}

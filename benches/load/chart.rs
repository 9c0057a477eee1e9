//! results.svg: a bar for each row, to the right where genblk is better than the best peer, to the left where it is
//! worse. Readable in light and dark mode, and without telling colours apart: bars of rows where genblk is worse are
//! hatched.

use std::fmt::Write;

use crate::figures::{GENBLK, RowResult};
use crate::report::show;
use crate::rows::Measure;

const WIDTH: f64 = 800.0;
/// The ends of the axis.
const LEFT: f64 = 388.0;
const RIGHT: f64 = WIDTH - 52.0;
/// The first group's heading.
const TOP: f64 = 92.0;
const HEADING_HEIGHT: f64 = 30.0;
const ROW_HEIGHT: f64 = 38.0;
const BAR_HEIGHT: f64 = 16.0;
/// Space for a ratio beside its bar.
const LABEL_WIDTH: f64 = 40.0;
/// Between a bar or a mark, and the label beside it.
const GAP: f64 = 6.0;

/// Blue and orange differ for all kinds of colour blindness (Okabe and Ito, "Color Universal Design").
const STYLE: &str = "
text { font: 13px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1f2328 }
.heading { font-weight: 600 }
.small { font-size: 11px; fill: #59636e }
.ratio { font-size: 12px; font-weight: 600 }
.grid { stroke: #d1d9e0 }
.one { stroke: #59636e; stroke-width: 1.5 }
.better { fill: #0072b2 }
.worse { fill: url(#hatch); stroke: #b34e00 }
.hatch { stroke: #b34e00; stroke-width: 3 }
.limit { fill: none; stroke: #1f2328; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .small { fill: #9198a1 }
  .grid { stroke: #3d444d }
  .one { stroke: #9198a1 }
  .better { fill: #3d8fd1 }
  .worse { stroke: #e69f00 }
  .hatch { stroke: #e69f00 }
  .limit { stroke: #f0f6fc }
}
";

/// A logarithmic axis of how many times better than the best peer something is. Its ends are powers of two.
#[derive(Clone, Copy, Debug)]
struct Axis {
    first: i32,
    last: i32,
}

impl Axis {
    /// An axis that shows all ratios and limits.
    fn over(results: &[&RowResult<'_>]) -> Self {
        let ratios = results.iter().flat_map(|result| result.advantage().into_iter().chain(result.limit_advantage()));
        ratios.fold(Self { first: -1, last: 2 }, |axis, ratio| Self {
            first: axis.first.min(ratio.log2().floor() as i32),
            last: axis.last.max(ratio.log2().ceil() as i32),
        })
    }

    fn x(self, ratio: f64) -> f64 {
        LEFT + (ratio.log2() - f64::from(self.first)) / f64::from(self.last - self.first) * (RIGHT - LEFT)
    }

    fn draw(self, svg: &mut String, bottom: f64) {
        for power in self.first..=self.last {
            let (ratio, class) = (f64::from(power).exp2(), if power == 0 { "one" } else { "grid" });
            let (x, top) = (self.x(ratio), TOP + 8.0);
            let _ = writeln!(svg, "<line x1=\"{x:.1}\" y1=\"{top}\" x2=\"{x:.1}\" y2=\"{bottom}\" class=\"{class}\"/>");
            for y in [TOP + 2.0, bottom + 16.0] {
                let _ = writeln!(
                    svg,
                    "<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\" class=\"small\">{ratio}x</text>"
                );
            }
        }
    }
}

/// The picture.
pub fn svg(results: &[RowResult<'_>]) -> String {
    let compared: Vec<&RowResult<'_>> = results.iter().filter(|result| result.advantage().is_some()).collect();
    let axis = Axis::over(&compared);
    let groups: Vec<_> = compared.chunk_by(|a, b| a.row.medium.title() == b.row.medium.title()).collect();
    let bottom = TOP + HEADING_HEIGHT * groups.len() as f64 + ROW_HEIGHT * compared.len() as f64;
    let height = bottom + 28.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"genblk compared with the best other server of each row\">\n<style>{STYLE}</style>\n\
         <pattern id=\"hatch\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" \
         patternTransform=\"rotate(45)\">\
         <line x1=\"1.5\" y1=\"0\" x2=\"1.5\" y2=\"6\" class=\"hatch\"/></pattern>\n"
    );
    legend(&mut svg);
    axis.draw(&mut svg, bottom);
    let mut y = TOP;
    for group in groups {
        y += HEADING_HEIGHT;
        let _ =
            writeln!(svg, "<text x=\"8\" y=\"{}\" class=\"heading\">{}</text>", y - 9.0, group[0].row.medium.title());
        for result in group {
            draw_row(&mut svg, axis, result, y);
            y += ROW_HEIGHT;
        }
    }
    svg + "</svg>\n"
}

fn legend(svg: &mut String) {
    let _ = write!(
        svg,
        "<text x=\"8\" y=\"20\" class=\"heading\">genblk compared with the best other server of each row</text>\n\
         <text x=\"8\" y=\"38\" class=\"small\">Bars: times better (throughput, or inverse time), logarithmic. \
         Grey: figures of both servers. qsd: qemu-storage-daemon.</text>\n\
         <rect x=\"8\" y=\"50\" width=\"28\" height=\"12\" rx=\"2\" class=\"better\"/>\
         <text x=\"42\" y=\"60\" class=\"small\">genblk is better</text>\n\
         <rect x=\"150\" y=\"50\" width=\"28\" height=\"12\" rx=\"2\" class=\"worse\"/>\
         <text x=\"184\" y=\"60\" class=\"small\">genblk is worse</text>\n\
         <path d=\"{}\" class=\"limit\"/>\
         <text x=\"306\" y=\"60\" class=\"small\">\
         limit of this machine: a server that only copies, or the bare disk</text>\n",
        mark(296.0, 48.0, 64.0)
    );
}

/// The mark of a limit: an upright line with serifs.
fn mark(x: f64, top: f64, bottom: f64) -> String {
    format!("M{:.1} {top:.1}h6m-3 0V{bottom:.1}m-3 0h6", x - 3.0)
}

fn draw_row(svg: &mut String, axis: Axis, result: &RowResult<'_>, y: f64) {
    let Some(ratio) = result.advantage() else { return };
    let (start, end) = (axis.x(ratio.min(1.0)), axis.x(ratio.max(1.0)));
    let class = if ratio >= 1.0 { "better" } else { "worse" };
    let bar_top = y + 4.0;
    let _ = writeln!(
        svg,
        "<text x=\"8\" y=\"{}\">{}</text><text x=\"8\" y=\"{}\" class=\"small\">{}</text>\n\
         <rect x=\"{start:.1}\" y=\"{bar_top}\" width=\"{:.1}\" height=\"{BAR_HEIGHT}\" rx=\"2\" class=\"{class}\"/>",
        y + 13.0,
        escaped(result.row.title),
        y + 27.0,
        escaped(&figures(result)),
        (end - start).max(1.0),
    );
    let limit = result.limit_advantage().map(|limit| axis.x(limit));
    if let Some(x) = limit {
        let _ = writeln!(svg, "<path d=\"{}\" class=\"limit\"/>", mark(x, bar_top - 3.0, bar_top + BAR_HEIGHT + 3.0));
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{}\" class=\"ratio\">{}x</text>",
        label_x(end, limit),
        bar_top + 12.5,
        show(Some(ratio))
    );
}

/// Where a ratio starts: right of its bar, and right of a limit that it would overlap.
fn label_x(bar_end: f64, limit: Option<f64>) -> f64 {
    let x = bar_end + GAP;
    limit.filter(|limit| (x - 2.0 * GAP..x + LABEL_WIDTH).contains(limit)).map_or(x, |limit| limit.max(bar_end) + GAP)
}

/// genblk's figure and that of the best peer.
fn figures(result: &RowResult<'_>) -> String {
    let measure = result.row.measures[0];
    let genblk = phrase(measure, &show(result.median(GENBLK, 0)));
    let peer = result.best_peer().map(|(name, value)| format!("; {name} {}", show(Some(value)))).unwrap_or_default();
    format!("{}: {genblk}{peer}", result.row.key)
}

fn phrase(measure: Measure, value: &str) -> String {
    match measure {
        Measure::Iops => format!("{value} requests/s"),
        Measure::MibPerSecond => format!("{value} MiB/s"),
        Measure::MedianUs => format!("median {value} us"),
        Measure::P99Us => format!("p99 {value} us"),
        Measure::P999Us => format!("p99.9 {value} us"),
        Measure::FlushP99Ms => format!("p99 of FLUSH {value} ms"),
        Measure::Seconds => format!("{value} s"),
        Measure::CpuUs => format!("{value} us of CPU time per request"),
        Measure::WriteKib => format!("{value} KiB per device write"),
        Measure::P99OverUnloaded => format!("p99 {value} times the unloaded one"),
    }
}

/// Text for XML; the names of peers are the user's.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

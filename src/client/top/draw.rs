//! Draws the state of `genblk top`, for 80 columns and 24 lines or more.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Sparkline, Wrap};

use super::super::diagnosis;
use super::super::interval::{Interval, MEDIAN, P99, RequestInterval, percent, to_f64};
use super::super::stat::histogram;
use super::super::table::Numbers;
use super::super::visible;
use super::state::{TopState, TopView};
use crate::control::wire::{DeviceState, DeviceStatus};
use crate::units::PAGE_BYTES;

/// Lines of the details.
const DETAIL_LINES: u16 = 11;
/// From this width on, memory and dirty data have bars.
const WIDE: u16 = 104;
/// Width of a bar.
const BAR: usize = 10;
/// The keys.
const KEYS: &str = " q quit  s sort  up/down select  w histogram  p pause  h help";
const HELP: &[&str] = &[
    " q         quit (so does Ctrl-C)",
    " s         sort by the next of r/s, w/s, r99, f99, dirty, busy, or not at all",
    " up, down  select a disk (k, j)",
    " w         histogram of the latencies of the selected disk in the last interval",
    " p         pause updates (also: space)",
    " h         this text; Esc goes back",
    " r/s w/s f/s  reads, writes and FLUSHes per second",
    " r99 w99 f99  99th percentile of their latencies",
    " hit%         requested pages found in memory, not counting holes",
    " dirty        data not yet written to the image",
    " busy         time that the workers spent in turns with work, of one processor",
];

/// Whether there are colours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Palette {
    pub has_colour: bool,
}

impl Palette {
    fn style(self, colour: Color) -> Style {
        if self.has_colour { Style::new().fg(colour) } else { Style::new() }
    }
}

/// Draws the whole screen.
pub(super) fn draw(frame: &mut Frame<'_>, state: &TopState, palette: Palette) {
    let area = frame.area();
    let (width, height) = (area.width, area.height);
    let line = |y| Rect { x: 0, y, width, height: 1 };
    if height < 4 {
        return frame.render_widget(Paragraph::new("too small"), area);
    }
    frame.render_widget(Line::styled(header(state), Modifier::BOLD), line(0));
    let below = if state.view() == TopView::Details { DETAIL_LINES } else { height / 2 };
    let list = height.saturating_sub(2 + below).max(2);
    draw_list(frame, state, palette, Rect { x: 0, y: 1, width, height: list });
    let rest = Rect { x: 0, y: 1 + list, width, height: height.saturating_sub(2 + list) };
    let disks = state.disks();
    let names: Vec<String> = disks.iter().map(|(device, _)| device.name.clone()).collect();
    let selected = disks.get(state.selected_of(&names));
    match (state.view(), selected) {
        (TopView::Help, _) => {
            let lines: Vec<Line<'_>> = HELP.iter().map(|text| Line::raw(*text)).collect();
            frame.render_widget(Paragraph::new(lines), rest);
        }
        (TopView::Histogram, Some((_, Some(interval)))) => {
            frame.render_widget(Paragraph::new(histogram(interval).render(true, false)), rest);
        }
        (_, Some((device, interval))) => draw_details(frame, state, palette, rest, device, interval.as_ref()),
        (_, None) => {}
    }
    let footer = match state.last_error() {
        Some(why) => Line::styled(format!(" {}", visible(why)), palette.style(Color::Red).add_modifier(Modifier::BOLD)),
        None if state.is_paused() => Line::styled(format!("{KEYS}   PAUSED"), Modifier::BOLD),
        None => Line::raw(KEYS),
    };
    frame.render_widget(footer, line(height - 1));
}

fn header(state: &TopState) -> String {
    let sample = state.now();
    let totals = state.totals();
    let up = sample.time_us.saturating_sub(sample.description.since_us) / 1_000_000;
    let rate = |count| match state.seconds() {
        seconds if seconds > 0.0 => Numbers::Short.count(to_f64(count) / seconds),
        _ => "-".to_owned(),
    };
    let bytes = |pages: u64| Numbers::Short.bytes(pages.saturating_mul(PAGE_BYTES));
    let disks = match sample.devices.len() {
        1 => "1 disk".to_owned(),
        disks => format!("{disks} disks"),
    };
    let lookups = totals.hit_pages.saturating_add(totals.miss_pages);
    format!(
        "genblk {} up {} {disks}  r {}/s {}%  w {}/s  dirty {}/{}",
        visible(&sample.description.version),
        duration(up),
        rate(totals.reads),
        percent(totals.hit_pages, lookups),
        rate(totals.writes),
        bytes(totals.dirty_pages),
        bytes(totals.limit_pages),
    )
}

/// A number of seconds in its two largest units.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86_400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

/// The columns after the name: title and width.
const COLUMNS: [(&str, usize); 10] = [
    ("state", 7),
    ("r/s", 6),
    ("hit%", 5),
    ("r99", 5),
    ("w/s", 6),
    ("w99", 5),
    ("f/s", 5),
    ("f99", 5),
    ("dirty", 6),
    ("busy", 5),
];

fn draw_list(frame: &mut Frame<'_>, state: &TopState, palette: Palette, area: Rect) {
    let is_wide = area.width >= WIDE;
    let bars = if is_wide { 2 * (BAR + 1) } else { 0 };
    let taken: usize = 2 + bars + COLUMNS.iter().map(|(_, width)| width + 1).sum::<usize>();
    let name_width = usize::from(area.width).saturating_sub(taken).clamp(4, 24);
    let join = |name: &str, cells: [String; COLUMNS.len()], bars: [String; 2]| {
        let mut text = format!("{name:<name_width$.name_width$}");
        for (index, (cell, (_, width))) in cells.iter().zip(COLUMNS).enumerate() {
            text += &if index == 0 { format!(" {cell:<width$}") } else { format!(" {cell:>width$}") };
        }
        if is_wide {
            text += &bars.map(|bar| format!(" {bar:<BAR$}")).concat();
        }
        text
    };
    let titles =
        COLUMNS.map(|(title, _)| if title == state.sort().name() { format!("{title}*") } else { title.into() });
    let title = join("disk", titles, ["memory".to_owned(), "dirty".to_owned()]);
    let mut lines = vec![Line::styled(format!("  {title}"), Modifier::UNDERLINED)];
    let disks = state.disks();
    let names: Vec<String> = disks.iter().map(|(device, _)| device.name.clone()).collect();
    let selected = state.selected_of(&names);
    let room = usize::from(area.height).saturating_sub(1);
    // The selected one is always among those that are shown.
    let first = (selected + 1).saturating_sub(room);
    for (index, (device, interval)) in disks.iter().enumerate().skip(first).take(room) {
        let style = match device.state {
            DeviceState::Failed => palette.style(Color::Red),
            DeviceState::Serving => Style::new(),
            _ => palette.style(Color::Yellow),
        };
        let marker = if index == selected { "> " } else { "  " };
        let text = join(&device.name, cells(device, interval.as_ref()), bars_of(interval.as_ref()));
        let style = if index == selected { style.add_modifier(Modifier::BOLD) } else { style };
        lines.push(Line::styled(format!("{marker}{text}"), style));
    }
    frame.render_widget(Paragraph::new(lines), area);
}

/// The cells of a disk, by [`COLUMNS`].
fn cells(device: &DeviceStatus, interval: Option<&Interval<'_>>) -> [String; COLUMNS.len()] {
    let state = device.state.word().to_owned();
    let Some(interval) = interval else {
        return std::array::from_fn(|index| if index == 0 { state.clone() } else { "-".to_owned() });
    };
    let [read, write, flush] = ["read", "write", "flush"].map(|operation| interval.requests(operation));
    let p99 = |requests: &RequestInterval| interval.numbers.time(requests.all().quantile(P99));
    [
        state,
        interval.rate(read.count),
        interval.hit_percent(),
        p99(&read),
        interval.rate(write.count),
        p99(&write),
        interval.rate(flush.count),
        p99(&flush),
        interval.numbers.bytes(interval.now.cache.dirty_pages.saturating_mul(PAGE_BYTES)),
        format!("{}%", interval.busy_percent()),
    ]
}

fn bars_of(interval: Option<&Interval<'_>>) -> [String; 2] {
    interval.map_or_else(Default::default, |interval| {
        let cache = &interval.now.cache;
        [bar(cache.resident_pages, cache.frames), bar(cache.dirty_pages, cache.dirty_limit_pages)]
    })
}

/// A part of a whole as a bar.
fn bar(part: u64, whole: u64) -> String {
    let width = BAR as u64;
    let filled = part.min(whole).saturating_mul(width).div_ceil(whole.max(1));
    (0..width).map(|at| if at < filled { '#' } else { '.' }).collect()
}

fn draw_details(
    frame: &mut Frame<'_>,
    state: &TopState,
    palette: Palette,
    area: Rect,
    device: &DeviceStatus,
    interval: Option<&Interval<'_>>,
) {
    let line = |at: u16| Rect { y: area.y + at, height: u16::from(at < area.height), ..area };
    let front_end =
        device.front_end.map_or_else(|| "no front-end".to_owned(), |end| format!("front-end: pid {}", end.pid));
    let size = device.image_bytes.map_or_else(|| "-".to_owned(), |bytes| Numbers::Short.bytes(bytes));
    let mode = if device.read_only { "read-only" } else { &device.mode };
    let about = format!(" {}  {}  {size}  {mode}  {front_end}", device.name, visible(&device.image));
    frame.render_widget(Line::styled(about, Modifier::BOLD), line(1));
    if let Some(why) = &device.why {
        frame.render_widget(Line::styled(format!(" {}", visible(why)), palette.style(Color::Red)), line(2));
        return;
    }
    let Some(interval) = interval else { return };
    if let Some(history) = state.history(&device.name) {
        let half = area.width / 2;
        for (x, label, values, colour) in
            [(0, " r/s ", &history.reads, Color::Blue), (half, " w/s ", &history.writes, Color::Green)]
        {
            let label_width = u16::try_from(label.len()).unwrap_or(0);
            frame.render_widget(Span::raw(label), Rect { x, width: label_width.min(area.width - x), ..line(2) });
            let width = (half.saturating_sub(label_width + 1)).min(area.width.saturating_sub(x + label_width));
            let shown = values.len().min(width.into());
            let newest = values.iter().skip(values.len() - shown).copied();
            let graph = Sparkline::default().data(newest).style(palette.style(colour));
            frame.render_widget(graph, Rect { x: x + label_width, width, ..line(2) });
        }
    }
    let mut at = 3;
    for operation in ["read", "write"] {
        let [memory, waited] = TopState::percentiles(interval, operation);
        let text = format!(" {operation:<6} memory {memory}   waited {waited}  (p50 p99 p99.9)");
        frame.render_widget(Line::raw(text), line(at));
        at += 1;
    }
    let [_, flush] = TopState::percentiles(interval, "flush");
    let lines = [
        format!(" flush  waited {flush}"),
        image_line(interval),
        cache_line(device, interval),
        waits_line(interval),
        format!(" why    {}", diagnosis::line(interval, Some(device))),
    ];
    let rest = Rect { y: area.y + at, height: area.height.saturating_sub(at), ..area };
    // The last line may be long.
    let text = Paragraph::new(lines.map(Line::raw).to_vec()).wrap(Wrap { trim: false });
    frame.render_widget(text, rest);
}

/// The operations on the image: their rates, and the 50th and 99th percentile of their latencies.
fn image_line(interval: &Interval<'_>) -> String {
    let operations = [("read", "reads/s"), ("write", "writes/s"), ("sync", "syncs/s")].map(|(operation, word)| {
        let latencies = interval.store_latencies(operation);
        let [median, p99] = [MEDIAN, P99].map(|share| interval.numbers.time(latencies.quantile(share)));
        format!("{} {word} {median} {p99}", interval.rate(interval.store(operation)))
    });
    format!(" image  {}", operations.join("  "))
}

fn cache_line(device: &DeviceStatus, interval: &Interval<'_>) -> String {
    let cache = &interval.now.cache;
    let bytes = |pages: u64| interval.numbers.bytes(pages.saturating_mul(PAGE_BYTES));
    let present = cache.frames.saturating_mul(PAGE_BYTES);
    let is_short = device.cache_wanted_bytes.is_some_and(|wanted| wanted < device.cache_bytes);
    let configured = match is_short || present != device.cache_bytes {
        true => format!(" (configured {})", interval.numbers.bytes(device.cache_bytes)),
        false => String::new(),
    };
    format!(
        " cache  {} of {}{configured}, dirty {} of {}, evicted/s {}",
        bytes(cache.resident_pages),
        bytes(cache.frames),
        bytes(cache.dirty_pages),
        bytes(cache.dirty_limit_pages),
        interval.rate(interval.cache(|cache| cache.evicted_pages)),
    )
}

/// Requests per second that had to wait, and what for.
fn waits_line(interval: &Interval<'_>) -> String {
    let limited = interval.now.limited.saturating_sub(interval.before.limited);
    format!(
        " waits/s  free page {}, write-back {}, limits {}",
        interval.rate(interval.cache(|cache| cache.stalls)),
        interval.rate(interval.cache(|cache| cache.throttled)),
        interval.rate(limited),
    )
}

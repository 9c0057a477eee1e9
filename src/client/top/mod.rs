//! `genblk top`: the activity of a daemon's disks, redrawn each second on a terminal; or one screen as text.
//!
//! `state.rs` holds the shown state, and `draw.rs` draws it.

mod draw;
mod state;

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use ratatui::backend::{Backend, TestBackend};
use ratatui::buffer::Cell;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::{DefaultTerminal, Terminal};

use super::sample::DaemonSample;
use crate::error::{Error, ErrorKind, Result};

use draw::Palette;
use state::{TopCommand, TopState};

/// How long the daemon may take to reply. Keys wait meanwhile.
const REPLY_TIMEOUT: Duration = Duration::from_secs(2);
/// Size of the screen as text: the minimum for which the layout is made.
const SCREEN_SIZE: (u16, u16) = (80, 24);

/// Options of `genblk top`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopOptions {
    /// The control socket.
    pub socket: PathBuf,
    /// How often it is redrawn.
    pub interval: Duration,
    /// Whether to print one screen as text, after one interval.
    pub once: bool,
    /// Whether to use colours on a terminal.
    pub with_colour: bool,
}

/// Draws until a key ends it. If the daemon ends meanwhile, its last numbers stay until the next daemon replies.
///
/// # Errors
/// The errors of [`super::ControlClient::connect`] at the start; [`ErrorKind::Config`] if there is no terminal;
/// [`ErrorKind::System`] if it cannot be drawn on.
pub fn top(options: &TopOptions) -> Result<()> {
    let has_terminal = io::stdout().is_terminal() && io::stdin().is_terminal();
    if !has_terminal && !options.once {
        let advice = "\"genblk top --once\" prints one screen, \"genblk stat 1\" a report each second";
        return Err(Error::new(ErrorKind::Config, format!("genblk top needs a terminal; {advice}")));
    }
    let mut state = TopState::new(take_sample(options)?);
    if options.once {
        thread::sleep(options.interval);
        state.update(take_sample(options));
        return super::stat::print(&screen_text(&state)).map(drop);
    }
    let failed = |e| Error::io(ErrorKind::System, "cannot draw on the terminal", e);
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let ended = run(&mut terminal, options, &mut state);
    // Restore the terminal for the shell, even after an error.
    let restored = ratatui::try_restore();
    ended.and(restored).map_err(failed)
}

fn take_sample(options: &TopOptions) -> Result<DaemonSample> {
    DaemonSample::take(&options.socket, Instant::now() + REPLY_TIMEOUT)
}

fn run(terminal: &mut DefaultTerminal, options: &TopOptions, state: &mut TopState) -> io::Result<()> {
    let palette = Palette { has_colour: options.with_colour };
    let mut next = Instant::now() + options.interval;
    loop {
        terminal.draw(|frame| draw::draw(frame, state, palette))?;
        while event::poll(next.saturating_duration_since(Instant::now()))? {
            let Some(command) = command_of(&event::read()?) else { continue };
            if command == TopCommand::Quit {
                return Ok(());
            }
            state.apply(command);
            terminal.draw(|frame| draw::draw(frame, state, palette))?;
        }
        if !state.is_paused() {
            state.update(take_sample(options));
        }
        next = Instant::now() + options.interval;
    }
}

/// The command of a key; a change of the terminal's size only redraws.
fn command_of(event: &Event) -> Option<TopCommand> {
    let key = match event {
        Event::Key(key) if key.kind != KeyEventKind::Release => key,
        Event::Resize(..) => return Some(TopCommand::Redraw),
        _ => return None,
    };
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return matches!(key.code, KeyCode::Char('c')).then_some(TopCommand::Quit);
    }
    Some(match key.code {
        KeyCode::Char('q') => TopCommand::Quit,
        KeyCode::Esc => TopCommand::Back,
        KeyCode::Char('s') => TopCommand::NextSort,
        KeyCode::Up | KeyCode::Char('k') => TopCommand::Up,
        KeyCode::Down | KeyCode::Char('j') => TopCommand::Down,
        KeyCode::Char('w') => TopCommand::Histogram,
        KeyCode::Char('p' | ' ') => TopCommand::Pause,
        KeyCode::Char('h' | '?') => TopCommand::Help,
        _ => return None,
    })
}

/// The screen as text, without trailing spaces.
fn screen_text(state: &TopState) -> String {
    let Ok(mut terminal) = Terminal::new(TestBackend::new(SCREEN_SIZE.0, SCREEN_SIZE.1));
    let Ok(_) = terminal.draw(|frame| draw::draw(frame, state, Palette { has_colour: false }));
    text_of(terminal.backend())
}

fn text_of(backend: &TestBackend) -> String {
    let size = backend.size().unwrap_or_default();
    let line = |y| {
        let cells = (0..size.width).filter_map(|x| backend.buffer().cell((x, y))).map(Cell::symbol);
        cells.collect::<String>().trim_end().to_owned() + "\n"
    };
    (0..size.height).map(line).collect()
}

#[cfg(test)]
mod tests;

//! `genblk top`: what the disks of a daemon do, redrawn each second on a terminal; or one picture of it as text.
//!
//! `state.rs` keeps what is shown, and `draw.rs` draws it.

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
/// Size of the picture as text: the least for which the screen is made.
const PICTURE: (u16, u16) = (80, 24);

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopOptions {
    /// The control socket.
    pub socket: PathBuf,
    /// How often it is redrawn.
    pub interval: Duration,
    /// One picture as text, after an interval.
    pub once: bool,
    /// Whether colours are wanted, where it is a terminal.
    pub with_colour: bool,
}

/// Draws until a key ends it. Of a daemon that ends meanwhile the last numbers stay, and the next one is shown when it
/// replies.
///
/// # Errors
/// The errors of [`super::ControlClient::connect`] at the start; [`ErrorKind::Config`] if there is no terminal;
/// [`ErrorKind::System`] if it cannot be drawn on.
pub fn top(options: &TopOptions) -> Result<()> {
    let has_terminal = io::stdout().is_terminal() && io::stdin().is_terminal();
    if !has_terminal && !options.once {
        let advice = "\"genblk top --once\" prints one picture, \"genblk stat 1\" the numbers of each second";
        return Err(Error::new(ErrorKind::Config, format!("genblk top needs a terminal; {advice}")));
    }
    let mut state = TopState::new(take(options)?);
    if options.once {
        thread::sleep(options.interval);
        state.update(take(options));
        return super::stat::print(&picture(&state)).map(drop);
    }
    let failed = |e| Error::io(ErrorKind::System, "cannot draw on the terminal", e);
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let ended = run(&mut terminal, options, &mut state);
    // The shell gets its terminal back, whatever has happened.
    let restored = ratatui::try_restore();
    ended.and(restored).map_err(failed)
}

fn take(options: &TopOptions) -> Result<DaemonSample> {
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
            state.update(take(options));
        }
        next = Instant::now() + options.interval;
    }
}

/// What a key means; redrawing alone for a terminal that has another size.
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

/// The screen as text, without the spaces at the ends of lines.
fn picture(state: &TopState) -> String {
    let Ok(mut terminal) = Terminal::new(TestBackend::new(PICTURE.0, PICTURE.1));
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

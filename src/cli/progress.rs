//! Progress bars: on a terminal, and only for what takes more than a second.

use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Steps of a bar; work is reported as a fraction.
const STEPS: u64 = 1000;
const PATIENCE: Duration = Duration::from_secs(1);

/// A bar that shows itself after a second and is gone when dropped.
pub struct Progress {
    bar: ProgressBar,
    clock: Option<(Sender<()>, JoinHandle<()>)>, // none where there is no terminal
}

impl Progress {
    /// Starts to wait for work whose extent is not known: a spinner.
    pub fn spinner(what: &'static str) -> Self {
        Self::start(what, "{spinner} {msg} {elapsed}")
    }

    /// Starts to wait for work that reports how much of it is done.
    pub fn bar(what: &'static str) -> Self {
        Self::start(what, "{msg} {wide_bar} {percent:>3} %  {elapsed}, about {eta} left")
    }

    /// Says how much is done, from 0 to 1.
    pub fn set(&self, done: f32) {
        self.bar.set_position((done.clamp(0.0, 1.0) * STEPS as f32) as u64);
    }

    /// As [`Progress::set`], for those who ask whether to go on: always.
    pub fn go_on(&self, done: f32) -> ControlFlow<()> {
        self.set(done);
        ControlFlow::Continue(())
    }

    fn start(what: &'static str, template: &str) -> Self {
        let bar = ProgressBar::with_draw_target(Some(STEPS), ProgressDrawTarget::hidden())
            .with_message(what)
            .with_style(ProgressStyle::with_template(template).expect("the templates above are well-formed"));
        let clock = io::stderr().is_terminal().then(|| {
            let (done, waiting) = mpsc::channel::<()>();
            let bar = bar.clone();
            let show = move || {
                if waiting.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                    bar.enable_steady_tick(Duration::from_millis(100));
                }
            };
            (done, std::thread::spawn(show))
        });
        Self { bar, clock }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((done, clock)) = self.clock.take() {
            drop(done);
            let _ = clock.join();
        }
        self.bar.finish_and_clear();
    }
}

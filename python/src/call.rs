//! Calls into the library: without the GIL, with an ear for signals, and no panic gets out.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use pyo3::prelude::*;

use imagehere::backend::ProgressFn;

use crate::errors::{named, raise};

/// How often signals are looked at.
const SIGNALS: Duration = Duration::from_millis(50);

/// Runs `work` on a thread of its own while this one, without the GIL, waits for it and looks at signals. Ctrl-C makes the
/// progress function that `work` was given say to stop; its exception is raised once `work` has returned.
pub fn run<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&mut ProgressFn<'_>) -> imagehere::Result<T> + Send,
) -> PyResult<T> {
    let stop = AtomicBool::new(false);
    let mut interrupted = None;
    let done = py.detach(|| {
        thread::scope(|scope| {
            let (working, waiting) = mpsc::channel::<()>();
            let stop = &stop;
            let worker = scope.spawn(move || {
                let _working = working; // dropped when the work is done
                let mut progress = |_: f32| match stop.load(Ordering::Relaxed) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                };
                catch_unwind(AssertUnwindSafe(|| work(&mut progress)))
            });
            while let Err(RecvTimeoutError::Timeout) = waiting.recv_timeout(SIGNALS) {
                if interrupted.is_none()
                    && let Err(signal) = Python::attach(|py| py.check_signals())
                {
                    interrupted = Some(signal);
                    stop.store(true, Ordering::Relaxed);
                }
            }
            worker.join().and_then(|caught| caught)
        })
    });
    if let Some(signal) = interrupted {
        return Err(signal);
    }
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(raise(py, &error)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
            Err(named(py, "InternalError", format!("internal error: {text}. Please report it")))
        }
    }
}

//! A pseudo-terminal to run `ctr -t` on.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::command::eventually;

/// A command on a terminal of its own. Dropping it kills the command.
pub struct Terminal {
    child: Child,
    controller: File,
    screen: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Starts `command` on a terminal of the given size.
    ///
    /// # Errors
    /// When the terminal cannot be made or the command cannot start.
    pub fn start(command: &mut Command, rows: u16, columns: u16) -> std::io::Result<Self> {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&controller)?;
        unlockpt(&controller)?;
        let name = ptsname(&controller, Vec::new())?;
        let name = name.to_str().map_err(std::io::Error::other)?;
        let user = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NOCTTY.bits().cast_signed())
            .open(name)?;
        tcsetwinsize(&controller, size(rows, columns))?;
        let controller = File::from(controller);
        let (input, output) = (user.try_clone()?, user.try_clone()?);
        let child = command
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output))
            .stderr(Stdio::from(user))
            .spawn()?;
        // The command line object keeps our copies of the terminal's user side; without them, end-of-file
        // is seen when the command exits.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let screen = Arc::new(Mutex::new(Vec::new()));
        let (mut from, to) = (controller.try_clone()?, Arc::clone(&screen));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO says that the other side is closed.
            while let Ok(read @ 1..) = std::io::Read::read(&mut from, &mut buffer) {
                let mut screen = to.lock().unwrap_or_else(PoisonError::into_inner);
                screen.extend_from_slice(buffer.get(..read).unwrap_or_default());
            }
        });
        Ok(Self {
            child,
            controller,
            screen,
        })
    }

    /// Types `text`.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn type_in(&mut self, text: &str) -> std::io::Result<()> {
        self.controller.write_all(text.as_bytes())
    }

    /// Changes the terminal's size, as a window manager does, and tells the command.
    ///
    /// # Errors
    /// When the terminal or the command is gone.
    pub fn resize(&self, rows: u16, columns: u16) -> std::io::Result<()> {
        tcsetwinsize(&self.controller, size(rows, columns))?;
        // The terminal is not the command's controlling one, so the kernel sends no SIGWINCH by itself.
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let pid = pid.ok_or(std::io::ErrorKind::NotFound)?;
        Ok(rustix::process::kill_process(
            pid,
            rustix::process::Signal::WINCH,
        )?)
    }

    /// Everything printed so far.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Waits until the screen satisfies `done`; says whether it did.
    pub fn wait_screen(&self, limit: Duration, done: impl Fn(&str) -> bool) -> bool {
        eventually(limit, || done(&self.screen()))
    }

    /// Waits for the command's exit code; `None` when it is still running at the limit.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn wait(&mut self, limit: Duration) -> std::io::Result<Option<i32>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // Both fail only for a process that is already gone.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

//! A shell on the guest's console: what a test does in the guest stands between what it does outside.

use std::cell::Cell;
use std::time::{Duration, Instant};

use dragonball::Vm;
use dragonball::config::{ConsoleConfig, VmConfig};

use crate::guest::Scratch;
use crate::kernels::Kernel;
use crate::{LONG, start, wait_for};

/// A running machine whose init does what it is told.
#[derive(Debug)]
pub struct Shell {
    /// The machine.
    pub vm: Vm,
    commands: Cell<u32>,
}

impl Shell {
    /// The configuration of a machine for [`start`](Self::start), to be completed by the test.
    pub fn config(kernel: &Kernel, scratch: &Scratch, console: ConsoleConfig) -> VmConfig {
        let device = match console {
            ConsoleConfig::Serial => "ttyS0",
            _ => "hvc0",
        };
        let script = format!(
            "exec < /dev/{device} > /dev/{device} 2>&1; stty -echo\n\
             soon() {{ until eval \"$1\"; do sleep 0.1; done 2>/dev/null; }}\n\
             echo ready; n=0\n\
             while read -r line; do n=$((n+1)); echo \"<<$n\"; eval \"$line\"; echo \">>$n $?.\"; done"
        );
        kernel.config(scratch, &script, console)
    }

    /// Starts the machine and waits for the shell.
    pub fn start(config: VmConfig) -> Self {
        let vm = start(config);
        wait_for(&vm, "ready");
        Self {
            vm,
            commands: Cell::new(0),
        }
    }

    /// Runs one line of shell (`soon CONDITION` waits for something) and returns its output.
    ///
    /// # Panics
    /// The line fails or does not end.
    pub fn run(&self, line: &str) -> String {
        let number = self.commands.get() + 1;
        self.commands.set(number);
        let typed = format!("{line}\n");
        assert_eq!(self.vm.console_input(typed.as_bytes()), typed.len(), "{line}");
        let (begin, done) = (format!("<<{number}"), format!(">>{number} "));
        let end = Instant::now() + LONG;
        loop {
            // In this order: what was printed before the end counts.
            let ended = self.vm.wait_timeout(Duration::from_millis(10));
            let console = self.vm.console().tail(1000);
            // The last line may not be whole yet.
            let status = console.iter().find_map(|line| {
                let (status, _) = line.strip_prefix(&done)?.split_once('.')?;
                Some(status)
            });
            if let Some(status) = status {
                let output: Vec<_> = console
                    .iter()
                    .skip_while(|line| **line != begin)
                    .skip(1)
                    .take_while(|line| !line.starts_with(&done))
                    .map(String::as_str)
                    .collect();
                let output = output.join("\n");
                assert_eq!(status, "0", "{line}\n{output}");
                return output;
            }
            assert_eq!(ended, None, "{line}\n{}", console.join("\n"));
            assert!(
                Instant::now() < end,
                "{line} does not end:\n{}",
                console.join("\n")
            );
        }
    }
}

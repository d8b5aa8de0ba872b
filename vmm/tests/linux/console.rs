//! Typing on both consoles.

use dragonball::config::ConsoleConfig;
use dragonball::vm::ExitReason;

use crate::guest::Scratch;
use crate::{CMDLINE, LONG, config, start, wait_for};

#[test]
fn input_when_typed_on_either_console_reaches_the_guest() {
    let scratch = Scratch::new();
    for (console, device) in [(ConsoleConfig::Hvc, "hvc0"), (ConsoleConfig::Serial, "ttyS0")] {
        let mut config = config(
            &scratch,
            &format!(
                "exec < /dev/{device} > /dev/{device} 2>&1; stty -echo\n\
                 echo ready; while read -r line; do [ \"$line\" = end ] && break; echo \"got ${{#line}} <$line>\"; done"
            ),
        );
        config.console = console;
        config.boot.cmdline = CMDLINE.replace("hvc0", device);
        let vm = start(config);
        wait_for(&vm, "ready");
        assert_eq!(vm.console_input(b"hello\n"), 6);
        wait_for(&vm, "got 5 <hello>");
        // More than the FIFO of a UART and than one line discipline read.
        let long = "x".repeat(1000);
        for round in 0..5 {
            let line = format!("{round}{long}\n");
            assert_eq!(vm.console_input(line.as_bytes()), line.len());
            wait_for(&vm, &format!("got 1001 <{round}xxx"));
        }
        assert_eq!(vm.console_input(b"end\n"), 4);
        assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
        // Nobody takes it any more: what is kept is bounded.
        assert!(vm.console_input(&[b'x'; 100_000]) <= 4096 + 64);
    }
}

#[test]
fn input_when_there_is_no_console_is_not_accepted() {
    let scratch = Scratch::new();
    let mut config = config(&scratch, "true");
    config.console = ConsoleConfig::Off;
    let vm = start(config);
    assert_eq!(vm.console_input(b"x"), 0);
    assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
}

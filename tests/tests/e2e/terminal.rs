//! Containers on a terminal.

use tests::Case;
use tests::terminal::Terminal;

/// Whether the screen shows this line; a terminal ends lines with carriage return and line feed.
fn shows(screen: &str, line: &str) -> bool {
    screen.lines().any(|l| l.trim_end_matches('\r') == line)
}

#[test]
fn terminal_when_resized_tells_the_process() {
    let case = Case::begin("tty");
    let container = case.container();
    let mut command = container.run(&["sh"]).flag("-t").command();
    let mut terminal = Terminal::start(&mut command, 40, 100).unwrap();
    terminal
        .type_in("test -t 0 && test -t 1 && echo is-a-tty-$((40+2))\n")
        .unwrap();
    assert!(
        terminal.wait_screen(case.limit(), |s| shows(s, "is-a-tty-42")),
        "screen:\n{}",
        terminal.screen()
    );
    // The first size arrives after the start, so ask until it is there.
    let ask = |terminal: &mut Terminal, expected: &str| {
        for _ in 0..60 {
            terminal.type_in("stty size\n").unwrap();
            if terminal.wait_screen(std::time::Duration::from_secs(2), |s| shows(s, expected)) {
                return;
            }
        }
        panic!("size {expected} not seen; screen:\n{}", terminal.screen());
    };
    ask(&mut terminal, "40 100");
    terminal.resize(50, 132).unwrap();
    ask(&mut terminal, "50 132");
    terminal.type_in("exit 7\n").unwrap();
    assert_eq!(
        terminal.wait(case.limit()).unwrap(),
        Some(7),
        "screen:\n{}",
        terminal.screen()
    );
}

#[test]
fn terminal_when_used_by_exec_carries_both_directions() {
    let case = Case::begin("exec-tty");
    let container = case.container();
    container.sleeping();
    let mut command = container.exec_command(
        &["-t"],
        &["sh", "-c", "read -r a; echo \"<$a>\"; echo e >&2; exit 4"],
    );
    let mut terminal = Terminal::start(&mut command, 24, 80).unwrap();
    terminal.type_in("typed\n").unwrap();
    assert_eq!(
        terminal.wait(case.limit()).unwrap(),
        Some(4),
        "screen:\n{}",
        terminal.screen()
    );
    let done = terminal.wait_screen(case.limit(), |s| shows(s, "<typed>") && shows(s, "e"));
    assert!(done, "screen:\n{}", terminal.screen());
}

#[test]
fn terminal_when_interrupt_is_typed_signals_the_process() {
    let case = Case::begin("tty-interrupt");
    let container = case.container();
    let script = "trap 'echo interrupted; exit 8' INT; echo ready; while :; do sleep 1; done";
    let mut terminal = Terminal::start(
        &mut container.run(&["sh", "-c", script]).flag("-t").command(),
        24,
        80,
    )
    .unwrap();
    assert!(
        terminal.wait_screen(case.limit(), |s| shows(s, "ready")),
        "screen:\n{}",
        terminal.screen()
    );
    terminal.type_in("\x03").unwrap();
    assert_eq!(
        terminal.wait(case.limit()).unwrap(),
        Some(8),
        "screen:\n{}",
        terminal.screen()
    );
}

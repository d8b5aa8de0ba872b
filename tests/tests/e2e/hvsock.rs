//! `kata.hvsock`, the way of outside tools into a guest.

use std::io::ErrorKind;

use tests::case::skipped_under_runc;
use tests::{Case, hvsock};

#[test]
fn hvsock_when_a_tool_connects_reaches_the_agent_and_only_open_ports() {
    if skipped_under_runc("there is no guest") {
        return;
    }
    const SERVING: i32 = 1;
    let case = Case::begin("hvsock");
    let container = case.container();
    container.sleeping();
    let socket = hvsock::socket(case.daemon().namespace(), container.id());
    let connect = |port| hvsock::connect(&socket, port, case.limit());
    // Two at once, and the runtime's own connection beside them.
    let (mut first, mut second) = (connect(1024).unwrap(), connect(1024).unwrap());
    assert_eq!(hvsock::health(&mut first).unwrap(), SERVING);
    drop(first);
    assert_eq!(hvsock::health(&mut second).unwrap(), SERVING);
    assert_eq!(connect(9999).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    container.exec(&[], &["true"]).expect_code(0);
}

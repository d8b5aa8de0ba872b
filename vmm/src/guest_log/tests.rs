use super::recorder::{assert_limited, install, seen};
use super::*;

fn written(limit: &Limit, period: u64, lines: u32) -> Vec<Option<u64>> {
    let admitted = (0..lines).filter_map(|_| limit.admit_in(period));
    admitted.map(|line| line.suppressed).collect()
}

#[test]
fn lines_when_too_many_are_counted_and_told_with_the_next() {
    let limit = Limit::new();
    assert_eq!(written(&limit, 7, 3), [None; 3]);
    assert_eq!(written(&limit, 7, 1000), [None; BURST as usize - 3]);
    let mut next = vec![None; 2];
    next[0] = Some(1003 - u64::from(BURST));
    assert_eq!(written(&limit, 9, 2), next);
    // Nothing was left out of the period before.
    assert_eq!(written(&limit, 10, 1), [None]);
}

#[test]
fn lines_when_two_sites_write_do_not_limit_each_other() {
    let (loud, quiet) = (Limit::new(), Limit::new());
    written(&loud, 1, 100);
    assert_eq!(written(&quiet, 1, 1), [None]);
}

#[test]
fn lines_when_a_site_never_stops_do_not_start_again() {
    let limit = Limit(AtomicU64::new(3 << 32 | u64::from(u32::MAX - 1)));
    assert_eq!(written(&limit, 3, 3), []);
    assert_eq!(written(&limit, 4, 1), [Some(u64::from(u32::MAX - BURST))]);
}

#[test]
fn values_when_long_are_cut_and_stay_on_one_line() {
    assert_eq!(Clip("short").to_string(), "short");
    assert_eq!(Clip("a\nb\x1b[1m").to_string(), "a\\nb\\u{1b}[1m");
    let exact = "x".repeat(MAX_VALUE_BYTES);
    assert_eq!(Clip(&exact).to_string(), exact);
    let long = "é\n".repeat(1 << 20);
    let cut = Clip(&long).to_string();
    assert!(
        cut.len() <= MAX_VALUE_BYTES + '…'.len_utf8() && cut.ends_with('…'),
        "{cut}"
    );
    assert!(!cut.contains('\n'));
}

#[test]
fn macro_when_flooded_writes_a_burst_of_short_lines() {
    let name = vec![b'\n'; 1 << 20];
    assert_limited(&["test: of the guest"], 1000, || {
        for number in 0..1000u32 {
            guest_log!(DEBUG, number, name = ?name, shown = %number, text = "plain", "test: of the guest");
        }
    });
}

#[test]
fn macro_when_suppressed_does_not_format() {
    struct Costly;
    impl Display for Costly {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            install();
            f.write_str("value")
        }
    }
    install();
    let before = seen("test: costly").lines;
    let mut formatted = 0;
    for _ in 0..100 {
        guest_log!(
            WARN,
            value = %{
                formatted += 1;
                Costly
            },
            "test: costly"
        );
    }
    assert_eq!(u64::from(formatted as u32), seen("test: costly").lines - before);
    assert!(formatted <= 2 * BURST as i32);
}

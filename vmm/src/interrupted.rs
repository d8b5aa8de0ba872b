//! System calls that a signal interrupts (EINTR) are made again: here, and nowhere else. vCPU threads get signals all the time,
//! other threads when somebody traces the process.

use std::io;

/// Makes `call` until it is not interrupted.
///
/// # Errors
/// Its error.
pub fn again<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// As [`again`], for a call into libc: a negative result means that errno says why.
///
/// # Errors
/// The error of errno.
pub fn again_libc(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    again(|| usize::try_from(call()).map_err(|_| io::Error::last_os_error()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_when_interrupted_is_made_again_and_other_errors_are_not() {
        let mut outcomes = vec![Ok(7), Err(libc::EINTR), Err(libc::EINTR)];
        let mut call = || outcomes.pop().unwrap().map_err(io::Error::from_raw_os_error);
        assert_eq!(again(&mut call).unwrap(), 7);
        assert!(outcomes.is_empty());
        let mut calls = 0;
        let error = again(|| -> io::Result<()> {
            calls += 1;
            Err(io::Error::from_raw_os_error(libc::EAGAIN))
        });
        assert_eq!(
            (error.unwrap_err().raw_os_error(), calls),
            (Some(libc::EAGAIN), 1)
        );
    }
}

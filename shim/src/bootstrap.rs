//! How containerd and `start` talk: parameters on stdin, the address on stdout.
//!
//! containerd ≥ 2.3 writes a protobuf `BootstrapParams` and takes a protobuf `BootstrapResult`, which may announce Task
//! v3. Older releases write nothing or the runtime options as an `Any`, and every one of them takes a bare address, which
//! means Task v2. An `Any` also decodes as `BootstrapParams`, so the parameters only count if they name this instance.
//!
//! There is nothing that tells 1.7, which refuses version 3, from 2.0 to 2.2, which take it as JSON: `MAX_SHIM_VERSION` is 2
//! in all of them. A bare address costs the latter nothing but the calls of `start` and `delete` for each container.

use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use containerd_shim_protos::TASK_API_VERSION;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::address::Address;
use crate::options;

/// Most that is read from stdin, bytes; options with an inline configuration are the largest sender.
const MAX_STDIN: u64 = 4 << 20;

/// How long stdin may stay open: containerd closes it at once, a person at a shell may not.
const STDIN_PATIENCE: Duration = Duration::from_secs(3);

/// Reads what the caller put on stdin; an empty answer for a terminal, and never hangs.
pub fn read_stdin() -> Vec<u8> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Vec::new();
    }
    read_bounded(stdin.lock(), MAX_STDIN, STDIN_PATIENCE)
}

/// Reads to the end of `source`, at most `limit` bytes and `patience` long.
fn read_bounded(source: impl Read + AsFd, limit: u64, patience: Duration) -> Vec<u8> {
    let deadline = Instant::now() + patience;
    let mut source = source.take(limit);
    let mut bytes = Vec::new();
    let mut chunk = [0; 8192];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(timeout) = Timespec::try_from(left) else {
            return bytes;
        };
        match poll(
            &mut [PollFd::new(source.get_ref(), PollFlags::IN)],
            Some(&timeout),
        ) {
            Ok(0) => return bytes,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return bytes,
            Ok(_) => {}
        }
        match source.read(&mut chunk) {
            Ok(0) => return bytes,
            Ok(count) => bytes.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return bytes,
        }
    }
}

/// The parameters in `stdin`, if it holds some for this instance.
pub fn params(stdin: &[u8], namespace: &str, id: &str) -> Option<BootstrapParams> {
    let params = BootstrapParams::parse_from_bytes(stdin).ok()?;
    (params.instance_id == id && params.namespace == namespace).then_some(params)
}

/// Whether the parameters ask for verbose logs: the level is an open enum, smaller is more verbose.
pub fn wants_debug(params: &BootstrapParams) -> bool {
    params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG as i32
}

/// The options of the runtime class, encoded as an `Any`: an extension of the parameters, or all of stdin. `None` when there
/// are none of this runtime.
pub fn runtime_options(stdin: &[u8], params: Option<&BootstrapParams>) -> Option<Vec<u8>> {
    let any = match params {
        Some(params) => params
            .extensions
            .iter()
            .filter_map(|extension| extension.value.as_ref())
            .find(|any| options::is_options(any))
            .cloned(),
        None => Any::parse_from_bytes(stdin).ok().filter(options::is_options),
    };
    any.and_then(|any| any.write_to_bytes().ok())
}

/// What to print on stdout.
///
/// # Errors
/// When the message does not encode.
pub fn reply(params: Option<&BootstrapParams>, address: &Address) -> Result<Vec<u8>, protobuf::Error> {
    let address = address.to_string();
    if params.is_none() {
        return Ok(address.into_bytes());
    }
    let result = BootstrapResult {
        version: TASK_API_VERSION,
        address,
        protocol: "ttrpc".to_owned(),
        ..Default::default()
    };
    result.write_to_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn encoded(id: &str, namespace: &str) -> Vec<u8> {
        BootstrapParams {
            instance_id: id.into(),
            namespace: namespace.into(),
            ..Default::default()
        }
        .write_to_bytes()
        .unwrap()
    }

    #[test]
    fn bootstrap_when_of_this_instance_is_accepted() {
        assert!(params(&encoded("i", "n"), "n", "i").is_some());
    }

    #[test]
    fn bootstrap_when_anything_else_is_legacy() {
        // `Any{type_url, value}` has the same field numbers and wire types as instance_id and namespace.
        let any = encoded("runtimeoptions.v1.Options", "\u{12}\u{2}/c");
        for stdin in [
            any,
            encoded("other", "n"),
            encoded("i", "other"),
            Vec::new(),
            b"{\"version\":3}".to_vec(),
        ] {
            assert!(params(&stdin, "n", "i").is_none(), "{stdin:?}");
        }
    }

    /// `BootstrapParams` as containerd 2.3 writes them, a field on each line: ids, log level DEBUG (a negative enum takes ten
    /// bytes), version, the three addresses, one extension with the runtime's options, and the folder of sockets.
    const GOLDEN: &[u8] = b"\
        \x0a\x02p1\
        \x12\x06k8s.io\
        \x18\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x01\
        \x22\x052.3.0\
        \x2a\x0c/c.sock.ttrp\
        \x32\x07/c.sock\
        \x3a\x05/bin/\
        \x42\x23\x0a\x21\x0a\x19runtimeoptions.v1.Options\x12\x04\x12\x02/c\
        \x4a\x06/run/s";

    #[test]
    fn params_when_containerd_sends_them_are_read() {
        let params = params(GOLDEN, "k8s.io", "p1").unwrap();

        assert!(wants_debug(&params));
        assert_eq!(params.containerd_ttrpc_address, "/c.sock.ttrp");
        assert_eq!(params.socket_dir.as_deref(), Some("/run/s"));
        let options = runtime_options(GOLDEN, Some(&params)).unwrap();
        assert_eq!(options, b"\x0a\x19runtimeoptions.v1.Options\x12\x04\x12\x02/c");
    }

    #[test]
    fn options_when_alone_on_stdin_are_those() {
        let options = b"\x0a\x19runtimeoptions.v1.Options\x12\x04\x12\x02/c";
        assert_eq!(runtime_options(options, None).as_deref(), Some(&options[..]));

        for other in [&b""[..], b"\x0a\x03abc", b"{\"version\":3}", b"\xff"] {
            assert_eq!(runtime_options(other, None), None, "{other:?}");
        }
    }

    #[test]
    fn reply_when_containerd_gave_parameters_is_version_3_byte_for_byte() {
        let address = Address::of_path("/s".into()).unwrap();

        let reply = reply(Some(&BootstrapParams::new()), &address).unwrap();

        assert_eq!(reply, b"\x08\x03\x12\x09unix:///s\x1a\x05ttrpc");
    }

    #[test]
    fn reply_when_legacy_is_the_bare_address() {
        let address = Address::of_path("/s".into()).unwrap();

        let bare = reply(None, &address).unwrap();
        let result = reply(Some(&BootstrapParams::new()), &address).unwrap();

        assert_eq!(bare, b"unix:///s");
        let result = BootstrapResult::parse_from_bytes(&result).unwrap();
        assert_eq!(
            (result.version, result.address.as_str(), result.protocol.as_str()),
            (3, "unix:///s", "ttrpc")
        );
    }

    #[test]
    fn stdin_when_left_open_does_not_hang() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"abc").unwrap();

        // What is there is read, however late.
        let bytes = read_bounded(reader, 100, Duration::from_millis(50));

        assert_eq!(bytes, b"abc");
        drop(writer);
    }

    #[test]
    fn stdin_when_endless_is_cut() {
        let zero = std::fs::File::open("/dev/zero").unwrap();

        assert_eq!(read_bounded(zero, 10_000, Duration::from_secs(60)).len(), 10_000);
    }
}

//! The command line: Go's flag syntax, as every containerd passes it.
//!
//! `-flag value`, `-flag=value` and the same with two dashes; flags come before the action. A flag we do not know is
//! remembered as a warning instead of an error, so that a newer containerd can add one.

/// What the binary is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// No action word: serve (only sensible as the child of `start`).
    Run,
    /// `start`
    Start,
    /// `delete`
    Delete,
    /// `-v`, `-version`
    Version,
    /// `-info`
    Info,
    /// `-h`, `-help`
    Help,
}

/// A parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// `-namespace`: containerd namespace.
    pub namespace: String,
    /// `-id`: id of the container, which is the sandbox' for `run`.
    pub id: String,
    /// `-address`: containerd's gRPC socket.
    pub address: String,
    /// `-publish-binary`: containerd's binary; events go over ttrpc instead, see [`crate::forward`].
    pub publish_binary: String,
    /// `-bundle`: only given to `delete`.
    pub bundle: String,
    /// `-socket`: path of the socket to use instead of the hashed one.
    pub socket: String,
    /// `-debug`: verbose logs.
    pub debug: bool,
    /// Arguments that were not understood and skipped, ready for a log line.
    pub warnings: Vec<String>,
}

/// Why a command line cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// A flag that takes a value is the last word.
    #[error("flag -{0} needs a value")]
    MissingValue(String),
    /// A boolean flag with something else than a boolean.
    #[error("flag -{flag}: {value:?} is not a boolean")]
    NotBoolean {
        /// Flag.
        flag: String,
        /// Its value.
        value: String,
    },
    /// A word where the action belongs.
    #[error("unknown action {0:?}; actions are start and delete, flags come before the action")]
    UnknownAction(String),
    /// A flag that the action cannot do without.
    #[error("action {action} needs flag -{flag}")]
    Required {
        /// Action word.
        action: &'static str,
        /// Missing flag.
        flag: &'static str,
    },
    /// An id or namespace that could leave its folder.
    #[error("flag -{flag}: {value:?} is not a containerd identifier")]
    BadIdentifier {
        /// Flag.
        flag: &'static str,
        /// Its value.
        value: String,
    },
}

/// Longest file name on Linux; ids become file names.
const MAX_IDENTIFIER: usize = 255;

impl Args {
    /// Parses the words after the program's name and checks that the action has what it needs.
    ///
    /// # Errors
    /// [`ArgsError`] naming the flag or action.
    pub fn parse<I, S>(words: I) -> Result<Self, ArgsError>
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        let mut parser = Parser::default();
        parser.consume(words.into_iter().map(Into::into).collect())?;
        let args = parser.finish()?;
        args.check()?;
        Ok(args)
    }

    fn check(&self) -> Result<(), ArgsError> {
        let action = match self.action {
            Action::Run => "run",
            Action::Start => "start",
            Action::Delete => "delete",
            Action::Version | Action::Info | Action::Help => return Ok(()),
        };
        for (flag, value) in [("namespace", &self.namespace), ("id", &self.id)] {
            if value.is_empty() {
                return Err(ArgsError::Required { action, flag });
            }
            let safe = value.len() <= MAX_IDENTIFIER
                && value != "."
                && value != ".."
                && !value.contains(|c: char| c == '/' || c.is_control());
            if !safe {
                return Err(ArgsError::BadIdentifier {
                    flag,
                    value: value.clone(),
                });
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Parser {
    action_word: Option<Action>,
    flag_action: Option<Action>,
    namespace: String,
    id: String,
    address: String,
    publish_binary: String,
    bundle: String,
    socket: String,
    debug: bool,
    warnings: Vec<String>,
}

impl Parser {
    fn consume(&mut self, words: Vec<String>) -> Result<(), ArgsError> {
        let mut words = words.into_iter().peekable();
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
                self.action(&word)?;
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            if flag.is_empty() {
                continue; // `--` ends the flags; what follows is the action.
            }
            let (flag, inline) = match flag.split_once('=') {
                Some((flag, value)) => (flag, Some(value.to_owned())),
                None => (flag, None),
            };
            if self.switch(flag, inline.as_deref())? {
                continue;
            }
            if let Some(slot) = self.slot(flag) {
                *slot = inline
                    .or_else(|| words.next())
                    .ok_or_else(|| ArgsError::MissingValue(flag.to_owned()))?;
                continue;
            }
            // The word after an unknown flag is its value, unless it is plainly something else.
            if inline.is_none() {
                words.next_if(|next| !next.starts_with('-') && action_of(next).is_none());
            }
            self.warnings.push(format!("unknown flag -{flag} ignored"));
        }
        Ok(())
    }

    /// Flags without a value; tells whether `flag` was one.
    fn switch(&mut self, flag: &str, value: Option<&str>) -> Result<bool, ArgsError> {
        let action = match flag {
            "debug" => None,
            "v" | "version" => Some(Action::Version),
            "info" => Some(Action::Info),
            "h" | "help" => Some(Action::Help),
            _ => return Ok(false),
        };
        let on = match value {
            None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => true,
            Some("0" | "f" | "F" | "false" | "FALSE" | "False") => false,
            Some(value) => {
                return Err(ArgsError::NotBoolean {
                    flag: flag.to_owned(),
                    value: value.to_owned(),
                });
            }
        };
        match action {
            None => self.debug = on,
            Some(action) if on => self.flag_action = self.flag_action.or(Some(action)),
            Some(_) => {}
        }
        Ok(true)
    }

    fn slot(&mut self, flag: &str) -> Option<&mut String> {
        Some(match flag {
            "namespace" => &mut self.namespace,
            "id" => &mut self.id,
            "address" => &mut self.address,
            "publish-binary" => &mut self.publish_binary,
            "bundle" => &mut self.bundle,
            "socket" => &mut self.socket,
            _ => return None,
        })
    }

    fn action(&mut self, word: &str) -> Result<(), ArgsError> {
        if self.action_word.is_some() {
            self.warnings
                .push(format!("argument {word:?} after the action ignored"));
            return Ok(());
        }
        self.action_word = Some(action_of(word).ok_or_else(|| ArgsError::UnknownAction(word.to_owned()))?);
        Ok(())
    }

    fn finish(self) -> Result<Args, ArgsError> {
        Ok(Args {
            action: self.flag_action.or(self.action_word).unwrap_or(Action::Run),
            namespace: self.namespace,
            id: self.id,
            address: self.address,
            publish_binary: self.publish_binary,
            bundle: self.bundle,
            socket: self.socket,
            debug: self.debug,
            warnings: self.warnings,
        })
    }
}

fn action_of(word: &str) -> Option<Action> {
    match word {
        "start" => Some(Action::Start),
        "delete" => Some(Action::Delete),
        _ => None,
    }
}

/// What `-help` prints.
pub const USAGE: &str = "\
Usage: containerd-shim-kata-v2 [flags] [start|delete]

Run by containerd for runtime type io.containerd.kata.v2; without an action it serves a sandbox.

Flags:
  -namespace NAME        containerd namespace
  -id ID                 container id
  -address SOCKET        containerd's gRPC socket
  -publish-binary PATH   containerd's binary
  -bundle DIR            bundle of the container (delete)
  -socket PATH           socket to listen on instead of the default
  -debug                 verbose logs
  -info                  print RuntimeInfo as protobuf
  -v, -version           print the version
  -h, -help              print this text
";

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace())
    }

    #[test]
    fn args_when_containerds_are_understood() {
        let args = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd \
             -id abc -debug start",
        )
        .unwrap();

        assert_eq!(args.action, Action::Start);
        assert_eq!(args.namespace, "k8s.io");
        assert_eq!(args.address, "/run/containerd/containerd.sock");
        assert_eq!(args.publish_binary, "/usr/bin/containerd");
        assert_eq!(args.id, "abc");
        assert!(args.debug && args.warnings.is_empty());
    }

    #[test]
    fn args_when_with_dashes_or_equals_are_understood() {
        let args = parse("--namespace=ns --id=a=b --debug=false --bundle /b delete").unwrap();

        assert_eq!(
            (args.namespace.as_str(), args.id.as_str(), args.debug),
            ("ns", "a=b", false)
        );
        assert_eq!((args.action, args.bundle.as_str()), (Action::Delete, "/b"));
    }

    #[test]
    fn flags_when_unknown_do_not_swallow_the_action() {
        for line in [
            "-id i -namespace n -new start",
            "-id i -new value -namespace n start",
            "-id i -new=value -namespace n start",
        ] {
            let args = parse(line).unwrap();

            assert_eq!(args.action, Action::Start, "{line}");
            assert_eq!(args.namespace, "n", "{line}");
            assert_eq!(args.warnings, ["unknown flag -new ignored"], "{line}");
        }
    }

    #[test]
    fn args_when_version_info_or_help_need_nothing_else() {
        for (line, action) in [
            ("-v", Action::Version),
            ("-version", Action::Version),
            ("--version", Action::Version),
            ("-info", Action::Info),
            ("-help", Action::Help),
            ("-h", Action::Help),
        ] {
            assert_eq!(parse(line).unwrap().action, action, "{line}");
        }
    }

    #[test]
    fn args_when_bad_are_refused_by_name() {
        let cases = [
            ("-id", "flag -id needs a value"),
            ("-debug=maybe -v", "flag -debug: \"maybe\" is not a boolean"),
            ("-id a -namespace b restart", "unknown action \"restart\""),
            ("-id a start", "action start needs flag -namespace"),
            ("-namespace a delete", "action delete needs flag -id"),
            ("", "action run needs flag -namespace"),
            (
                "-namespace a -id ../b start",
                "flag -id: \"../b\" is not a containerd identifier",
            ),
            (
                "-namespace .. -id b start",
                "flag -namespace: \"..\" is not a containerd identifier",
            ),
        ];
        for (line, message) in cases {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.starts_with(message), "{line}: {error}");
        }
    }
}

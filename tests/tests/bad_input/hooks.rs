//! Hooks that cannot be run.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::json;
use tests::diagnosis::say;
use tests::leftovers::{Host, added};
use tests::{Case, Settings, spec};

use crate::refusal::{assert_no_panic, assert_refusal};

#[test]
fn hook_when_missing_or_not_executable_fails_its_container_by_name() {
    if !Settings::from_env().linux_guests {
        say("skipped: KVM cannot run Linux here, which is found first; the lab covers this");
        return;
    }
    Case::like_runc_alone("bad-hooks", |case| {
        let closed = case.folder("hooks").join("not-executable");
        fs::write(&closed, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o644)).unwrap();
        let closed = closed.to_str().unwrap();
        // Both fail the container: one its creation, the other its start, when it runs already.
        for (stage, path, code) in [
            ("createRuntime", "/no/such/hook", "invalid argument"),
            // PERMISSION_DENIED, for which containerd has no word.
            ("poststart", closed, "unknown"),
        ] {
            let before = Host::look(case.daemon());
            let container = case.container();
            let script = "while :; do sleep 1; done";
            let config = spec::write(case, &container, script, &json!({stage: [{"path": path}]}));
            let done = container
                .run(&[])
                .without_image()
                .flag("--rm")
                .option("--config", &config.display().to_string())
                .output();
            assert_eq!(done.code, 1, "{}", done.describe());
            assert!(done.err().contains(path), "{}", done.describe());
            if case.is_vm_runtime() {
                assert_refusal(&done, code, &[stage, path]);
                assert_no_panic(case);
            }
            assert_eq!(container.state(), None);
            drop(container);
            assert_eq!(added(case.daemon(), &before), [""; 0]);
        }
    });
}

//! Files of the host in a container: what a program sees must not depend on where the file system is.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, XattrFlags};
use tests::command::{Input, eventually};
use tests::{Case, Container};

/// A folder of the host for a bind mount.
fn shared(case: &Case, name: &str) -> PathBuf {
    let folder = case.daemon().dir().join(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn bind(source: &Path, target: &str, options: &str) -> String {
    format!(
        "type=bind,src={},dst={target},options={options}",
        source.display()
    )
}

/// A script in a fresh container with the host's programs in `/usr` and `folder` in `/mnt`; what it prints.
fn with_programs(container: &Container<'_>, folder: &Path, script: &str) -> String {
    // The image's own shell and its `/bin` have applets where programs are wanted.
    let begin = "for d in lib lib64; do [ -e /$d ] || ln -s usr/$d /$d; done; \
                 PATH=/usr/bin:/usr/sbin exec /usr/bin/bash -ec \"$0\"";
    let done = container
        .run(&["/bin/sh", "-ec", begin, script])
        .flag("--rm")
        .option("--mount", &bind(Path::new("/usr"), "/usr", "rbind:ro"))
        .option("--mount", &bind(folder, "/mnt", "rbind:rw"))
        .output();
    done.expect_code(0).out()
}

#[test]
fn tree_when_large_is_made_listed_and_removed() {
    let case = Case::begin("files-many");
    let container = case.container();
    container.sleeping();
    let script = "mkdir /t && cd /t && for d in $(seq 20); do mkdir $d; \
                  for f in $(seq 100); do echo $f >$d/$f; done; done; find . -type f | wc -l";
    let done = container.script(&[], script).expect_code(0);
    assert_eq!(done.out(), "2000\n");
    if case.daemon().settings.is_vm_runtime() {
        let held = fs::read_dir(format!("/proc/{}/fd", container.shim()))
            .unwrap()
            .count();
        assert!(held < 600, "{held} descriptors in the shim");
    }
    let done = container.script(&[], "cat /t/7/93; rm -r /t; ls -d /t 2>&1 | grep -c No");
    assert_eq!(done.expect_code(0).out(), "93\n1\n");
}

#[test]
fn listing_when_files_are_removed_meanwhile_ends() {
    let case = Case::begin("files-listing");
    let folder = shared(&case, "listing");
    for index in 0..2000 {
        fs::write(folder.join(format!("file{index}")), "").unwrap();
    }
    let container = case.container();
    let script = "cd /mnt; (while [ ! -e /tmp/done ]; do ls -l >/dev/null; done; echo listed) & \
                  for i in $(seq 0 799); do rm file$i; done; touch /tmp/done; wait; ls | wc -l";
    let done = container
        .run(&["sh", "-c", script])
        .flag("--rm")
        .option("--mount", &bind(&folder, "/mnt", "rbind:rw"))
        .output();
    assert_eq!(done.expect_code(0).out(), "listed\n1200\n");
}

#[test]
fn locks_of_the_host_hold_in_the_container_and_the_other_way() {
    let case = Case::begin("files-locks");
    let folder = shared(&case, "locks");
    let file = File::create(folder.join("lock")).unwrap();
    rustix::fs::flock(&file, FlockOperation::LockExclusive).unwrap();
    let container = case.container();
    let script = "flock -n /mnt/lock true || echo taken; \
                  (flock -x 9; echo mine; while [ ! -e /mnt/go ]; do sleep 0.1; done) 9>>/mnt/lock & \
                  sleep 1; touch /mnt/waiting; wait; flock -n /mnt/lock echo free; \
                  (flock -x 9; touch /mnt/held; sleep 1; echo first) 9>>/mnt/own & \
                  while [ ! -e /mnt/held ]; do sleep 0.1; done; flock -x /mnt/own echo second; wait";
    let script = format!("ln -sf usr/lib /lib; ln -sf usr/lib64 /lib64; {script}");
    let running = container
        .run(&["/bin/sh", "-c", &script])
        .flag("--rm")
        .option("--mount", &bind(Path::new("/usr"), "/usr", "rbind:ro"))
        .option("--mount", &bind(&folder, "/mnt", "rbind:rw"))
        .start(Input::Null);
    assert!(eventually(case.limit(), || folder.join("waiting").exists()));
    running
        .wait_out("the refusal", case.limit(), |out| out.contains('\n'))
        .unwrap();
    assert_eq!(running.out(), "taken\n");
    rustix::fs::flock(&file, FlockOperation::Unlock).unwrap();
    running
        .wait_out("the lock", case.limit(), |out| out.contains("mine"))
        .unwrap();
    let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
    assert_eq!(locked, Err(rustix::io::Errno::WOULDBLOCK));
    fs::write(folder.join("go"), "").unwrap();
    let done = running.finish(case.limit()).unwrap().expect_code(0);
    assert_eq!(done.out(), "taken\nmine\nfree\nfirst\nsecond\n");
}

#[test]
fn setuid_is_lost_when_another_user_changes_the_file() {
    let case = Case::begin("files-setuid");
    let folder = shared(&case, "setuid");
    for name in ["write", "append", "truncate", "fallocate", "open", "chown"] {
        fs::write(folder.join(name), "content").unwrap();
        fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o6777)).unwrap();
    }
    let container = case.container();
    // Busybox' stat asks for everything. One that asks for the mode alone, as coreutils' does, may be answered by the guest from
    // what it knew up to a second ago (`fuse_update_get_attr`): the host has cleared the bits, the guest's cache has not.
    let user = "setpriv --reuid 1000 --regid 1000 --clear-groups";
    let script = format!(
        "cd /mnt; {user} sh -c 'printf x | dd of=write conv=notrunc status=none; echo x >>append; \
         truncate -s 3 truncate; fallocate -l 100 fallocate; : >open'; chown 7:7 chown; \
         /bin/stat -c '%n %a' append chown fallocate open truncate write"
    );
    let out = with_programs(&container, &folder, &script);
    let expected = "append 777\nchown 777\nfallocate 777\nopen 777\ntruncate 777\nwrite 777\n";
    assert_eq!(out, expected);
}

/// The server asks for umasks to be left to it and honours default ACLs (`fs/tests/additions.rs`). But Linux applies them by
/// itself in a mount that the server has announced (`fuse_fill_super_submount` of 6.12 leaves SB_POSIXACL out), and every volume
/// is one: a limit of the guest's kernel, in README.md. This fails once a kernel does better.
#[test]
fn umask_is_applied_in_a_volume_even_where_a_default_acl_is() {
    let case = Case::begin("files-acl");
    let folder = shared(&case, "acl");
    fs::create_dir(folder.join("plain")).unwrap();
    let inside = folder.join("with-acl");
    fs::create_dir(&inside).unwrap();
    fs::set_permissions(&inside, fs::Permissions::from_mode(0o2775)).unwrap();
    // struct posix_acl_xattr_header and _entry: version 2; user, group and others with rwx, rwx, rx.
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, perm) in [(1u16, 7u16), (4, 7), (0x20, 5)] {
        acl.extend(tag.to_le_bytes());
        acl.extend(perm.to_le_bytes());
        acl.extend(u32::MAX.to_le_bytes());
    }
    rustix::fs::setxattr(&inside, "system.posix_acl_default", &acl, XattrFlags::empty()).unwrap();
    let container = case.container();
    let script = "cd /mnt; umask 022; mkdir plain/dir with-acl/dir; touch plain/file with-acl/file; \
                  stat -c %a plain/dir plain/file with-acl/dir with-acl/file";
    let done = container
        .run(&["sh", "-c", script])
        .flag("--rm")
        .option("--mount", &bind(&folder, "/mnt", "rbind:rw"))
        .output();
    assert_eq!(done.expect_code(0).out(), "755\n644\n2755\n644\n");
}

#[test]
fn mounts_below_a_bind_mount_are_file_systems_of_their_own() {
    let case = Case::begin("files-mounts");
    let folder = shared(&case, "mounts");
    for name in ["one", "two"] {
        let path = folder.join(name);
        fs::create_dir(&path).unwrap();
        rustix::mount::mount("tmpfs", &path, c"tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        fs::write(path.join("file"), name).unwrap();
    }
    let container = case.container();
    let script = "cd /mnt; stat -c %i one/file two/file | uniq | wc -l; stat -c %d:%i one/file two/file | uniq | wc -l; \
                  cat one/file two/file; sync; echo; cp -a one/file /tmp/copy && cmp one/file /tmp/copy && echo same";
    let done = container
        .run(&["sh", "-c", script])
        .flag("--rm")
        .option("--mount", &bind(&folder, "/mnt", "rbind:rw"))
        .output();
    for name in ["one", "two"] {
        rustix::mount::unmount(folder.join(name), rustix::mount::UnmountFlags::DETACH).unwrap();
    }
    assert_eq!(done.expect_code(0).out(), "1\n2\nonetwo\nsame\n");
}

#[test]
fn overlay_with_all_layers_on_the_share_works() {
    let case = Case::begin("files-overlay");
    let folder = shared(&case, "overlay");
    for name in ["lower/dir", "upper", "work", "merged"] {
        fs::create_dir_all(folder.join(name)).unwrap();
    }
    for name in ["kept", "gone", "changed"] {
        fs::write(folder.join("lower/dir").join(name), name).unwrap();
    }
    let container = case.container();
    let script = "cd /mnt; mount -t overlay -o userxattr,lowerdir=lower,upperdir=upper,workdir=work overlay merged; \
                  cd merged/dir; rm gone; echo -n new >changed; mv kept moved; ls; cat changed moved; \
                  cd /; umount /mnt/merged; stat -c '%F %t %T' /mnt/upper/dir/gone";
    let done = container
        .run(&["sh", "-ec", script])
        .flag("--rm")
        .flag("--privileged")
        .option("--mount", &bind(&folder, "/mnt", "rbind:rw"))
        .output();
    let out = done.expect_code(0).out();
    assert_eq!(out, "changed\nmoved\nnewkeptcharacter special file 0 0\n");
}

#[test]
fn file_calls_beyond_the_common_work() {
    let case = Case::begin("files-calls");
    let folder = shared(&case, "calls");
    fs::write(folder.join("source"), vec![7; 3 << 20]).unwrap();
    let hole = File::create(folder.join("hole")).unwrap();
    hole.set_len(1 << 20).unwrap();
    fs::write(folder.join("born"), "").unwrap();
    let container = case.container();
    let script = "cd /mnt; cp source copy; cmp source copy && echo copied; \
                  cp --sparse=always hole sparse; stat -c %b sparse; \
                  [ $(stat -c %W born) -gt 0 ] && echo born; \
                  mv --exchange source hole 2>/dev/null || echo no-exchange";
    let out = with_programs(&container, &folder, script);
    // `mv --exchange` is newer than Debian 12.
    assert_eq!(out, "copied\n0\nborn\nno-exchange\n");
}

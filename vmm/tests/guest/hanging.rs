//! A folder on a file system whose disk has died: files can be made, and who writes to them waits for ever.
//!
//! The kernel's side of FUSE (linux/fuse.h), answered by a thread. Needs root, for the mount.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::LONG;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const BATCH_FORGET: u32 = 42;

const ROOT: u64 = 1;
const REGULAR_FILE: u32 = 0o100_600;
const FOLDER: u32 = 0o040_700;

/// The mounted folder.
#[derive(Debug)]
pub struct HangingFolder {
    path: PathBuf,
    writing: Receiver<()>,
    release: Option<Sender<()>>,
    server: Option<JoinHandle<()>>,
}

impl HangingFolder {
    pub fn mount(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let (target, options) = (c_string(&path), CString::new(options).unwrap());
        // SAFETY: all arguments are C strings.
        let mounted = unsafe {
            libc::mount(
                c"hanging".as_ptr(),
                target.as_ptr(),
                c"fuse".as_ptr(),
                0,
                options.as_ptr().cast(),
            )
        };
        assert_eq!(mounted, 0, "{} (is this root?)", std::io::Error::last_os_error());
        let (wrote, writing) = channel();
        let (release, released) = channel();
        let server = std::thread::spawn(move || serve(device, &wrote, &released));
        Self {
            path,
            writing,
            release: Some(release),
            server: Some(server),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until somebody hangs in a write.
    pub fn wait_for_write(&self) {
        self.writing.recv_timeout(LONG).expect("nobody writes");
    }

    /// Lets who waits go, with an error.
    pub fn release(&mut self) {
        drop(self.release.take());
        if let Some(server) = self.server.take() {
            server.join().unwrap();
        }
    }
}

impl Drop for HangingFolder {
    fn drop(&mut self) {
        let path = c_string(&self.path);
        // SAFETY: the path is a C string.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        self.release();
    }
}

fn c_string(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
}

/// Answers until the first write; then waits to be released. Closing the device fails everything that waits.
fn serve(mut device: File, wrote: &Sender<()>, released: &Receiver<()>) {
    let mut request = vec![0; 2 << 20];
    while let Ok(len) = device.read(&mut request) {
        // struct fuse_in_header: len, opcode, unique, nodeid, …
        let word = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
        assert!(len >= 40);
        let node = u64::from_le_bytes(request[16..24].try_into().unwrap());
        let answer = match word(4) {
            // Major and minor version, readahead, flags, background requests, largest write, …
            INIT => Ok(words(&[7, 31, 0, 0, 0, 1 << 20, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
            GETATTR | SETATTR => Ok(attributes(node)),
            LOOKUP => Err(libc::ENOENT),
            CREATE => Ok(created()),
            FLUSH | RELEASE => Ok(Vec::new()),
            FORGET | BATCH_FORGET => continue,
            WRITE => {
                wrote.send(()).unwrap();
                let _ = released.recv();
                return;
            }
            _ => Err(libc::ENOSYS),
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(error) => (-error, Vec::new()),
        };
        let mut message = words(&[16 + body.len() as u32, error.cast_unsigned()]);
        message.extend_from_slice(&request[8..16]);
        message.extend_from_slice(&body);
        if device.write(&message).is_err() {
            return;
        }
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// struct fuse_attr: ino, size, blocks, times, their nanoseconds, mode, links, owner, …
fn attribute_words(node: u64) -> Vec<u32> {
    let mode = if node == ROOT { FOLDER } else { REGULAR_FILE };
    let mut words = vec![0; 22];
    words[0] = node as u32;
    (words[15], words[16], words[20]) = (mode, 1, 4096);
    words
}

/// struct fuse_attr_out
fn attributes(node: u64) -> Vec<u8> {
    let mut answer = vec![0; 4];
    answer.extend(attribute_words(node));
    words(&answer)
}

/// struct fuse_entry_out and fuse_open_out
fn created() -> Vec<u8> {
    let node = 2;
    let mut answer = vec![0; 10];
    answer[0] = node;
    answer.extend(attribute_words(u64::from(node)));
    answer.extend([0; 4]);
    words(&answer)
}

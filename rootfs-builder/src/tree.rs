//! The image's contents, independent of its format.

use std::collections::BTreeMap;
use std::path::{Component, Path};

/// One inode of the image. Everything belongs to root and dates from the epoch.
#[derive(Debug, PartialEq, Eq)]
pub enum Node {
    /// A folder, mode 0755.
    Directory,
    /// A regular file.
    File {
        /// Permission bits.
        mode: u32,
        /// Contents.
        data: Vec<u8>,
    },
    /// A character device.
    CharDevice {
        /// Permission bits.
        mode: u32,
        /// Device numbers.
        major: u32,
        /// Device numbers.
        minor: u32,
    },
}

/// Paths (relative to the root, without a leading slash) and what is there, in the order they are written.
#[derive(Default)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// The guest's tree: the agent at `init`, the folder its root is built in, and the two devices that the kernel
    /// and the agent's runtime library open before /dev is mounted.
    pub fn guest(agent: Vec<u8>, init: &str) -> Self {
        let mut tree = Self::default();
        for folder in ["dev", "newroot", "proc", "sys"] {
            tree.add_parents(&format!("{folder}/x"));
        }
        tree.nodes.insert(
            "dev/console".into(),
            Node::CharDevice {
                mode: 0o600,
                major: 5,
                minor: 1,
            },
        );
        tree.nodes.insert(
            "dev/null".into(),
            Node::CharDevice {
                mode: 0o666,
                major: 1,
                minor: 3,
            },
        );
        tree.add_file(init, 0o755, agent);
        tree
    }

    /// Adds a file and the folders above it.
    pub fn add_file(&mut self, path: &str, mode: u32, data: Vec<u8>) {
        self.add_parents(path);
        self.nodes.insert(path.to_owned(), Node::File { mode, data });
    }

    /// Parents sort before their children, so a reader that creates entries in order never misses one.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    fn add_parents(&mut self, path: &str) {
        let mut folder = String::new();
        let parent = Path::new(path).parent().unwrap_or(Path::new(""));
        for part in parent.components() {
            if let Component::Normal(name) = part {
                if !folder.is_empty() {
                    folder.push('/');
                }
                folder.push_str(&name.to_string_lossy());
                self.nodes.insert(folder.clone(), Node::Directory);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_when_added_brings_its_folders_before_it() {
        let mut tree = Tree::default();
        tree.add_file("lib/modules/6.1/a.ko", 0o644, vec![1]);

        let paths: Vec<&str> = tree.entries().map(|(path, _)| path).collect();

        assert_eq!(
            paths,
            ["lib", "lib/modules", "lib/modules/6.1", "lib/modules/6.1/a.ko"]
        );
    }

    #[test]
    fn guest_tree_has_init_devices_and_staging_folder() {
        let tree = Tree::guest(b"agent".to_vec(), "init");

        let paths: Vec<&str> = tree.entries().map(|(path, _)| path).collect();

        assert_eq!(
            paths,
            ["dev", "dev/console", "dev/null", "init", "newroot", "proc", "sys"]
        );
    }
}

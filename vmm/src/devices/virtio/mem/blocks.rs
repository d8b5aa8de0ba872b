//! Which blocks are plugged.

/// A bitmap of the blocks of the region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blocks {
    words: Vec<u64>,
    len: u64,
    plugged: u64,
}

impl Blocks {
    /// `len` blocks, none plugged.
    pub(super) fn new(len: u64) -> Self {
        // A window has at most 2¹⁹ blocks (1 TiB).
        let words = usize::try_from(len.div_ceil(64)).unwrap_or(0);
        Self {
            words: vec![0; words],
            len,
            plugged: 0,
        }
    }

    /// Number of blocks.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Number of plugged blocks.
    pub(super) fn plugged(&self) -> u64 {
        self.plugged
    }

    /// Whether block `index` is plugged; blocks that do not exist are not.
    pub(super) fn get(&self, index: u64) -> bool {
        let word = usize::try_from(index / 64).ok().and_then(|i| self.words.get(i));
        word.is_some_and(|word| word >> (index % 64) & 1 != 0)
    }

    /// Plugged blocks among `count` from `first` on.
    pub(super) fn plugged_in(&self, first: u64, count: u64) -> u64 {
        let end = first.saturating_add(count).min(self.len);
        (first..end).filter(|index| self.get(*index)).count() as u64
    }

    /// Plugs or unplugs `count` blocks from `first` on.
    pub(super) fn set(&mut self, first: u64, count: u64, plugged: bool) {
        for index in first..first.saturating_add(count).min(self.len) {
            if self.get(index) == plugged {
                continue;
            }
            let word = usize::try_from(index / 64)
                .ok()
                .and_then(|i| self.words.get_mut(i));
            if let Some(word) = word {
                *word ^= 1 << (index % 64);
                self.plugged = if plugged {
                    self.plugged + 1
                } else {
                    self.plugged - 1
                };
            }
        }
    }

    /// The first run of plugged blocks: first block and count.
    pub(super) fn first_run(&self) -> Option<(u64, u64)> {
        let word = self.words.iter().position(|word| *word != 0)? as u64;
        let first = (word * 64..).find(|index| self.get(*index))?;
        let end = (first..self.len)
            .find(|index| !self.get(*index))
            .unwrap_or(self.len);
        Some((first, end - first))
    }

    /// Runs of plugged blocks, ascending: first block and count.
    pub(super) fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for index in (0..self.len).filter(|index| self.get(*index)) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == index => *count += 1,
                _ => runs.push((index, 1)),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_when_set_and_cleared_are_counted() {
        let mut blocks = Blocks::new(130);
        blocks.set(60, 10, true);
        blocks.set(62, 3, true);
        blocks.set(128, 10, true);
        assert_eq!((blocks.len(), blocks.plugged()), (130, 12));
        assert_eq!(blocks.runs(), [(60, 10), (128, 2)]);
        assert_eq!(blocks.first_run(), Some((60, 10)));
        assert_eq!(blocks.plugged_in(0, 64), 4);
        assert_eq!(blocks.plugged_in(129, u64::MAX), 1);
        blocks.set(0, u64::MAX, false);
        assert_eq!((blocks.plugged(), blocks.runs().len()), (0, 0));
        assert!(!blocks.get(u64::MAX));
        assert_eq!(blocks.first_run(), None);
        blocks.set(129, 1, true);
        assert_eq!(blocks.first_run(), Some((129, 1)));
    }
}

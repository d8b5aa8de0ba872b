//! A set of pages.

use std::ops::Range;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
const WORD: u64 = u64::BITS as u64;

/// Some of the pages 0..n: a bit for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    /// Zeroed by the kernel, so that parts without pages cost nothing.
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// None of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self {
            // As many as fit into an address space.
            words: vec![0; pages.div_ceil(WORD) as usize],
            pages,
        }
    }

    /// Adds pages; those that do not exist are left out.
    pub fn insert(&mut self, pages: Range<u64>) {
        self.change(pages, |word, mask| *word |= mask);
    }

    /// Takes pages out.
    pub fn remove(&mut self, pages: Range<u64>) {
        self.change(pages, |word, mask| *word &= !mask);
    }

    /// The members among `range`, in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let range = range.start..range.end.min(self.pages);
        (range.start / WORD..range.end.div_ceil(WORD)).flat_map(move |index| {
            let word = self.words.get(index as usize).copied().unwrap_or(0);
            members(word & mask(index, &range)).map(move |bit| index * WORD + bit)
        })
    }

    fn change(&mut self, pages: Range<u64>, change: impl Fn(&mut u64, u64)) {
        let pages = pages.start..pages.end.min(self.pages);
        for index in pages.start / WORD..pages.end.div_ceil(WORD) {
            if let Some(word) = self.words.get_mut(index as usize) {
                change(word, mask(index, &pages));
            }
        }
    }
}

/// The bits of word `index` that are pages of `range`.
fn mask(index: u64, range: &Range<u64>) -> u64 {
    let first = index * WORD;
    let from = range.start.saturating_sub(first).min(WORD);
    let to = range.end.saturating_sub(first).min(WORD);
    let below = |bit: u64| if bit == WORD { u64::MAX } else { (1 << bit) - 1 };
    below(to) & !below(from)
}

fn members(mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let bit = u64::from(word.trailing_zeros());
        word &= word.checked_sub(1)?;
        Some(bit)
    })
}

#[cfg(test)]
mod properties {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pages_when_inserted_and_removed_are_those_of_a_tree(
            changes in proptest::collection::vec((any::<bool>(), 0u64..300, 0u64..200), 0..20),
            start in 0u64..300,
            len in 0u64..300,
        ) {
            let mut set = PageSet::new(257);
            let mut tree = BTreeSet::new();
            for (insert, start, len) in changes {
                let range = start..start + len;
                if insert {
                    set.insert(range.clone());
                    tree.extend(range.filter(|page| *page < 257));
                } else {
                    set.remove(range.clone());
                    tree.retain(|page| !range.contains(page));
                }
            }
            let within: Vec<u64> = set.within(start..start + len).collect();
            let expected: Vec<u64> = tree.into_iter().filter(|p| (start..start + len).contains(p)).collect();
            prop_assert_eq!(within, expected);
        }
    }
}

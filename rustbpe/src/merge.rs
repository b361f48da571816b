//! The merging: join the most frequent pair of neighbouring tokens, again and again.
//!
//! Every pair knows how often it occurs and in which words it may occur, so that a merge touches only those words. Counts
//! change by what a merge does to its neighbours, collected per neighbour before the table of pairs is touched. The heap is
//! lazy: an entry whose count has fallen since goes back with its present count.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use foldhash::fast::FixedState;
use hashbrown::HashMap;

use crate::{ChunkCounts, Error, Progress, Result, Watch};

type Token = u32;
type Pair = (Token, Token);
/// Index of a word, a distinct chunk.
type WordId = u32;

/// The distinct chunks as token sequences, end to end in `tokens`; a word shrinks in its place.
#[derive(Default)]
struct Words {
    tokens: Vec<Token>,
    words: Vec<Word>,
}

struct Word {
    start: usize,
    len: u32,
    count: u64,
}

impl Words {
    /// Consumes the counts part by part, so that only one part is held twice. Words of one byte have no pairs.
    fn new(parts: Vec<ChunkCounts>) -> Self {
        let mut all = Self::default();
        for part in parts {
            for (chunk, count) in part.iter().filter(|(chunk, _)| chunk.len() > 1) {
                all.words.push(Word { start: all.tokens.len(), len: chunk.len() as u32, count });
                all.tokens.extend(chunk.iter().map(|&byte| Token::from(byte)));
            }
        }
        all
    }

    fn tokens(&self, word: &Word) -> &[Token] {
        &self.tokens[word.start..][..word.len as usize]
    }
}

#[derive(Default)]
struct PairState {
    count: u64,
    words: Vec<WordId>,
}

type Pairs = HashMap<Pair, PairState, FixedState>;

/// Counts the pairs of bytes; two passes give every list exactly the memory it needs.
fn byte_pairs(words: &Words) -> Pairs {
    let mut states: Vec<PairState> = (0..1 << 16).map(|_| PairState::default()).collect();
    let index = |pair: &[Token]| (pair[0] << 8 | pair[1]) as usize;
    let mut occurrences = vec![0u32; 1 << 16];
    for word in &words.words {
        for pair in words.tokens(word).windows(2) {
            occurrences[index(pair)] += 1;
        }
    }
    for (state, &n) in states.iter_mut().zip(&occurrences) {
        state.words.reserve_exact(n as usize);
    }
    for (id, word) in words.words.iter().enumerate() {
        for pair in words.tokens(word).windows(2) {
            states[index(pair)].add(word.count, id as WordId);
        }
    }
    let pair = |i: usize| ((i >> 8) as Token, (i & 255) as Token);
    let seen = states.into_iter().enumerate().filter(|(_, state)| state.count > 0);
    seen.map(|(i, state)| (pair(i), state)).collect()
}

impl PairState {
    fn add(&mut self, count: u64, word: WordId) {
        self.count += count;
        if self.words.last() != Some(&word) {
            self.words.push(word);
        }
    }
}

/// What one merge does to the pairs with each neighbour on one side: how much the old pair lost to the new one.
#[derive(Default)]
struct Neighbours {
    gained: Vec<PairState>,
    touched: Vec<Token>,
}

impl Neighbours {
    fn add(&mut self, neighbour: Token, count: u64, word: WordId) {
        let needed = neighbour as usize + 1;
        if self.gained.len() < needed {
            self.gained.resize_with(needed, PairState::default);
        }
        let state = &mut self.gained[neighbour as usize];
        if state.count == 0 {
            self.touched.push(neighbour);
        }
        state.add(count, word);
    }

    fn drain(&mut self) -> impl Iterator<Item = (Token, PairState)> {
        let gained = &mut self.gained;
        self.touched.drain(..).map(|token| (token, std::mem::take(&mut gained[token as usize])))
    }
}

struct Trainer {
    words: Words,
    pairs: Pairs,
    heap: BinaryHeap<(u64, Reverse<Pair>)>,
    left: Neighbours,
    right: Neighbours,
}

impl Trainer {
    fn new(parts: Vec<ChunkCounts>) -> Self {
        let words = Words::new(parts);
        let pairs = byte_pairs(&words);
        let heap = pairs.iter().map(|(&pair, state)| (state.count, Reverse(pair))).collect();
        Self { words, pairs, heap, left: Neighbours::default(), right: Neighbours::default() }
    }

    /// The pair with the highest count, the smallest of those; its state leaves the table.
    fn pop(&mut self) -> Option<(Pair, PairState)> {
        while let Some((count, Reverse(pair))) = self.heap.pop() {
            let present = self.pairs.get(&pair).map_or(0, |state| state.count);
            if present == count {
                return self.pairs.remove(&pair).map(|state| (pair, state));
            }
            if present > 0 {
                self.heap.push((present, Reverse(pair)));
            }
        }
        None
    }

    fn merge(&mut self, pair: Pair, state: &PairState, new: Token) {
        for &id in &state.words {
            self.merge_in_word(pair, id, new);
        }
        let mut left = std::mem::take(&mut self.left);
        for (neighbour, gained) in left.drain() {
            let old = if neighbour == new { (pair.1, pair.0) } else { (neighbour, pair.0) };
            self.replace(old, (neighbour, new), gained);
        }
        self.left = left;
        let mut right = std::mem::take(&mut self.right);
        for (neighbour, gained) in right.drain() {
            self.replace((pair.1, neighbour), (new, neighbour), gained);
        }
        self.right = right;
    }

    fn replace(&mut self, old: Pair, new: Pair, gained: PairState) {
        if let Some(state) = self.pairs.get_mut(&old) {
            state.count -= gained.count;
            if state.count == 0 {
                self.pairs.remove(&old);
            }
        }
        self.heap.push((gained.count, Reverse(new)));
        self.pairs.insert(new, gained);
    }

    /// Rewrites one word from left to right. A neighbour that was itself just merged appears as `new`.
    fn merge_in_word(&mut self, pair: Pair, id: WordId, new: Token) {
        let word = &mut self.words.words[id as usize];
        let tokens = &mut self.words.tokens[word.start..][..word.len as usize];
        let (mut read, mut write) = (0, 0);
        while read < tokens.len() {
            if read + 1 < tokens.len() && (tokens[read], tokens[read + 1]) == pair {
                if write > 0 {
                    self.left.add(tokens[write - 1], word.count, id);
                }
                read += 2;
                let follows = |i: usize| tokens.get(i).copied();
                match (follows(read), follows(read + 1)) {
                    (Some(a), Some(b)) if (a, b) == pair => {}
                    (Some(next), _) => self.right.add(next, word.count, id),
                    (None, _) => {}
                }
                tokens[write] = new;
            } else {
                tokens[write] = tokens[read];
                read += 1;
            }
            write += 1;
        }
        word.len = write as u32;
    }
}

/// The bytes of every token in the order of their ranks: the 256 bytes, then one token per merge.
///
/// Ends early, with fewer than `vocab_size` tokens, when nothing is left to merge.
///
/// # Errors
/// A vocabulary under 256, no text at all; `Stopped` when `watch` says so.
pub fn merge_ranks(
    parts: Vec<ChunkCounts>,
    vocab_size: usize,
    watch: &mut Watch,
) -> Result<Vec<Vec<u8>>> {
    if parts.iter().all(ChunkCounts::is_empty) {
        return Err(Error::invalid("the corpus is empty: no document has any text"));
    }
    let total = check_vocab_size(vocab_size)? - 256;
    let mut trainer = Trainer::new(parts);
    let mut ranks: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    for done in 0..total {
        let Some((pair, state)) = trainer.pop() else { break };
        trainer.merge(pair, &state, ranks.len() as Token);
        ranks.push([&ranks[pair.0 as usize][..], &ranks[pair.1 as usize]].concat());
        if !watch(Progress::Merging { done: done + 1, total }) {
            return Err(Error::Stopped);
        }
    }
    Ok(ranks)
}

/// # Errors
/// Under 256, or more than a token id can hold.
pub fn check_vocab_size(vocab_size: usize) -> Result<usize> {
    match vocab_size {
        256..=0x7FFF_FFFF => Ok(vocab_size),
        _ => Err(Error::invalid(format!(
            "a vocabulary of {vocab_size} is impossible: a byte-level tokenizer needs at least 256 tokens"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn train(words: &[(&str, u64)], merges: usize) -> Vec<Vec<u8>> {
        let mut counts = ChunkCounts::default();
        words.iter().for_each(|(word, count)| counts.add(word.as_bytes(), *count));
        merge_ranks(vec![counts], 256 + merges, &mut |_| true).unwrap()
    }

    fn strings(ranks: &[Vec<u8>]) -> Vec<&str> {
        ranks[256..].iter().map(|token| std::str::from_utf8(token).unwrap()).collect()
    }

    /// The definition: count all neighbours anew before every merge.
    fn naive(words: &[(&str, u64)], merges: usize) -> Vec<Vec<u8>> {
        let mut ranks: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        let bytes = |word: &str| word.bytes().map(Token::from).collect();
        let mut words: Vec<(Vec<Token>, u64)> =
            words.iter().map(|(word, count)| (bytes(word), *count)).collect();
        for _ in 0..merges {
            let mut counts = BTreeMap::<Pair, u64>::new();
            for (word, count) in &words {
                for pair in word.windows(2) {
                    *counts.entry((pair[0], pair[1])).or_default() += count;
                }
            }
            let Some((&pair, _)) = counts.iter().max_by_key(|&(&pair, &n)| (n, Reverse(pair)))
            else {
                break;
            };
            let new = ranks.len() as Token;
            for (word, _) in &mut words {
                let mut merged = Vec::new();
                for &token in word.iter() {
                    match merged.last() {
                        Some(&last) if (last, token) == pair => *merged.last_mut().unwrap() = new,
                        _ => merged.push(token),
                    }
                }
                *word = merged;
            }
            ranks.push([&ranks[pair.0 as usize][..], &ranks[pair.1 as usize]].concat());
        }
        ranks
    }

    #[test]
    fn the_highest_count_goes_first() {
        let ranks = train(&[("low", 5), ("lower", 2), ("newest", 6), ("widest", 3)], 4);
        assert_eq!(strings(&ranks), ["es", "est", "lo", "low"]);
    }

    #[test]
    fn the_smaller_pair_wins_a_tie() {
        assert_eq!(strings(&train(&[("zz", 7), ("ab", 7), ("aa", 7)], 3)), ["aa", "ab", "zz"]);
    }

    #[test]
    fn overlapping_pairs_are_counted_but_merged_from_the_left() {
        // Two overlapping (a, a) beat one (x, y); aaa becomes aa a.
        assert_eq!(strings(&train(&[("aaa", 2), ("xy", 3)], 3)), ["aa", "xy", "aaa"]);
    }

    #[test]
    fn counts_beyond_32_bits() {
        let words = [("ab", u64::from(u32::MAX) + 5), ("cd", u64::from(u32::MAX) + 6)];
        assert_eq!(strings(&train(&words, 2)), ["cd", "ab"]);
    }

    #[test]
    fn ends_when_nothing_is_left_to_merge() {
        assert_eq!(strings(&train(&[("abc", 1), ("z", 9)], 100)), ["ab", "abc"]);
    }

    #[test]
    fn impossible_input_is_refused() {
        let mut counts = ChunkCounts::default();
        let refuse = |parts, vocab_size| {
            merge_ranks(parts, vocab_size, &mut |_| true).unwrap_err().to_string()
        };
        assert!(refuse(vec![ChunkCounts::default()], 300).contains("the corpus is empty"));
        counts.add(b"ab", 1);
        assert!(refuse(vec![counts], 255).contains("at least 256"));
    }

    #[test]
    fn the_watcher_sees_every_merge_and_can_stop() {
        let mut counts = ChunkCounts::default();
        counts.add(b"abcdefgh", 1);
        let mut seen = 0;
        let stopped = merge_ranks(vec![counts], 260, &mut |now| {
            seen += 1;
            assert_eq!(now, Progress::Merging { done: seen, total: 4 });
            seen < 3
        });
        assert!(matches!(stopped, Err(Error::Stopped)));
        assert_eq!(seen, 3);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn equals_counting_anew(
            words in prop::collection::btree_map("[abc]{1,12}|[ab]{20,40}", 1u64..6, 1..12),
            merges in 0usize..40,
        ) {
            let words: Vec<(&str, u64)> = words.iter().map(|(w, n)| (w.as_str(), *n)).collect();
            prop_assert_eq!(train(&words, merges), naive(&words, merges));
        }
    }
}

//! Cuts text into the chunks that merges never cross.
//!
//! Any pattern runs on the general engine (`fancy_regex`, which knows look-ahead). GPT-4's pattern, with any number of
//! digits per number, is recognised and cut by hand about ten times faster; a property test holds the two together.

use std::sync::LazyLock;

use fancy_regex::Regex;
use regex_syntax::hir::{Class, HirKind};

use crate::{Error, Result};

const GPT4_HEAD: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,";
const GPT4_TAIL: &str = r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

#[derive(Clone)]
pub enum Splitter {
    Gpt4(Gpt4Splitter),
    General(Box<Regex>),
}

impl Splitter {
    /// # Errors
    /// When `pattern` is no regular expression.
    pub fn new(pattern: &str) -> Result<Self> {
        match gpt4_digits(pattern) {
            Some(max_digits) => Ok(Self::Gpt4(Gpt4Splitter { max_digits })),
            None => Self::general(pattern),
        }
    }

    fn general(pattern: &str) -> Result<Self> {
        match Regex::new(pattern) {
            Ok(regex) => Ok(Self::General(Box::new(regex))),
            Err(error) => Err(Error::invalid(format!(
                "the split pattern {pattern:?} is not a valid regular expression: {error}"
            ))),
        }
    }

    /// Calls `each` with every non-empty chunk of `text` in order.
    ///
    /// # Errors
    /// When the general engine gives up on a text that makes it backtrack too much.
    pub fn for_each_chunk(&self, text: &str, mut each: impl FnMut(&str)) -> Result<()> {
        match self {
            Self::Gpt4(splitter) => splitter.for_each_chunk(text, each),
            Self::General(regex) => {
                for found in regex.find_iter(text) {
                    let found = found.map_err(|error| {
                        Error::invalid(format!("the split pattern failed on a document: {error}"))
                    })?;
                    if !found.as_str().is_empty() {
                        each(found.as_str());
                    }
                }
            }
        }
        Ok(())
    }
}

/// The N of `\p{N}{1,N}` if the rest of `pattern` is GPT-4's.
fn gpt4_digits(pattern: &str) -> Option<usize> {
    let digits = pattern.strip_prefix(GPT4_HEAD)?.strip_suffix(GPT4_TAIL)?;
    let number: usize = digits.parse().ok()?;
    // Only the plain spelling: "03" or "+3" is the general engine's business.
    (number >= 1 && number.to_string() == digits).then_some(number)
}

/// What the pattern distinguishes: `\p{L}`, `\p{N}`, `[\r\n]`, the rest of `\s`, everything else.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Other,
    Letter,
    Number,
    Newline,
    Space,
}

/// The kind of every code point, taken from the general engine's own Unicode tables.
static KINDS: LazyLock<Vec<Kind>> = LazyLock::new(|| {
    let mut kinds = vec![Kind::Other; char::MAX as usize + 1];
    for (class, kind) in [
        (r"\p{L}", Kind::Letter),
        (r"\p{N}", Kind::Number),
        (r"\s", Kind::Space),
        (r"[\r\n]", Kind::Newline),
    ] {
        let hir = regex_syntax::parse(class).expect("a valid class");
        let HirKind::Class(Class::Unicode(ranges)) = hir.kind() else {
            unreachable!("{class} is a Unicode class")
        };
        for range in ranges.iter() {
            kinds[range.start() as usize..=range.end() as usize].fill(kind);
        }
    }
    kinds
});

#[derive(Clone)]
pub struct Gpt4Splitter {
    max_digits: usize,
}

impl Gpt4Splitter {
    fn for_each_chunk(&self, text: &str, mut each: impl FnMut(&str)) {
        let cursor = Cursor { text, kinds: &KINDS };
        let mut start = 0;
        while start < text.len() {
            let end = cursor.chunk_end(start, self.max_digits);
            each(&text[start..end]);
            start = end;
        }
    }
}

#[derive(Clone, Copy)]
struct Cursor<'a> {
    text: &'a str,
    kinds: &'a [Kind],
}

impl Cursor<'_> {
    /// The alternatives of the pattern in their order; one of them always matches.
    #[inline]
    fn chunk_end(self, start: usize, max_digits: usize) -> usize {
        let Some((kind, after)) = self.at(start) else {
            return start;
        };
        match kind {
            Kind::Letter => self.skip(Kind::Letter, after),
            Kind::Number => self.skip_at_most(Kind::Number, after, max_digits - 1),
            Kind::Newline => self.whitespace_end(start),
            Kind::Space | Kind::Other => {
                if let Some(end) = self.contraction_end(start) {
                    return end;
                }
                match self.at(after) {
                    Some((Kind::Letter, next)) => self.skip(Kind::Letter, next),
                    Some((Kind::Other, next)) if self.byte(start) == Some(b' ') => {
                        self.punctuation_end(next)
                    }
                    _ if kind == Kind::Other => self.punctuation_end(after),
                    _ => self.whitespace_end(start),
                }
            }
        }
    }

    #[inline]
    fn byte(self, i: usize) -> Option<u8> {
        self.text.as_bytes().get(i).copied()
    }

    /// The kind of the character that begins at byte `i`, and where the next one begins.
    #[inline]
    fn at(self, i: usize) -> Option<(Kind, usize)> {
        let byte = self.byte(i)?;
        if byte < 0x80 {
            return Some((self.kinds[byte as usize], i + 1));
        }
        let character = self.text[i..].chars().next()?;
        Some((self.kinds[character as usize], i + character.len_utf8()))
    }

    #[inline]
    fn skip(self, kind: Kind, mut i: usize) -> usize {
        loop {
            match self.at(i) {
                Some((found, next)) if found == kind => i = next,
                _ => return i,
            }
        }
    }

    #[inline]
    fn skip_at_most(self, kind: Kind, mut i: usize, most: usize) -> usize {
        for _ in 0..most {
            match self.at(i) {
                Some((found, next)) if found == kind => i = next,
                _ => break,
            }
        }
        i
    }

    /// `'(?i:[sdmt]|ll|ve|re)`; ſ (U+017F) is an s to a case-insensitive match.
    #[inline]
    fn contraction_end(self, start: usize) -> Option<usize> {
        let after = match self.text.as_bytes()[start..] {
            [b'\'', ref after @ ..] => after,
            _ => return None,
        };
        match *after {
            [a, ..] if matches!(a | 0x20, b's' | b'd' | b'm' | b't') => Some(start + 2),
            [a, b, ..] if matches!([a | 0x20, b | 0x20], [b'l', b'l'] | [b'v' | b'r', b'e']) => {
                Some(start + 3)
            }
            [0xC5, 0xBF, ..] => Some(start + 3),
            _ => None,
        }
    }

    /// The rest of ` ?[^\s\p{L}\p{N}]++[\r\n]*`.
    #[inline]
    fn punctuation_end(self, i: usize) -> usize {
        self.skip(Kind::Newline, self.skip(Kind::Other, i))
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+`: up to the last line break, or all but the last space before a word.
    #[inline]
    fn whitespace_end(self, start: usize) -> usize {
        let (mut i, mut last, mut after_newline) = (start, start, None);
        while let Some((kind @ (Kind::Newline | Kind::Space), next)) = self.at(i) {
            if kind == Kind::Newline {
                after_newline = Some(next);
            }
            (last, i) = (i, next);
        }
        match after_newline {
            Some(end) => end,
            None if i < self.text.len() && last > start => last,
            None => i,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pattern(digits: usize) -> String {
        format!("{GPT4_HEAD}{digits}{GPT4_TAIL}")
    }

    fn chunks(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut chunks = Vec::new();
        splitter.for_each_chunk(text, |chunk| chunks.push(chunk.to_owned())).unwrap();
        chunks
    }

    /// Both engines for one, two and three digits.
    static ENGINES: LazyLock<Vec<(Splitter, Splitter)>> = LazyLock::new(|| {
        let engines = |digits| {
            let fast = Splitter::new(&pattern(digits)).unwrap();
            assert!(matches!(fast, Splitter::Gpt4(_)));
            (fast, Splitter::general(&pattern(digits)).unwrap())
        };
        (1..=3).map(engines).collect()
    });

    fn assert_same(text: &str) {
        for (fast, general) in ENGINES.iter() {
            assert_eq!(chunks(fast, text), chunks(general, text), "{text:?}");
        }
    }

    #[test]
    fn cuts_like_the_pattern() {
        let splitter = Splitter::new(&pattern(2)).unwrap();
        let text = "I'm  here:\n\n  12345 (x)\t'LLama ";
        assert_eq!(
            chunks(&splitter, text),
            [
                "I", "'m", " ", " here", ":\n\n", " ", " ", "12", "34", "5", " (", "x", ")", "\t",
                "'LL", "ama", " "
            ]
        );
        assert_same(text);
    }

    #[test]
    fn every_character_there_is() {
        let characters: Vec<char> = (0..=char::MAX as u32).filter_map(char::from_u32).collect();
        for group in characters.chunks(4096) {
            let text: String = group.iter().map(|c| format!("'{c}a{c} {c}1")).collect();
            let (fast, general) = &ENGINES[1];
            assert_eq!(chunks(fast, &text), chunks(general, &text));
        }
    }

    #[test]
    fn other_patterns_go_to_the_general_engine() {
        assert!(matches!(Splitter::new(r"\w+|\s").unwrap(), Splitter::General(_)));
        assert!(matches!(Splitter::new(&pattern(0)).unwrap(), Splitter::General(_)));
        let error = Splitter::new("(").err().unwrap().to_string();
        assert!(error.contains("\"(\" is not a valid regular expression"), "{error}");
    }

    #[test]
    fn too_much_backtracking_is_an_error() {
        let splitter = Splitter::new(r"(a|b|ab)*(?>c)").unwrap();
        assert!(splitter.for_each_chunk(&"ab".repeat(64), |_| ()).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn equals_the_general_engine_on_hard_text(
            text in r"['sSſdLlvVerRE \t\r\n\u{a0}\u{85}\u{2028}\u{3000}aZé日1٣½!。\u{301}👍\u{200d}]{0,24}"
        ) {
            assert_same(&text);
        }

        #[test]
        fn equals_the_general_engine_on_any_text(text in r"(?s).{0,40}") {
            assert_same(&text);
        }
    }
}

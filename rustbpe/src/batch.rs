//! Documents on their way from a source to the counters: capped, counted and gathered into batches.

use std::ops::Range;

/// Bytes after which a batch is handed on: small enough to keep all cores busy and Ctrl-C quick.
const BATCH_BYTES: usize = 256 * 1024;

/// Some documents in one allocation.
#[derive(Default)]
pub struct Batch {
    text: String,
    documents: Vec<Range<usize>>,
    /// Characters taken from the source up to and including this batch.
    pub chars_so_far: u64,
}

impl Batch {
    pub fn documents(&self) -> impl Iterator<Item = &str> {
        self.documents.iter().map(|range| &self.text[range.clone()])
    }

    pub fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.text.len() >= BATCH_BYTES
    }

    fn push(&mut self, document: &str) {
        let start = self.text.len();
        self.text.push_str(document);
        self.documents.push(start..self.text.len());
    }
}

/// Cuts every document to `doc_cap` characters and stops after the one that exceeds `max_chars` in total.
pub struct Intake {
    doc_cap: usize,
    max_chars: u64,
    pub documents: u64,
    pub chars: u64,
    pub bytes: u64,
}

impl Intake {
    pub fn new(doc_cap: Option<usize>, max_chars: Option<u64>) -> Self {
        Self {
            doc_cap: doc_cap.unwrap_or(usize::MAX),
            max_chars: max_chars.unwrap_or(u64::MAX),
            documents: 0,
            chars: 0,
            bytes: 0,
        }
    }

    pub fn is_satisfied(&self) -> bool {
        self.chars > self.max_chars
    }

    pub fn add(&mut self, document: &str, batch: &mut Batch) {
        let (document, chars) = cap_chars(document, self.doc_cap);
        self.documents += 1;
        self.chars += chars as u64;
        self.bytes += document.len() as u64;
        batch.push(document);
        batch.chars_so_far = self.chars;
    }
}

/// The first `cap` characters of `text`, and how many those are.
fn cap_chars(text: &str, cap: usize) -> (&str, usize) {
    let chars = text.chars().count();
    if chars <= cap {
        return (text, chars);
    }
    let end = text.char_indices().nth(cap).map_or(text.len(), |(i, _)| i);
    (&text[..end], cap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caps_at_characters_not_bytes() {
        assert_eq!(cap_chars("añb", 2), ("añ", 2));
        assert_eq!(cap_chars("añb", 3), ("añb", 3));
        assert_eq!(cap_chars("añb", 0), ("", 0));
        assert_eq!(cap_chars("日本語", 1), ("日", 1));
    }

    #[test]
    fn stops_after_the_document_that_exceeds_the_budget() {
        let mut intake = Intake::new(Some(4), Some(8));
        let mut batch = Batch::default();
        let mut taken = 0;
        while !intake.is_satisfied() {
            intake.add("ééééé", &mut batch);
            taken += 1;
        }
        assert_eq!((taken, intake.chars, intake.bytes), (3, 12, 24));
        assert_eq!(batch.documents().collect::<Vec<_>>(), ["éééé"; 3]);
    }
}

//! Byte-pair-encoding training: text in, merge ranks out. This crate knows no Python; `py.rs` is the border.
//!
//! 1. `batch` caps documents and gathers them into batches; `parquet_text` reads them from Parquet files.
//! 2. `split` cuts text into chunks that merges never cross, by a regular expression.
//! 3. `count` counts the distinct chunks on all cores: from here on the corpus is gone.
//! 4. `merge` repeatedly joins the most frequent pair of neighbours.

mod batch;
mod count;
mod error;
mod merge;
mod parquet_text;
#[cfg(feature = "pyo3")]
mod py;
mod split;

pub use batch::{Batch, Intake};
pub use count::{ChunkCounts, count_chunks};
pub use error::{Error, Result};
pub use merge::merge_ranks;
pub use parquet_text::ParquetText;
pub use split::Splitter;

/// What is being done and how far it is; the unit is characters, then merges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Counting { chars: u64 },
    Merging { done: usize, total: usize },
}

/// Asked often; answering `false` ends the training with `Error::Stopped`.
pub type Watch<'a> = dyn FnMut(Progress) -> bool + 'a;

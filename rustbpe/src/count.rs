//! Counts the distinct chunks of a corpus on all cores.
//!
//! Memory holds every distinct chunk once, never the text: each worker counts into a small table that fits its cache and
//! empties it, when full, into one large table cut into locked shards.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use foldhash::fast::FixedState;
use hashbrown::HashTable;
use std::hash::BuildHasher;

use crate::{Batch, Error, Progress, Result, Splitter, Watch};

/// Power of two; far more than cores, so that two workers seldom want the same one.
const SHARDS: usize = 64;
/// Distinct chunks and bytes after which a worker empties its own table.
const LOCAL_CHUNKS: usize = 1 << 16;
const LOCAL_BYTES: usize = 1 << 20;

/// Distinct chunks with the number of times each was seen. The keys lie end to end in `bytes`.
#[derive(Default)]
pub struct ChunkCounts {
    table: HashTable<Entry>,
    bytes: Vec<u8>,
}

struct Entry {
    start: u32,
    len: u32,
    count: u64,
}

fn hash(chunk: &[u8]) -> u64 {
    FixedState::with_seed(0).hash_one(chunk)
}

impl Entry {
    fn key<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.start as usize..][..self.len as usize]
    }
}

impl ChunkCounts {
    pub fn len(&self) -> usize {
        self.table.len()
    }

    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    pub fn add(&mut self, chunk: &[u8], count: u64) {
        self.add_hashed(hash(chunk), chunk, count);
    }

    fn add_hashed(&mut self, hash_of_chunk: u64, chunk: &[u8], count: u64) {
        let Self { table, bytes } = self;
        let found = table.find_mut(hash_of_chunk, |entry| entry.key(bytes) == chunk);
        if let Some(entry) = found {
            entry.count += count;
            return;
        }
        let entry = Entry {
            start: u32::try_from(bytes.len()).expect("a shard holds less than 4 GiB"),
            len: u32::try_from(chunk.len()).expect("a chunk is shorter than 4 GiB"),
            count,
        };
        bytes.extend_from_slice(chunk);
        table.insert_unique(hash_of_chunk, entry, |entry| hash(entry.key(bytes)));
    }

    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.table.iter().map(|entry| (entry.key(&self.bytes), entry.count))
    }

    fn is_full(&self) -> bool {
        self.table.len() >= LOCAL_CHUNKS || self.bytes.len() >= LOCAL_BYTES
    }

    /// Moves everything into `shards` and keeps the memory.
    fn empty_into(&mut self, shards: &[Mutex<ChunkCounts>]) {
        let mut parts: Vec<Vec<(u64, Entry)>> = (0..SHARDS).map(|_| Vec::new()).collect();
        for entry in self.table.drain() {
            let hash = hash(entry.key(&self.bytes));
            parts[hash as usize % SHARDS].push((hash, entry));
        }
        for (part, shard) in parts.iter().zip(shards) {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for (hash, entry) in part {
                shard.add_hashed(*hash, entry.key(&self.bytes), entry.count);
            }
        }
        self.bytes.clear();
    }
}

/// Reads `source` on this thread, splits and counts on `threads` others; the parts' keys are disjoint.
///
/// # Errors
/// The source's or the splitter's first error; `Stopped` when `watch` says so.
pub fn count_chunks(
    source: &mut dyn Iterator<Item = Result<Batch>>,
    splitter: &Splitter,
    threads: usize,
    watch: &mut Watch,
) -> Result<Vec<ChunkCounts>> {
    let shards: Vec<Mutex<ChunkCounts>> = (0..SHARDS).map(|_| Mutex::default()).collect();
    let failed = AtomicBool::new(false);
    let threads = threads.max(1);
    thread::scope(|scope| {
        let (sender, receiver) = sync_channel(threads);
        // Only the workers hold the receiver: when all have failed, sending fails instead of waiting for ever.
        let receiver = Arc::new(Mutex::new(receiver));
        let worker = |receiver: Arc<Mutex<Receiver<Batch>>>| {
            let (splitter, shards, failed) = (splitter.clone(), &shards, &failed);
            scope.spawn(move || {
                let counted = count_batches(&receiver, &splitter, shards);
                failed.fetch_or(counted.is_err(), Ordering::Relaxed);
                counted
            })
        };
        let workers: Vec<_> = (0..threads).map(|_| worker(receiver.clone())).collect();
        drop(receiver);
        let fed = feed(source, &sender, &failed, watch);
        drop(sender);
        for worker in workers {
            worker.join().expect("a counting thread does not panic")?;
        }
        fed
    })?;
    Ok(shards
        .into_iter()
        .map(|shard| shard.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect())
}

/// Sends every batch to the workers; a worker's failure stops it too, and is told by that worker.
fn feed(
    source: &mut dyn Iterator<Item = Result<Batch>>,
    sender: &SyncSender<Batch>,
    failed: &AtomicBool,
    watch: &mut Watch,
) -> Result<()> {
    for batch in source {
        let batch = batch?;
        let chars = batch.chars_so_far;
        let is_taken = sender.send(batch).is_ok() && !failed.load(Ordering::Relaxed);
        if !is_taken || !watch(Progress::Counting { chars }) {
            return Err(Error::Stopped);
        }
    }
    Ok(())
}

fn count_batches(
    batches: &Mutex<Receiver<Batch>>,
    splitter: &Splitter,
    shards: &[Mutex<ChunkCounts>],
) -> Result<()> {
    let mut local = ChunkCounts::default();
    loop {
        let batch = batches.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(batch) = batch else { break };
        for document in batch.documents() {
            splitter.for_each_chunk(document, |chunk| {
                local.add(chunk.as_bytes(), 1);
                if local.is_full() {
                    local.empty_into(shards);
                }
            })?;
        }
    }
    local.empty_into(shards);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Intake;
    use std::collections::HashMap;

    fn batches(documents: &[&str], each: usize) -> Vec<Result<Batch>> {
        let mut intake = Intake::new(None, None);
        let fill = |part: &[&str]| {
            let mut batch = Batch::default();
            part.iter().for_each(|document| intake.add(document, &mut batch));
            Ok(batch)
        };
        documents.chunks(each).map(fill).collect()
    }

    fn count(documents: &[&str], pattern: &str, threads: usize) -> Result<HashMap<Vec<u8>, u64>> {
        let splitter = Splitter::new(pattern)?;
        let mut source = batches(documents, 3).into_iter();
        let parts = count_chunks(&mut source, &splitter, threads, &mut |_| true)?;
        let pairs = parts.iter().flat_map(|part| part.iter().map(|(k, n)| (k.to_vec(), n)));
        let mut counts = HashMap::new();
        for (chunk, n) in pairs {
            assert!(counts.insert(chunk, n).is_none(), "parts share no key");
        }
        Ok(counts)
    }

    #[test]
    fn counts_the_same_on_any_number_of_threads() {
        let documents: Vec<String> =
            (0..2000).map(|i| format!("w{} x{} same ", i % 7, i * 37)).collect();
        let documents: Vec<&str> = documents.iter().map(String::as_str).collect();
        let alone = count(&documents, r"\w+", 1).unwrap();
        assert_eq!(alone[&b"same"[..]], 2000);
        assert_eq!(alone[&b"w3"[..]], 286);
        assert_eq!(alone.values().sum::<u64>(), 6000);
        assert_eq!(count(&documents, r"\w+", 4).unwrap(), alone);
    }

    #[test]
    fn a_full_local_table_is_emptied_without_loss() {
        let text: String = (0..3 * LOCAL_CHUNKS / 2).map(|i| format!("{i} ")).collect();
        let counts = count(&[&text, &text], r"\w+", 1).unwrap();
        assert_eq!(counts.len(), 3 * LOCAL_CHUNKS / 2);
        assert!(counts.values().all(|&n| n == 2));
    }

    #[test]
    fn a_failing_splitter_ends_the_feeding() {
        let hard = "ab".repeat(64);
        let error = count(&vec![hard.as_str(); 500], r"(a|b|ab)*(?>c)", 3).unwrap_err();
        assert!(error.to_string().contains("the split pattern failed"), "{error}");
    }

    #[test]
    fn the_errors_of_the_source_and_the_watcher_come_through() {
        let splitter = Splitter::new(r"\w+").unwrap();
        let mut broken = batches(&["a"; 9], 3);
        broken.insert(1, Err(Error::invalid("no such file")));
        let mut source = broken.into_iter();
        let error = count_chunks(&mut source, &splitter, 2, &mut |_| true).err().unwrap();
        assert_eq!(error.to_string(), "no such file");
        assert_eq!(source.len(), 2, "reading ends at the error");

        let mut source = batches(&["ab"; 9], 3).into_iter();
        let mut seen = Vec::new();
        let stopped = count_chunks(&mut source, &splitter, 2, &mut |now| {
            seen.push(now);
            seen.len() < 2
        });
        assert!(matches!(stopped, Err(Error::Stopped)));
        assert_eq!(seen, [Progress::Counting { chars: 6 }, Progress::Counting { chars: 12 }]);
    }
}
